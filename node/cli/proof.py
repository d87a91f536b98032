"""`aigen proof`: proofs of what is on the ledger, for people who have its genesis file and no node."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadInput, BadPeer, Conflict
from node.cli import common

if TYPE_CHECKING:
    from contracts.events import ContractEvent
    from ledger.proof import Proven, ProvenBlock
    from node.storage.manifest import Manifest

out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write; none is overwritten. Default: a name of its own in this folder.",
)


@click.group()
def proof() -> None:
    """Proofs of what is on the ledger, checked with its genesis file alone."""


@proof.command("model")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@out_option
@common.rpc_options
@common.json_option
def model(model_id: str, version: str | None, out: Path | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Write a proof that an admin registered a model: its manifest hash, its shard hashes."""
    params = {"kind": "model", "model_id": model_id, "version": version}
    _write(params, out or Path(f"{model_id}.proof.json"), rpc_url, token, as_json)


@proof.command("tier")
@click.argument("account")
@out_option
@common.rpc_options
@common.json_option
def tier(account: str, out: Path | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Write a proof of the grant in force: that an admin let ACCOUNT hold a tier."""
    address = f"0x{common.parse_address(account).hex()}"
    params = {"kind": "tier", "account": address}
    _write(params, out or Path(f"tier-{address}.proof.json"), rpc_url, token, as_json)


@proof.command("shard")
@click.argument("model_id")
@click.argument("shard_index", type=int)
@click.argument("node_id")
@click.option("--version", "version", help="Default: the newest.")
@out_option
@common.rpc_options
@common.json_option
def shard(
    model_id: str,
    shard_index: int,
    node_id: str,
    version: str | None,
    out: Path | None,
    rpc_url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Write a proof that a node's operator announced a shard."""
    params = {
        "kind": "shard",
        "model_id": model_id,
        "version": version,
        "shard_index": shard_index,
        "node_id": node_id,
    }
    _write(params, out or Path(f"{model_id}-{shard_index}-{node_id}.proof.json"), rpc_url, token, as_json)


def _write(params: dict[str, Any], path: Path, rpc_url: str, token: str | None, as_json: bool) -> None:
    import msgspec

    from ledger.proof import Proof
    from node.storage.files import explained

    given = {name: value for name, value in params.items() if value is not None}
    answer = common.client(rpc_url, token).call("getProof", **given)
    try:
        data = msgspec.convert(answer, Proof).encode()
    except msgspec.ValidationError as error:
        raise BadPeer(f"{rpc_url} answered with no proof ({error}): does that node run this version?") from error
    try:
        with explained("writing", path), path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise Conflict(f"{path} exists: a proof overwrites nothing; choose another --out") from error
    if as_json:
        common.show_json({"file": str(path), "size": len(data), "genesis_hash": answer["genesis_hash"]})
    else:
        click.echo(f"{path}, {common.size(len(data))}: aigen proof check {path} --genesis GENESIS.toml")


@proof.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("artifact_dir", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option(
    "--genesis",
    "genesis_path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="The network's genesis file, from somebody you trust: all else follows from it.",
)
@common.json_option
def check(file: Path, artifact_dir: Path | None, genesis_path: Path, as_json: bool) -> None:
    """Check a proof without a node, and that the model in ARTIFACT_DIR is the one it is of.

    ARTIFACT_DIR is a Hugging Face directory. Exit status 0 only if everything holds.
    """
    from genesis import block, config
    from ledger import proof as proofs
    from node.storage.files import read_file

    loaded = config.load(genesis_path)
    data = read_file(file, proofs.PROOF_BYTES_MAX)
    try:
        proven = proofs.check(data, block.build(loaded), loaded.network.chain_id)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    manifest = None if artifact_dir is None else _check_artifact(artifact_dir, proven.event)
    if as_json:
        common.show_json(_told(proven, artifact_dir, manifest))
    else:
        common.show_fields(_lines(proven, artifact_dir, manifest))


def _check_artifact(root: Path, event: ContractEvent) -> Manifest:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    from contracts.events import ModelRegistered
    from node.storage.artifact import Progress
    from node.storage.measure import check_directory

    if not isinstance(event, ModelRegistered):
        raise BadInput(f"the proof is of {type(event).__name__}: ARTIFACT_DIR goes with the proof of a model")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with common.progress_bars(*columns) as bars:
        task = bars.add_task("hashing", total=event.total_size)

        def show(now: Progress) -> None:
            bars.update(task, completed=now.done_bytes)

        return check_directory(root, event.total_size, event.shard_size, event.shard_hashes, event.manifest_hash, show)


def _not_shown(proven: Proven) -> str:
    """Where the proof ends: what could have happened since."""
    from contracts.events import ModelRegistered, TierGranted

    last = proven.block.number if proven.standing is None else proven.standing.number
    match proven.event:
        case ModelRegistered():
            return f"whether it was retired after block {last}"
        case TierGranted():
            return f"whether it was revoked or replaced after block {last}"
        case _:
            return f"whether it was withdrawn, or the node left, after block {last}; whether the node has the bytes"


def _told(proven: Proven, root: Path | None, manifest: Manifest | None) -> dict[str, Any]:
    from node.rpc.answers import answer

    return {
        "event": {"name": type(proven.event).__name__, "fields": answer(proven.event)},
        "sender": answer(proven.sender),
        "transaction_hash": answer(proven.transaction_hash),
        "block": _told_block(proven.block),
        "standing": None if proven.standing is None else _told_block(proven.standing),
        "authorities_changed_in": list(proven.changes),
        "not_shown": _not_shown(proven),
        "artifact": None if manifest is None else {"path": str(root), "files": [f.path for f in manifest.files]},
    }


def _told_block(block: ProvenBlock) -> dict[str, Any]:
    from dataclasses import asdict

    from node.rpc.answers import answer

    told: dict[str, Any] = answer(asdict(block))
    return told


def _lines(proven: Proven, root: Path | None, manifest: Manifest | None) -> list[tuple[str, object]]:
    what, role, still = _words(proven.event)
    block, standing = proven.block, proven.standing
    lines: list[tuple[str, object]] = [
        ("proven", what),
        ("by", f"{role} 0x{proven.sender.hex()}, transaction 0x{proven.transaction_hash.hex()}"),
        ("in", _block_words(block)),
        ("voted by", ", ".join(f"0x{signer.hex()}" for signer in block.signers)),
    ]
    if standing is not None:
        lines.append(("still so", f"{still} in {_block_words(standing)}"))
    if proven.changes:
        lines.append(("changes", f"the authorities changed in block {', '.join(map(str, proven.changes))}, as shown"))
    lines.append(("not shown", _not_shown(proven)))
    if manifest is not None:
        lines.append(
            (
                "artifact",
                f"{len(manifest.files)} files in {root}, {common.size(manifest.total_size)}: all "
                f"{len(manifest.shards)} shards and the manifest have the SHA-256 that was registered",
            )
        )
    return lines


def _words(event: ContractEvent) -> tuple[str, str, str]:
    """What happened, who does such things, and how it is said of a later block."""
    from contracts.events import ModelRegistered, ShardsAnnounced, TierGranted

    match event:
        case ModelRegistered():
            what = (
                f"{event.model_id} version {event.version} was registered: manifest 0x{event.manifest_hash.hex()}, "
                f"{common.size(event.total_size)} in {event.shard_count} shards, from tier {event.minimum_tier}"
            )
            return what, "admin", "registered and not retired"
        case TierGranted():
            until = common.when(event.until)
            return f"0x{event.account.hex()} was granted {event.tier} until {until}", "admin", "granted"
        case ShardsAnnounced():
            shards = ", ".join(map(str, event.shard_indices))
            what = f"node {event.node_id} announced shards {shards} of {event.model_id} version {event.version}"
            return what, "the node's operator", "announced"
    raise AssertionError(f"no proof is about {type(event).__name__}")


def _block_words(block: ProvenBlock) -> str:
    return (
        f"block {block.number}, 0x{block.hash.hex()}, {common.when(block.timestamp)}, final by {len(block.signers)} of "
        f"{block.authority_count} authorities"
    )
