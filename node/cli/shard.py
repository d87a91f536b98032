"""`aigen shard`: who holds which shard, whether it is whole, its names elsewhere, a copy for a web server.

`list`, `verify` and `free` ask a node. `cid` and `export` read a store, and work beside a running node as without one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import NotFound
from node.cli import common, registered
from node.cli.registered import Registered

if TYPE_CHECKING:
    from node.storage.store import ShardStore


@click.group()
def shard() -> None:
    """Shards: who holds them, whether they are whole, what others call them, a copy for a web server."""


@shard.command("list")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@common.rpc_options
@common.json_option
def list_shards(model_id: str, version: str | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """The shards of a model with their copies and holders."""
    params = {"model_id": model_id} | ({"version": version} if version is not None else {})
    answer = common.client(rpc_url, token).call("getShardLocations", **params)
    if as_json:
        common.show_json(answer)
        return
    rows = [
        (
            row["shard_index"],
            common.size(row["size"]),
            f"{row['copies']} of {answer['redundancy']}",
            _health(row, answer["redundancy"]),
            _holders(row["locations"]),
            row["shard_hash"],
        )
        for row in answer["shards"]
    ]
    common.show_table(("shard", "size", "copies", "health", "holders", "SHA-256"), rows)


def _health(row: dict[str, Any], redundancy: int) -> str:
    """What the network has of a shard, and how many of its holders have not been heard of for a lease."""
    if row["copies"] >= redundancy:
        found = "good"
    elif row["copies"]:
        found = f"{redundancy - row['copies']} short"
    else:
        found = "only mirrors" if row["locations"] else "nobody has it"
    return f"{found}, {len(row['silent'])} silent" if row["silent"] else found


def _holders(locations: list[dict[str, Any]]) -> str:
    """The nodes by name; the mirrors are those of the whole model, and `aigen mirror list` has their URLs."""
    names = [common.short(location["node_id"]) for location in locations if location["node_id"] is not None]
    if mirrors := len(locations) - len(names):
        names.append("1 mirror" if mirrors == 1 else f"{mirrors} mirrors")
    return ", ".join(names)


@shard.command("free")
@click.argument("size", type=click.IntRange(min=1))
@common.rpc_options
@common.json_option
def free(size: int, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Give up shards of this node until SIZE bytes are free. Only those that others should hold and enough of them do,
    and none of a model in use. Exit status 1 if that is too little."""
    freed: list[dict[str, Any]] = common.client(rpc_url, token, timeout_s=None).call("freeSpace", size=size)
    total = sum(row["size"] for row in freed)
    if as_json:
        common.show_json(freed)
    else:
        rows = [(row["model_id"], row["shard_index"], common.size(row["size"]), row["shard_hash"]) for row in freed]
        common.show_table(("model", "shard", "size", "SHA-256"), rows)
        rest = "" if total >= size else "; all else is this node's to hold, in use, or not on enough other nodes"
        click.echo(f"\n{common.size(total)} freed of {common.size(size)}{rest}")
    if total < size:
        raise SystemExit(1)


@shard.command("verify")
@click.argument("model_id", required=False)
@common.rpc_options
@common.json_option
def verify(model_id: str | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Hash the shards this node holds again; bad pieces are fetched anew. Exit status 1 if any was bad."""
    params = {"model_id": model_id} if model_id is not None else {}
    checks: list[dict[str, Any]] = common.client(rpc_url, token).call("verifyShards", **params)
    if as_json:
        common.show_json(checks)
    else:
        rows = [
            (
                row["model_id"],
                row["shard_index"],
                row["pieces_checked"],
                ", ".join(map(str, row["bad_pieces"])) or "none",
                row["shard_hash"],
            )
            for row in checks
        ]
        common.show_table(("model", "shard", "pieces", "bad pieces", "SHA-256"), rows)
        damaged = sum(bool(row["bad_pieces"]) for row in checks)
        verdict = f"{damaged} damaged: not served, their bad pieces are fetched again" if damaged else "all whole"
        click.echo(f"\n{len(checks)} shards hashed, {verdict}")
    if any(row["bad_pieces"] for row in checks):
        raise SystemExit(1)


def _store(data_dir: Path) -> ShardStore:
    """Raises NotFound when there is none; making one would hide a mistyped name."""
    from node.storage.store import ShardStore

    if not (data_dir / "store").is_dir():
        raise NotFound(f"no store in {data_dir}: name the node's --data-dir")
    return ShardStore(data_dir / "store")


@shard.command("cid")
@click.argument("model_id")
@click.option("--version", "version", help="Default: the newest.")
@common.data_dir_option
@common.rpc_options
@common.json_option
def cid(model_id: str, version: str | None, data_dir: Path, rpc_url: str, token: str | None, as_json: bool) -> None:
    """The name IPFS has for each shard: its root CID under the profile unixfs-v1-2025.

    Computed from the manifest in this node's store: the shards need not be there. The model is looked up in the data
    directory's ledger, or by asking --rpc while a node runs on it.
    """
    from node.storage.unixfs import root_cid

    store = _store(data_dir)
    (found,) = registered.find(data_dir, (model_id,), version, rpc_url, token)
    shards = store.manifest(found.manifest_hash).shards
    if as_json:
        common.show_json(
            {
                **_told(found),
                "shards": [
                    {
                        "shard_index": index,
                        "size": shard.size,
                        "shard_hash": f"0x{shard.sha256.hex()}",
                        "cid": root_cid(shard),
                    }
                    for index, shard in enumerate(shards)
                ],
            }
        )
        return
    rows = [(index, common.size(shard.size), root_cid(shard)) for index, shard in enumerate(shards)]
    common.show_table(("shard", "size", "root CID (unixfs-v1-2025)"), rows)


@shard.command("export")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.argument("model_ids", metavar="MODEL_ID...", nargs=-1, required=True)
@click.option("--version", "version", help="Of each of the models. Default: the newest.")
@click.option("--copy", is_flag=True, help="Copy even where hard links would do, which take no space.")
@common.data_dir_option
@common.rpc_options
@common.json_option
def export(
    directory: Path,
    model_ids: tuple[str, ...],
    version: str | None,
    copy: bool,
    data_dir: Path,
    rpc_url: str,
    token: str | None,
    as_json: bool,
) -> None:
    """Lay models out under DIR for a static web server, which is then a mirror of them.

    Every shard this node holds of them is hashed on its way. What is in DIR already is hashed again and kept. The
    models are looked up in the data directory's ledger, or by asking --rpc while a node runs on it.
    """
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    from node.storage import export as exporting

    store = _store(data_dir)
    models = registered.find(data_dir, model_ids, version, rpc_url, token)
    hashes = [found.manifest_hash for found in models]
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with common.progress_bars(*columns) as progress:
        task = progress.add_task("exporting", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        done = exporting.export(store, hashes, directory, copy, show)
    if as_json:
        common.show_json(
            {
                "directory": str(directory),
                "models": [_told(found) for found in models],
                "linked": done.linked,
                "copied": done.copied,
                "kept": done.kept,
                "size": done.size_bytes,
            }
        )
        return
    for found in models:
        click.echo(f"{found.model_id} version {found.version}: manifest 0x{found.manifest_hash.hex()}")
    click.echo(
        f"{done.linked + done.copied + done.kept} shards, {common.size(done.size_bytes)}, in {directory}: "
        f"{done.linked} linked, {done.copied} copied, {done.kept} there already, each SHA-256 verified"
    )
    click.echo(f"next, once a web server serves {directory}: an admin: aigen mirror add {models[0].model_id} URL")


def _told(found: Registered) -> dict[str, Any]:
    return {
        "model_id": found.model_id,
        "version": found.version,
        "manifest_hash": f"0x{found.manifest_hash.hex()}",
    }
