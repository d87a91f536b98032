"""`aigen node`: the members."""

from __future__ import annotations

import click

from contracts.types import NodeId
from node.cli import common, signing
from node.cli.signing import Signer


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


@node.command("remove")
@click.argument("node_id")
@signing.options
def remove(node_id: str, signer: Signer) -> None:
    """Take a node out of the network (its operator's transaction, or an admin's).

    What it announced ends with that block, and no member serves it a shard from then on. It joins again at its next
    start as long as its operator is enrolled: `aigen account expel` keeps it out.
    """
    from contracts.calls import LeaveNode
    from node.network.identity import public_key_of_node_id

    public_key_of_node_id(node_id)  # BadInput for what is no node_id, before a key is opened
    receipt = signer.send(LeaveNode(NodeId(node_id)))
    signer.show(receipt, f"{node_id} is no member from block {receipt['block_number']}")
