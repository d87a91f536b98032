"""Who asked for which shard lately, and for which of its pieces, to tell others who fetch it too. Pure; the caller
brings the time."""

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
class _Asked:
    """What is remembered of one shard."""

    nodes: OrderedDict[NodeId, float] = field(default_factory=OrderedDict)
    """Oldest first."""
    given: int = 0
    """Bit i is piece i."""


@dataclass
class Askers:
    _by_shard: OrderedDict[ShardHash, _Asked] = field(default_factory=OrderedDict)
    """Oldest first."""

    def others(self, shard_hash: ShardHash, asking: NodeId, now: float) -> tuple[NodeId, ...]:
        """Note who asks; the newest of the others who did."""
        nodes = self._asked(shard_hash).nodes
        nodes[asking] = now
        nodes.move_to_end(asking)
        if len(nodes) > NODES_PER_SHARD_MAX:
            nodes.popitem(last=False)
        fresh = (node_id for node_id, at in reversed(nodes.items()) if node_id != asking and now - at < REMEMBERED_S)
        return tuple(itertools.islice(fresh, OTHERS_MAX))

    def gave(self, shard_hash: ShardHash, pieces: range, piece_count: int) -> None:
        """Somebody asked for these pieces, and is about to have them. Once every piece was given, a new round begins:
        what all were given of says nothing."""
        asked, everything = self._asked(shard_hash), (1 << piece_count) - 1
        stop = min(pieces.stop, piece_count)
        if pieces.start < stop:
            asked.given |= (1 << stop) - (1 << pieces.start)
        if asked.given == everything:
            asked.given = 0

    def given(self, shard_hash: ShardHash) -> bytes:
        """The pieces that somebody was given in this round: bit i % 8 of byte i // 8."""
        given = self._asked(shard_hash).given
        return given.to_bytes((given.bit_length() + 7) // 8, "little")

    def _asked(self, shard_hash: ShardHash) -> _Asked:
        asked = self._by_shard.setdefault(shard_hash, _Asked())
        self._by_shard.move_to_end(shard_hash)
        if len(self._by_shard) > SHARDS_MAX:
            self._by_shard.popitem(last=False)
        return asked
