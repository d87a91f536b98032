"""`aigen model`: take a model in, register it, load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadInput, Conflict, NotFound
from contracts.types import ManifestHash, ModelId, Version
from node.cli import common, signing
from node.cli.signing import Signer

if TYPE_CHECKING:
    from node.storage.manifest import Manifest
    from node.storage.store import ShardStore

VERSION_DEFAULT = "1"

CATALOGUE = ("catalogue", None)
"""State and precision of a model that nobody has brought yet."""


@click.group()
def model() -> None:
    """Import, register, list, load, make public and retire models."""


@model.command("import")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.option("--move", is_flag=True, help="Delete each source file once its bytes are in shards.")
@common.data_dir_option
@common.json_option
def import_(source: Path, move: bool, data_dir: Path, as_json: bool) -> None:
    """Cut SOURCE (a Hugging Face directory or a GGUF file) into shards of this node's store."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    from genesis import config as genesis_config
    from node import config as settings
    from node.storage.artifact import Progress as ImportProgress
    from node.storage.importer import import_model
    from node.storage.store import ShardStore

    budget = settings.load(data_dir / "config.toml").storage.disk_budget
    genesis = genesis_config.load(data_dir / "genesis.toml")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with common.progress_bars(*columns) as progress:
        task = progress.add_task("reading", total=None)

        def show(now: ImportProgress) -> None:
            progress.update(task, description=now.stage, completed=now.done_bytes, total=now.total_bytes)

        imported = import_model(source, ShardStore(data_dir / "store", budget), genesis.shards.size, show, move)
    manifest = imported.manifest
    manifest_hash = f"0x{imported.manifest_hash.hex()}"
    if as_json:
        common.show_json(
            {
                "manifest_hash": manifest_hash,
                "architecture": imported.architecture,
                "total_size": manifest.total_size,
                "shard_size": manifest.shard_size,
                "shard_hashes": [f"0x{shard_hash.hex()}" for shard_hash in manifest.shard_hashes],
                "skipped": list(imported.skipped),
                "already": imported.already,
            }
        )
        return
    for name in imported.skipped:
        click.echo(f"left out, no part of the model: {name}", err=True)
    click.echo(
        f"{imported.architecture}, {common.size(manifest.total_size)} in {len(manifest.shards)} shards, "
        f"manifest {manifest_hash}{' (it was here already)' if imported.already else ''}"
    )
    click.echo(f"next, an admin: aigen model publish MODEL_ID --manifest {manifest_hash} --tier TIER")


@model.command("publish")
@click.argument("model_id")
@click.option("--version", "version", default=VERSION_DEFAULT, show_default=True)
@click.option("--manifest", "manifest_hash", help="Which imported model. Default: the only one in the store.")
@click.option("--tier", required=True, help="The lowest tier that may use it.")
@click.option("--core", is_flag=True, help="Make it the network's core model.")
@click.option("--metadata", default="", help="Free text on the ledger, such as a licence or a source.")
@signing.options
def publish(
    model_id: str,
    version: str,
    manifest_hash: str | None,
    tier: str,
    core: bool,
    metadata: str,
    signer: Signer,
) -> None:
    """Register an imported model on the ledger (an admin's transaction)."""
    from contracts.calls import RegisterModel
    from node import config as settings
    from node.storage.store import ShardStore

    settings.check_model_id(model_id)
    store = ShardStore(signer.data_dir / "store")
    chosen = _chosen_manifest(store.manifests(), manifest_hash)
    manifest = store.manifest(chosen)
    call = RegisterModel(
        model_id=ModelId(model_id),
        version=Version(version),
        total_size=manifest.total_size,
        shard_size=manifest.shard_size,
        shard_count=len(manifest.shards),
        shard_hashes=manifest.shard_hashes,
        manifest_hash=chosen,
        minimum_tier=tier,
        core=core,
        architecture=_architecture(manifest, store),
        metadata=metadata,
    )
    receipt = signer.send(call, method="registerModel")
    signer.show(receipt, f"{model_id} version {version} is registered in block {receipt['block_number']}")


def _architecture(manifest: Manifest, store: ShardStore) -> str:
    """The class name in the artifact's config.json; the import has checked that there is one."""
    import json

    from node.storage.artifact import read_artifact_file
    from node.storage.directory import CONFIG_SIZE_MAX

    config = json.loads(read_artifact_file(manifest, store, "config.json", CONFIG_SIZE_MAX))
    return str(config["architectures"][0])


def _chosen_manifest(found: list[ManifestHash], wanted: str | None) -> ManifestHash:
    if wanted is not None:
        try:
            value = ManifestHash(bytes.fromhex(wanted.removeprefix("0x")))
        except ValueError as error:
            raise BadInput(f"{wanted!r} is no manifest hash: 0x and 64 hexadecimal digits") from error
        if value not in found:
            raise NotFound(f"no manifest {wanted} in this store: `aigen model import` takes a model in")
        return value
    if not found:
        raise NotFound("no model was imported into this store: run `aigen model import SOURCE` first")
    if len(found) > 1:
        listed = ", ".join(f"0x{value.hex()}" for value in found)
        raise Conflict(f"{len(found)} models were imported: name one with --manifest ({listed})")
    return found[0]


@model.command("list")
@common.rpc_options
@common.json_option
def list_models(rpc_url: str, token: str | None, as_json: bool) -> None:
    """The models of this network: registered ones, and those its genesis names as ones to bring."""
    answer = common.client(rpc_url, token).call("listModels")
    if as_json:
        common.show_json(answer)
        return
    rows = [
        (
            row["model_id"],
            row["version"],
            common.size(row["total_size"]),
            row["shard_count"],
            row["minimum_tier"],
            _standing(row),
            row["precision"],
        )
        for row in answer["models"]
    ]
    rows += [
        (row["model_id"], None, f"~{common.size(row['approximate_size'])}", None, row["minimum_tier"], *CATALOGUE)
        for row in answer["catalogue"]
        if not row["registered"]
    ]
    common.show_table(("model", "version", "size", "shards", "tier", "state", "loaded as"), rows)


def _standing(row: dict[str, Any]) -> str:
    found = "retired" if row["retired"] else "core" if row["core"] else "registered"
    return f"{found}, public" if row["public"] else found


def _model_params(model_id: str, version: str | None) -> dict[str, Any]:
    return {"model_id": model_id} | ({"version": version} if version is not None else {})


@model.command("info")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@common.rpc_options
@common.json_option
def info(model_id: str, version: str | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """A model's metadata and verification hashes."""
    answer = common.client(rpc_url, token).call("getModelInfo", **_model_params(model_id, version))
    if as_json:
        common.show_json(answer)
        return
    sizes = {name: f"{answer[name]} bytes ({common.size(answer[name])})" for name in ("total_size", "shard_size")}
    common.show_fields((name, value) for name, value in (answer | sizes).items() if name != "shards")
    click.echo()
    rows = [(row["shard_index"], common.size(row["size"]), row["shard_hash"]) for row in answer["shards"]]
    common.show_table(("shard", "size", "SHA-256"), rows)


@model.command("load")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@click.option("--no-wait", is_flag=True, help="Answer at once; `aigen status` shows the progress.")
@common.rpc_options
@common.json_option
def load(model_id: str, version: str | None, no_wait: bool, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Fetch, verify and load a model on the node."""
    params = _model_params(model_id, version) | {"wait": not no_wait}
    _show_state(common.client(rpc_url, token, timeout_s=None).call("loadModel", **params), as_json)


@model.command("unload")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@common.rpc_options
@common.json_option
def unload(model_id: str, version: str | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Give a model's memory back (its shards stay on the disk)."""
    _show_state(common.client(rpc_url, token).call("unloadModel", **_model_params(model_id, version)), as_json)


def _show_state(state: dict[str, Any], as_json: bool) -> None:
    if as_json:
        common.show_json(state)
    else:
        how = f" in {state['precision']}" if state["precision"] else ""
        pinned = ", pinned" if state["pinned"] else ""
        click.echo(
            f"{state['model_id']} version {state['version']}: {state['state']}{how}{pinned} {state['detail']}".rstrip()
        )


@model.command("switch")
@click.argument("model_id")
@common.data_dir_option
@common.json_option
def switch(model_id: str, data_dir: Path, as_json: bool) -> None:
    """Make MODEL_ID the core model of this node's config; it is preloaded and pinned after a restart."""
    from node import config as settings

    settings.set_model(data_dir / "config.toml", model_id)
    if as_json:
        common.show_json({"model": model_id, "data_dir": str(data_dir)})
        return
    click.echo(f"{model_id} is this node's core model from its next start: stop the node and run `aigen start`")


@model.command("set-core")
@click.argument("model_id")
@click.argument("version")
@signing.options
def set_core(
    model_id: str,
    version: str,
    signer: Signer,
) -> None:
    """Designate the network's core model (an admin's transaction)."""
    from contracts.calls import SetCoreModel

    receipt = signer.send(SetCoreModel(ModelId(model_id), Version(version)), method="setCoreModel")
    signer.show(receipt, f"{model_id} version {version} is the core model from block {receipt['block_number']}")


@model.command("set-public")
@click.argument("model_id")
@click.argument("version")
@click.option("--off", is_flag=True, help="Serve it to members alone again.")
@signing.options
def set_public(
    model_id: str,
    version: str,
    off: bool,
    signer: Signer,
) -> None:
    """Let nodes that are no members fetch a model too, such as mirrors (an admin's transaction).

    Who may use it stays a matter of tiers; but whoever has fetched it has it.
    """
    from contracts.calls import SetPublic

    receipt = signer.send(SetPublic(ModelId(model_id), Version(version), not off))
    served = "members alone" if off else "anybody"
    signer.show(receipt, f"{model_id} version {version} is served to {served} from block {receipt['block_number']}")


@model.command("retire")
@click.argument("model_id")
@click.argument("version")
@signing.options
def retire(
    model_id: str,
    version: str,
    signer: Signer,
) -> None:
    """Take a version out of service (an admin's transaction)."""
    from contracts.calls import RetireModel

    receipt = signer.send(RetireModel(ModelId(model_id), Version(version)))
    signer.show(receipt, f"{model_id} version {version} is retired from block {receipt['block_number']}")
