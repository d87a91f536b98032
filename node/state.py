"""Everything a node knows from the ledger: the four projections folded together. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from contracts.events import ContractEvent
from contracts.types import TransactionHash
from ledger.record import BlockRecord
from node import members, registry, shard_index, tiers
from node.members import Members
from node.registry import Registry
from node.shard_index import ShardIndex
from node.tiers import Tiers


class State(msgspec.Struct, frozen=True):
    registry: Registry = Registry()
    tiers: Tiers = Tiers()
    members: Members = Members()
    shards: ShardIndex = ShardIndex()


def apply(state: State, event: ContractEvent, transaction_hash: TransactionHash) -> State:
    return State(
        registry=registry.apply(state.registry, event),
        tiers=tiers.apply(state.tiers, event, transaction_hash),
        members=members.apply(state.members, event),
        shards=shard_index.apply(state.shards, event),
    )


def fold(state: State, records: Iterable[BlockRecord]) -> State:
    """The state after the blocks of `records`, which continue where `state` ends."""
    for record in records:
        for transaction in record.transactions:
            for event in transaction.events:
                state = apply(state, event, TransactionHash(transaction.hash))
    return state
