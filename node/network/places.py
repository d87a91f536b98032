"""Who has a place at the data plane's server: whoever has not shown yet who it is, and nodes at work. Pure.

Knows no sockets; the caller locks.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from contracts.errors import Busy
from contracts.types import PIECE_SIZE, NodeId
from node.network.wire import DataLimits

PLACES_PER_STRANGER: Final = 4
"""One in so many may be a stranger's, a node's that is no member. Keys cost nothing: all strangers count together."""


@dataclass
class Places:
    limits: DataLimits
    bytes_per_s: int
    """The limit on what goes out; 0: none."""
    _handshakes: Counter[str] = field(default_factory=Counter)
    """By address."""
    _connections: Counter[NodeId] = field(default_factory=Counter)
    _strangers: Counter[NodeId] = field(default_factory=Counter)
    """Of these, those of nodes that were no members when they came."""

    @property
    def handshakes(self) -> int:
        return self._handshakes.total()

    @property
    def connections(self) -> int:
        return self._connections.total()

    def enter_handshake(self, address: str) -> bool:
        """Whether there is room for one more connection that has not shown yet who it is; then it has it."""
        limits = self.limits
        full = (
            self.handshakes >= limits.handshakes_max or self._handshakes[address] >= limits.handshakes_per_address_max
        )
        if not full:
            self._handshakes[address] += 1
        return not full

    def leave_handshake(self, address: str) -> None:
        self._handshakes -= Counter((address,))

    def take(self, node_id: NodeId, is_member: bool = True) -> None:
        """A place for a node's connection. Raises Busy."""
        mine = self._connections[node_id]
        if mine >= self.limits.connections_per_peer_max:
            raise Busy(f"{node_id} has {mine} connections already, the most one node may have")
        if self.connections >= self.most:
            raise Busy(f"{self.most} connections are open, the most this node serves")
        if not is_member:
            if self._strangers.total() >= self.strangers_most:
                raise Busy(f"{self.strangers_most} connections of strangers are open, the most this node serves")
            self._strangers[node_id] += 1
        self._connections[node_id] = mine + 1

    def leave(self, node_id: NodeId, is_member: bool = True) -> None:
        self._connections -= Counter((node_id,))
        if not is_member:
            self._strangers -= Counter((node_id,))

    @property
    def strangers_most(self) -> int:
        """Of a few places one, if there is more than one."""
        return (self.most + 2) // PLACES_PER_STRANGER

    @property
    def most(self) -> int:
        """With a limit on what goes out, no more than still get their piece in half the time they wait for it."""
        most = self.limits.connections_max
        in_time = int(self.bytes_per_s * self.limits.piece_s / 2 / PIECE_SIZE)
        return max(1, min(most, in_time)) if self.bytes_per_s else most
