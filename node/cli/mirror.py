"""`aigen mirror`: the web servers and IPFS gateways on the ledger that serve a model's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadInput, Conflict, NotFound
from contracts.limits import BACKENDS, URI_BYTES_MAX
from contracts.types import ModelId, Version
from node.cli import common, signing
from node.cli.signing import Signer

if TYPE_CHECKING:
    from node.rpc.client import RpcClient


@click.group()
def mirror() -> None:
    """Web servers and IPFS gateways that serve a model's bytes."""


@mirror.command("add")
@click.argument("model_id")
@click.argument("url")
@click.option("--version", "version", help="Default: the newest.")
@click.option(
    "--kind",
    type=click.Choice(BACKENDS),
    default="http",
    show_default=True,
    help="http: a static server with shards/SHA256 and manifests/SHA256 under URL. ipfs: a gateway that answers "
    "URL/ipfs/CID?format=raw.",
)
@signing.options
def add(model_id: str, url: str, version: str | None, kind: str, signer: Signer) -> None:
    """Name a place that serves MODEL_ID (an admin's transaction).

    Nodes trust it with nothing: every piece is proved by its SHA-256.
    """
    from contracts.calls import AddMirror
    from node.network.sources import web_source

    # Without a slash at its end, so that one place is on the ledger once.
    uri = web_source(kind, url).prefix
    if len(uri) > URI_BYTES_MAX:
        raise BadInput(f"the URL has {len(uri)} characters, the ledger takes {URI_BYTES_MAX}: shorten the path")
    if version is None:
        version = signer.rpc.call("getModelInfo", model_id=model_id)["version"]
    receipt = signer.send(AddMirror(ModelId(model_id), Version(version), kind, uri))
    signer.show(
        receipt, f"{uri} ({kind}) is a mirror of {model_id} version {version} from block {receipt['block_number']}"
    )


@mirror.command("remove")
@click.argument("model_id")
@click.argument("url")
@click.option("--version", "version", help="Default: the newest.")
@click.option("--kind", type=click.Choice(BACKENDS), help="Needed where both kinds have this URL.")
@signing.options
def remove(model_id: str, url: str, version: str | None, kind: str | None, signer: Signer) -> None:
    """Take a mirror of MODEL_ID off the ledger (an admin's transaction)."""
    from contracts.calls import RemoveMirror

    found = chosen(_mirrors(signer.rpc, model_id, version), url, kind)
    version = found["version"]
    receipt = signer.send(RemoveMirror(ModelId(model_id), Version(version), found["kind"], found["url"]))
    signer.show(
        receipt,
        f"{found['url']} ({found['kind']}) is no mirror of {model_id} version {version} from block "
        f"{receipt['block_number']}",
    )


@mirror.command("list")
@click.argument("model_id", required=False)
@click.option("--version", "version", help="Default: the newest; without MODEL_ID all.")
@common.rpc_options
@common.json_option
def list_mirrors(model_id: str | None, version: str | None, rpc_url: str, token: str | None, as_json: bool) -> None:
    """The mirrors of MODEL_ID, or of every model."""
    rpc = common.client(rpc_url, token)
    if model_id is not None:
        found = _mirrors(rpc, model_id, version)
    elif version is not None:
        raise BadInput("--version goes with a MODEL_ID: name the model, or leave both out")
    else:
        models = rpc.call("listModels")["models"]
        found = [row for model in models for row in _mirrors(rpc, model["model_id"], model["version"])]
    if as_json:
        common.show_json(found)
        return
    columns = ("model_id", "version", "kind", "url")
    common.show_table(("model", *columns[1:]), [[row[column] for column in columns] for row in found])


def _mirrors(rpc: RpcClient, model_id: str, version: str | None) -> list[dict[str, Any]]:
    """A mirror has every shard of its model, so those of the first shard are all."""
    given = {"model_id": model_id, "shard_index": 0} | ({"version": version} if version is not None else {})
    answer = rpc.call("getShardLocations", **given)
    return [
        {"model_id": answer["model_id"], "version": answer["version"], "kind": row["backend"], "url": row["uri"]}
        for row in answer["shards"][0]["locations"]
        if row["backend"] in BACKENDS
    ]


def chosen(mirrors: list[dict[str, Any]], url: str, kind: str | None) -> dict[str, Any]:
    """The mirror that is meant: what the ledger has may be no URL, and may end with slashes."""
    named = [row for row in mirrors if kind in {None, row["kind"]} and row["url"].rstrip("/") == url.rstrip("/")]
    exact = [row for row in named if row["url"] == url]
    found = exact or named
    if not found:
        raise NotFound(f"no such mirror is on the ledger: {url[:80]!r}; `aigen mirror list` shows those that are")
    if len(found) > 1:
        listed = ", ".join(f"{row['url']} ({row['kind']})" for row in found)
        raise Conflict(f"{len(found)} mirrors could be meant: {listed}; give --kind and the exact URL")
    return found[0]
