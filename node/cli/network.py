"""`aigen node` and `aigen shard`: the members, and who holds which shard."""

from __future__ import annotations

from typing import Any

import click

from node.cli import common


@click.group()
def node() -> None:
    """The members of the network."""


@node.command("list")
@common.rpc_options
@common.json_option
def list_nodes(rpc_url: str, token: str | None, as_json: bool) -> None:
    """Every node that joined."""
    members = common.client(rpc_url, token).call("listNodes")
    if as_json:
        common.show_json(members)
        return
    rows = [
        (
            row["node_id"],
            row["role"],
            row["shards_announced"],
            common.short(row["operator"]),
            next(iter(row["endpoints"]), None),
            "yes" if row["live"] else "silent",
        )
        for row in members
    ]
    common.show_table(("node", "role", "shards", "operator", "endpoint", "there"), rows)


@click.group()
def shard() -> None:
    """Shards: who holds them, whether they are whole."""


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
            ", ".join(common.short(location["node_id"] or location["uri"]) for location in row["locations"]),
            row["shard_hash"],
        )
        for row in answer["shards"]
    ]
    common.show_table(("shard", "size", "copies", "health", "holders", "SHA-256"), rows)


def _health(row: dict[str, Any], redundancy: int) -> str:
    """What the network has of a shard; and which of its holders have not been heard of for a lease."""
    if row["copies"] >= redundancy:
        found = "good"
    elif row["copies"]:
        found = f"{redundancy - row['copies']} short"
    else:
        found = "only mirrors" if row["locations"] else "nobody has it"
    return f"{found}, {len(row['silent'])} silent" if row["silent"] else found


@shard.command("free")
@click.argument("size", type=click.IntRange(min=1))
@common.rpc_options
@common.json_option
def free(size: int, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Give up shards until SIZE bytes are free: only those that enough other nodes hold, and that none of these rules
    assigns to this one. Exit status 1 if that is too little."""
    freed: list[dict[str, Any]] = common.client(rpc_url, token, timeout_s=None).call("freeSpace", size=size)
    total = sum(row["size"] for row in freed)
    if as_json:
        common.show_json(freed)
    else:
        rows = [(row["model_id"], row["shard_index"], common.size(row["size"]), row["shard_hash"]) for row in freed]
        common.show_table(("model", "shard", "size", "SHA-256"), rows)
        click.echo(f"\n{common.size(total)} freed of {common.size(size)} asked for")
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
