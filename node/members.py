"""The members: which nodes belong to the network, whose they are and where they answer. A pure fold."""

from __future__ import annotations

import msgspec
from immutables import Map

from contracts import events
from contracts.types import Address, NodeId

REPLICATING_ROLES = frozenset({"worker", "storage"})
"""Roles that hold shards unasked; a gateway holds nothing until it is asked to load."""


class Member(msgspec.Struct, frozen=True):
    node_id: NodeId
    operator: Address
    role: str
    endpoints: tuple[str, ...]


class Members(msgspec.Struct, frozen=True):
    members: Map[NodeId, Member] = Map()


def apply(state: Members, event: events.ContractEvent) -> Members:
    match event:
        case events.NodeJoined():
            member = Member(NodeId(event.node_id), event.operator, event.role, tuple(event.endpoints))
            return Members(state.members.set(member.node_id, member))
        case events.NodeLeft():
            return Members(state.members.delete(NodeId(event.node_id)))
        case _:
            return state
