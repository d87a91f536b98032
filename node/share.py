"""What this node should hold, by the ledger: its share of every model by rendezvous hashing, and what it announced.

Every node computes the same of the same state (but for the moment when a silent one counts as gone). Knows no store and
fetches nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from contracts.errors import BadInput
from contracts.types import NodeId, ShardHash
from node.leases import Leases
from node.members import REPLICATING_ROLES, Member
from node.network.addresses import parse_endpoints
from node.placement import Candidate, keepers
from node.registry import Model
from node.state import State

_NOBODY: frozenset[NodeId] = frozenset()


@dataclass
class Share:
    """One node's. `moment` is this process's clock."""

    node_id: NodeId
    redundancy: int
    leases: Leases
    shard_size: int
    """Of this network's models: who has room for less is given nothing new."""
    _made_of: tuple[Any, ...] = (None, None, None)
    _wanted: list[tuple[Model, int]] = field(default_factory=list)
    """The last answer, with what it was made of: most blocks change none of that."""
    _candidates: tuple[Candidate, ...] = ()
    _full: frozenset[NodeId] = frozenset()
    _short_made_of: tuple[Any, ...] = (None, None)
    _short_live: frozenset[NodeId] = frozenset()
    _short: tuple[tuple[Model, int], ...] = ()
    _keepers: dict[tuple[ShardHash, frozenset[NodeId]], tuple[NodeId, ...]] = field(default_factory=dict)
    """What was computed for these candidates."""

    def wanted(self, state: State, moment: float) -> list[tuple[Model, int]]:
        """Every shard that this node should hold unasked."""
        live = self.live(state, moment)
        self._note_candidates(state, live)
        made_of = (state.registry, state.shards, self._candidates)
        if not all(map(operator.is_, made_of, self._made_of)):
            self._made_of = made_of
            self._wanted = [
                (model, index)
                for model in state.registry.models.values()
                if not model.retired
                for index in range(model.shard_count)
                if self.node_id in state.shards.holders_of(model.key, index)
                or self.node_id in self._keepers_of(state, model, index)
            ]
        return self._wanted

    def live(self, state: State, moment: float) -> frozenset[NodeId]:
        """The members that are there; this node is, whatever the ledger has of it."""
        found = self.leases.live(state, moment)
        return found | {self.node_id} if self.node_id in state.members.members else found

    def short(self, state: State, moment: float) -> tuple[tuple[Model, int], ...]:
        """The shards of the network with fewer copies on nodes that are there than there should be."""
        live = self.live(state, moment)
        made_of = (state.registry, state.shards)
        if live != self._short_live or not all(map(operator.is_, made_of, self._short_made_of)):
            holders = state.shards.holders
            self._short_live, self._short_made_of = live, made_of
            self._short = tuple(
                (model, index)
                for model in state.registry.models.values()
                if not model.retired
                for index in range(model.shard_count)
                if len(holders.get((*model.key, index), _NOBODY) & live) < self.redundancy
            )
        return self._short

    def spare(
        self,
        state: State,
        hashes: Set[ShardHash],
        moment: float,
        keeps: Callable[[Model], bool] = lambda model: False,
    ) -> set[ShardHash]:
        """Those of these shards that this node may give up: in every model that has one others should hold it, and
        enough of them do. None of a model that `keeps` names, nor one that no model has."""
        live = self.live(state, moment)
        self._note_candidates(state, live)
        known, needed = set[ShardHash](), set[ShardHash]()
        for model in state.registry.models.values():
            for index, shard_hash in enumerate(model.shard_hashes):
                if shard_hash in hashes:
                    known.add(shard_hash)
                    if keeps(model) or self._is_needed(state, model, index, live):
                        needed.add(shard_hash)
        return known - needed

    def _is_needed(self, state: State, model: Model, index: int, live: frozenset[NodeId]) -> bool:
        """Whether a shard here is one that this node should hold, or one of too few copies."""
        if model.retired:
            return False
        others = (state.shards.holders_of(model.key, index) & live) - {self.node_id}
        return len(others) < self.redundancy or self.node_id in self._keepers_of(state, model, index)

    def _note_candidates(self, state: State, live: frozenset[NodeId]) -> None:
        found = tuple(
            self._candidate(member)
            for _, member in sorted(state.members.members.items())
            if member.node_id in live and member.role in REPLICATING_ROLES
        )
        if found != self._candidates:
            self._candidates = found
            self._full = frozenset(candidate.node_id for candidate in found if not candidate.has_room)
            self._keepers.clear()

    def _candidate(self, member: Member) -> Candidate:
        host = _host(member.node_id, member.endpoints)
        return Candidate(member.node_id, member.operator, host, self.has_room(member.room))

    def has_room(self, room: int | None) -> bool:
        """Whether a node with so many bytes of room, or one that has not said, takes another shard."""
        return room is None or room >= self.shard_size

    def _keepers_of(self, state: State, model: Model, index: int) -> tuple[NodeId, ...]:
        """Whoever holds the shard needs no room for it."""
        shard_hash, full = model.shard_hashes[index], self._full
        if full:
            full -= state.shards.holders_of(model.key, index)
        if (shard_hash, full) not in self._keepers:
            candidates = [candidate for candidate in self._candidates if candidate.node_id not in full]
            self._keepers[shard_hash, full] = keepers(shard_hash, candidates, self.redundancy)
        return self._keepers[shard_hash, full]


@lru_cache(maxsize=16_384)
def _host(node_id: NodeId, endpoints: tuple[str, ...]) -> str:
    """Where a member says that it serves pieces; empty when it does not say, or nonsense."""
    try:
        addresses = parse_endpoints(node_id, endpoints).data
    except BadInput:
        return ""
    return addresses[0].host if addresses else ""
