"""Which artifact a name on the ledger stands for, to commands that work on a data directory.

Read from the ledger there; while a node has it open, that node is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import BadPeer, Conflict, NotFound
from contracts.types import ManifestHash
from node.cli import common


@dataclass(frozen=True)
class Registered:
    """A model on the ledger and its manifest."""

    model_id: str
    version: str
    manifest_hash: ManifestHash


def find(
    data_dir: Path, model_ids: Sequence[str], version: str | None, rpc_url: str, token: str | None
) -> list[Registered]:
    """Each of the models in `version`, or in its newest that is not retired. Raises NotFound."""
    from node.storage.files import DirectoryLock

    if not (data_dir / "ledger").exists():
        raise NotFound(f"no ledger in {data_dir}: start the node once, or name its --data-dir")
    lock = DirectoryLock(data_dir)
    try:
        lock.acquire()
    except Conflict:
        return [_ask(model_id, version, rpc_url, token) for model_id in model_ids]
    try:
        return _read(data_dir, model_ids, version)
    finally:
        lock.release()


def _read(data_dir: Path, model_ids: Sequence[str], version: str | None) -> list[Registered]:
    from genesis import config as genesis_config
    from ledger.ledger import Ledger
    from node.replay import Replay

    ledger = Ledger.open(data_dir / "ledger", genesis_config.load(data_dir / "genesis.toml"))
    try:
        replay = Replay(ledger)
        replay.catch_up()
    finally:
        ledger.close()
    models = [replay.state.registry.find(model_id, version) for model_id in model_ids]
    return [Registered(model.model_id, model.version, model.manifest_hash) for model in models]


def _ask(model_id: str, version: str | None, rpc_url: str, token: str | None) -> Registered:
    given = {"model_id": model_id} | ({"version": version} if version is not None else {})
    answer = common.client(rpc_url, token).call("getModelInfo", **given)
    try:
        manifest_hash = bytes.fromhex(answer["manifest_hash"].removeprefix("0x"))
        return Registered(answer["model_id"], answer["version"], ManifestHash(manifest_hash))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPeer(f"{rpc_url} answered with no model ({error!r}): does that node run this version?") from error
