"""`aigen node`: the members."""

from __future__ import annotations

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
