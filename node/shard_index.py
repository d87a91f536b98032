"""The shard index: who announced which shard of which model, and the mirrors. A pure fold.

A location is (shard, node_id, backend type, uri): members announce shards (`peer`, no uri: the member's endpoints say
where); mirrors hold a whole model (`http`, `ipfs`, no node_id).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from immutables import Map

from contracts import events
from contracts.types import ModelId, NodeId, Version


class Mirror(msgspec.Struct, frozen=True, order=True):
    backend: str
    uri: str


ModelKey = tuple[ModelId, Version]
ShardKey = tuple[ModelId, Version, int]


class ShardIndex(msgspec.Struct, frozen=True):
    holders: Map[ShardKey, frozenset[NodeId]] = Map()
    mirrors: Map[ModelKey, frozenset[Mirror]] = Map()

    def holders_of(self, key: ModelKey, shard_index: int) -> frozenset[NodeId]:
        return self.holders.get((*key, shard_index), frozenset())


def apply(state: ShardIndex, event: events.ContractEvent) -> ShardIndex:
    match event:
        case events.ShardsAnnounced():
            return _with_holders(state, event, lambda holders, node_id: holders | {node_id})
        case events.ShardsWithdrawn():
            return _with_holders(state, event, lambda holders, node_id: holders - {node_id})
        case events.NodeLeft():
            left = NodeId(event.node_id)
            holders = Map((key, nodes - {left}) for key, nodes in state.holders.items())
            return msgspec.structs.replace(state, holders=holders)
        case events.MirrorAdded():
            return _with_mirrors(state, event, lambda mirrors, mirror: mirrors | {mirror})
        case events.MirrorRemoved():
            return _with_mirrors(state, event, lambda mirrors, mirror: mirrors - {mirror})
        case _:
            return state


def _with_holders(
    state: ShardIndex,
    event: events.ShardsAnnounced | events.ShardsWithdrawn,
    change: Callable[[frozenset[NodeId], NodeId], frozenset[NodeId]],
) -> ShardIndex:
    key = ModelId(event.model_id), Version(event.version)
    with state.holders.mutate() as holders:
        for index in event.shard_indices:
            holders[*key, index] = change(state.holders_of(key, index), NodeId(event.node_id))
        return msgspec.structs.replace(state, holders=holders.finish())


def _with_mirrors(
    state: ShardIndex,
    event: events.MirrorAdded | events.MirrorRemoved,
    change: Callable[[frozenset[Mirror], Mirror], frozenset[Mirror]],
) -> ShardIndex:
    key = ModelId(event.model_id), Version(event.version)
    mirrors = change(state.mirrors.get(key, frozenset()), Mirror(event.backend, event.uri))
    return msgspec.structs.replace(state, mirrors=state.mirrors.set(key, mirrors))
