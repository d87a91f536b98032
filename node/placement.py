"""Which nodes should hold a shard: rendezvous hashing over those that are there, so that all compute the same answer.

Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM Transactions on Networking 6(1),
1998. Copies lie apart, on nodes of different operators and hosts, as far as there is a choice. Pure: no I/O, clock or
randomness.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from contracts.types import Address, NodeId, ShardHash


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that may be asked to hold a shard."""

    node_id: NodeId
    operator: Address
    host: str = ""
    """Where it says that it is reached; empty when it does not say."""
    has_room: bool = True
    """For a shard that it does not hold yet."""

    def shares_with(self, others: Iterable[Candidate]) -> int:
        """How much would be lost together: 1 for an operator that one of the others has too, 1 for a host."""
        others = tuple(others)
        same_operator = any(self.operator == other.operator for other in others)
        same_host = self.host != "" and any(self.host == other.host for other in others)
        return same_operator + same_host


def keepers(shard_hash: ShardHash, candidates: Iterable[Candidate], redundancy: int) -> tuple[NodeId, ...]:
    """The `redundancy` nodes that should hold this shard, best first; fewer when there are fewer.

    The one with the highest score, then again and again the one that shares least with those before it, by score among
    equals. While all share alike, one that comes or goes moves only the shards it gains or loses.
    """
    left = sorted(candidates, key=lambda node: sha256(shard_hash + node.node_id.encode()).digest(), reverse=True)
    chosen: list[Candidate] = []
    while left and len(chosen) < redundancy:
        # Usually the first one already; among equals the first.
        apart = next((node for node in left if not node.shares_with(chosen)), None)
        best = apart or min(left, key=lambda node: node.shares_with(chosen))
        left.remove(best)
        chosen.append(best)
    return tuple(node.node_id for node in chosen)
