"""Who asked for which shard lately, to tell others who fetch it too. Pure; the caller brings the time."""

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from contracts.types import NodeId, ShardHash
from node.network.wire import OTHERS_MAX

REMEMBERED_S: Final = 120.0
SHARDS_MAX: Final = 256
NODES_PER_SHARD_MAX: Final = 64


@dataclass
class Askers:
    _by_shard: OrderedDict[ShardHash, OrderedDict[NodeId, float]] = field(default_factory=OrderedDict)
    """Oldest first, shards and nodes both."""

    def others(self, shard_hash: ShardHash, asking: NodeId, now: float) -> tuple[NodeId, ...]:
        """Note who asks; the newest of the others who did."""
        askers = self._by_shard.setdefault(shard_hash, OrderedDict())
        self._by_shard.move_to_end(shard_hash)
        askers[asking] = now
        askers.move_to_end(asking)
        if len(self._by_shard) > SHARDS_MAX:
            self._by_shard.popitem(last=False)
        if len(askers) > NODES_PER_SHARD_MAX:
            askers.popitem(last=False)
        fresh = (node_id for node_id, at in reversed(askers.items()) if node_id != asking and now - at < REMEMBERED_S)
        return tuple(itertools.islice(fresh, OTHERS_MAX))
