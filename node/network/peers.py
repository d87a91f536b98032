"""Whom to dial and when: addresses, back-off and bans, by node. Pure bookkeeping; the caller brings the time.

An unreachable node is tried again after a growing pause, for ever: it may come back. A node that broke the protocol is
also refused when it dials us, for a time that doubles with each offence and is forgotten after a day without one.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from contracts.types import NodeId
from node.network.addresses import ControlAddress

RETRY_S_MIN: Final = 0.25
RETRY_S_MAX: Final = 30.0
BAN_S_MIN: Final = 60.0
BAN_S_MAX: Final = 3600.0
OFFENCES_FORGOTTEN_S: Final = 86_400.0
RECORDS_MAX: Final = 4096
ADDRESSES_PER_PEER_MAX: Final = 8


@dataclass
class _Record:
    addresses: tuple[ControlAddress, ...] = ()
    failures: int = 0
    due: float = 0.0
    offences: int = 0
    banned_until: float = 0.0
    reason: str = ""


@dataclass
class PeerBook:
    """What is known about peers that are not connected."""

    own: NodeId
    _records: dict[NodeId, _Record] = field(default_factory=dict)
    _random: random.Random = field(default_factory=random.Random)

    def set_targets(self, addresses: Iterable[ControlAddress]) -> None:
        """The nodes to stay connected to; one that is no longer named keeps its record but is not dialled."""
        targets: dict[NodeId, list[ControlAddress]] = {}
        for address in addresses:
            known = targets.setdefault(address.node_id, [])
            if address.node_id != self.own and address not in known and len(known) < ADDRESSES_PER_PEER_MAX:
                known.append(address)
        for node_id, record in self._records.items():
            record.addresses = tuple(targets.get(node_id, ()))
        for node_id, known in targets.items():
            if known and node_id not in self._records and len(self._records) < RECORDS_MAX:
                self._records[node_id] = _Record(tuple(known))

    def due(self, now: float) -> list[tuple[NodeId, tuple[ControlAddress, ...]]]:
        """The targets whose turn it is, the longest waiting first."""
        ready = [(r.due, n) for n, r in self._records.items() if r.addresses and max(r.due, r.banned_until) <= now]
        return [(node_id, self._records[node_id].addresses) for _, node_id in sorted(ready)]

    def next_due(self, now: float) -> float:
        """Seconds until the next target's turn; infinite without any that waits."""
        waiting = [max(r.due, r.banned_until) for r in self._records.values() if r.addresses]
        return min((when - now for when in waiting if when > now), default=float("inf"))

    def is_target(self, node_id: NodeId) -> bool:
        record = self._records.get(node_id)
        return record is not None and bool(record.addresses)

    def is_banned(self, node_id: NodeId, now: float) -> bool:
        record = self._records.get(node_id)
        return record is not None and record.banned_until > now

    def reason(self, node_id: NodeId) -> str:
        """Why the last attempt or connection ended; empty when it did not."""
        record = self._records.get(node_id)
        return record.reason if record else ""

    def reasons(self) -> dict[NodeId, str]:
        return {node_id: record.reason for node_id, record in self._records.items() if record.reason}

    def succeeded(self, node_id: NodeId) -> None:
        """The node answered as one of this network."""
        record = self._records.get(node_id)
        if record is not None:
            record.failures, record.due, record.reason = 0, 0.0, ""

    def failed(self, node_id: NodeId, now: float, reason: str) -> None:
        """Not reached, or the connection ended: try again after a pause, with jitter so that nodes do not keep step."""
        record = self._record(node_id, now)
        pause = min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(record.failures, 16))
        record.due = now + pause * self._random.uniform(0.75, 1.25)
        record.failures += 1
        record.reason = reason

    def offended(self, node_id: NodeId, now: float, reason: str) -> None:
        """The node broke the protocol: neither dial nor accept it for a while."""
        record = self._record(node_id, now)
        if now - record.banned_until > OFFENCES_FORGOTTEN_S:
            record.offences = 0
        record.banned_until = now + min(BAN_S_MAX, BAN_S_MIN * 2 ** min(record.offences, 16))
        record.offences += 1
        record.reason = reason

    def _record(self, node_id: NodeId, now: float) -> _Record:
        """The record of a node; room for a new one is made by forgetting one that is neither dialled nor banned."""
        if node_id not in self._records and len(self._records) >= RECORDS_MAX:
            idle = (n for n, r in self._records.items() if not r.addresses and r.banned_until <= now)
            others = (n for n, r in self._records.items() if not r.addresses)
            del self._records[next(idle, None) or next(others, None) or next(iter(self._records))]
        return self._records.setdefault(node_id, _Record())
