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
    seen_at: int
    """The time of the block with its newest lease."""
    room: int | None = None
    """Bytes of shards that it would take beyond those it holds; None until it has said."""

    def is_live(self, now: int, lease_s: int) -> bool:
        return now < self.seen_at + lease_s


class Members(msgspec.Struct, frozen=True):
    members: Map[NodeId, Member] = Map()


def apply(state: Members, event: events.ContractEvent, time: int) -> Members:
    """The state after one event of a block of this time."""
    match event:
        case events.NodeJoined():
            member = Member(NodeId(event.node_id), event.operator, event.role, tuple(event.endpoints), time)
            if (before := state.members.get(member.node_id)) is not None:
                member = msgspec.structs.replace(member, room=before.room)
            return Members(state.members.set(member.node_id, member))
        case events.LeaseRenewed():
            member = state.members[NodeId(event.node_id)]
            renewed = msgspec.structs.replace(member, seen_at=time, room=event.room)
            return Members(state.members.set(member.node_id, renewed))
        case events.NodeLeft():
            return Members(state.members.delete(NodeId(event.node_id)))
        case _:
            return state
