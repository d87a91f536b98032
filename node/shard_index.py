"""The shard index: who announced which shards of which model, and the mirrors. A pure fold.

A location is (shard, node_id, backend type, uri): members announce shards (`peer`, no uri: the member's endpoints say
where); mirrors hold a whole model (`http`, `ipfs`, no node_id).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

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
    """Kept by model and node, as announcements come; nothing is empty: who holds nothing has no entry."""

    announced: Map[ModelKey, Map[NodeId, frozenset[int]]] = Map()
    mirrors: Map[ModelKey, frozenset[Mirror]] = Map()

    def announced_by(self, node_id: NodeId, key: ModelKey) -> frozenset[int]:
        """The indices of the model's shards that a node holds."""
        return self.announced.get(key, _NO_NODES).get(node_id, _NO_SHARDS)

    def announces(self, node_id: NodeId) -> bool:
        """Whether a node has announced anything."""
        return any(node_id in nodes for nodes in self.announced.values())

    def holders_of(self, key: ModelKey, shard_index: int) -> frozenset[NodeId]:
        nodes = self.announced.get(key, _NO_NODES)
        return frozenset(node_id for node_id, shards in nodes.items() if shard_index in shards)

    @property
    def holders(self) -> Mapping[ShardKey, frozenset[NodeId]]:
        """The same by shard, made anew each time."""
        found: dict[ShardKey, set[NodeId]] = {}
        for (model_id, version), nodes in self.announced.items():
            for node_id, shards in nodes.items():
                for shard_index in shards:
                    found.setdefault((model_id, version, shard_index), set()).add(node_id)
        return {shard: frozenset(nodes) for shard, nodes in found.items()}


_NO_NODES: Map[NodeId, frozenset[int]] = Map()
_NO_SHARDS: frozenset[int] = frozenset()


def apply(state: ShardIndex, event: events.ContractEvent) -> ShardIndex:
    match event:
        case events.ShardsAnnounced():
            key, node_id = _key(event), NodeId(event.node_id)
            return _with_shards(state, key, node_id, state.announced_by(node_id, key).union(event.shard_indices))
        case events.ShardsWithdrawn():
            key, node_id = _key(event), NodeId(event.node_id)
            return _with_shards(state, key, node_id, state.announced_by(node_id, key).difference(event.shard_indices))
        case events.NodeLeft():
            node_id = NodeId(event.node_id)
            for key in [key for key, nodes in state.announced.items() if node_id in nodes]:
                state = _with_shards(state, key, node_id, _NO_SHARDS)
            return state
        case events.MirrorAdded():
            mirrors = state.mirrors.get(_key(event), frozenset()) | {Mirror(event.backend, event.uri)}
            return _with_mirrors(state, _key(event), mirrors)
        case events.MirrorRemoved():
            mirrors = state.mirrors.get(_key(event), frozenset()) - {Mirror(event.backend, event.uri)}
            return _with_mirrors(state, _key(event), mirrors)
        case _:
            return state


def _key(
    event: events.ShardsAnnounced | events.ShardsWithdrawn | events.MirrorAdded | events.MirrorRemoved,
) -> ModelKey:
    return ModelId(event.model_id), Version(event.version)


def _with_shards(state: ShardIndex, key: ModelKey, node_id: NodeId, shards: frozenset[int]) -> ShardIndex:
    nodes = state.announced.get(key, _NO_NODES)
    if shards:
        nodes = nodes.set(node_id, shards)
    elif node_id in nodes:
        nodes = nodes.delete(node_id)
    return ShardIndex(_set_or_delete(state.announced, key, nodes), state.mirrors)


def _with_mirrors(state: ShardIndex, key: ModelKey, mirrors: frozenset[Mirror]) -> ShardIndex:
    return ShardIndex(state.announced, _set_or_delete(state.mirrors, key, mirrors))


V = TypeVar("V", Map[NodeId, frozenset[int]], frozenset[Mirror])


def _set_or_delete(entries: Map[ModelKey, V], key: ModelKey, value: V) -> Map[ModelKey, V]:
    if value:
        return entries.set(key, value)
    return entries.delete(key) if key in entries else entries
