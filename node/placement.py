"""Which nodes should hold a shard: rendezvous hashing over the members, so that every node computes the same answer.

Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM Transactions on Networking 6(1),
1998. Pure: no I/O, clock or randomness.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

from contracts.types import NodeId, ShardHash
from node.members import REPLICATING_ROLES, Member


def keepers(shard_hash: ShardHash, members: Iterable[Member], redundancy: int) -> tuple[NodeId, ...]:
    """The `redundancy` members with the highest scores for this shard, best first; fewer when there are fewer.

    A member that comes or goes moves only the shards it gains or loses.
    """
    candidates = [member.node_id for member in members if member.role in REPLICATING_ROLES]
    ranked = sorted(candidates, key=lambda node_id: sha256(shard_hash + node_id.encode()).digest(), reverse=True)
    return tuple(ranked[:redundancy])
