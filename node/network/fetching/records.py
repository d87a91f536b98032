"""What is remembered of each source from one shard to the next: what it brought, how fast, and how it failed. Pure.

A source that broke the protocol or served wrong bytes is not asked again for an hour; one that was merely busy, slow or
away is asked after those that were not.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from contracts.errors import BadPeer, Busy
from node.network.fetching.meter import Meter
from node.network.fetching.statistics import SourceInfo, SourceState
from node.network.sources import Source

DROPPED_S: Final = 3600.0
"""How long a source that served something wrong is not asked again."""
SOURCES_REMEMBERED_MAX: Final = 4096
SOURCES_SHOWN_MAX: Final = 64
"""In statistics: those at work first, then those with the newest trouble."""


@dataclass
class _Record:
    lanes: int = 0
    pieces: int = 0
    bytes_fetched: int = 0
    failures: int = 0
    failures_since_success: int = 0
    dropped_until: float = 0.0
    trouble: str = ""
    meter: Meter = field(default_factory=Meter)


@dataclass
class Records:
    rng: random.Random
    _records: dict[Source, _Record] = field(default_factory=dict)
    failures: int = 0
    """Of all sources, ever."""
    bytes_saved: int = 0
    """Of all sources, ever: what did not come over the wire because pieces came packed."""

    def opened(self, source: Source) -> None:
        """A connection to it is under way."""
        self._record(source).lanes += 1

    def closed(self, source: Source) -> None:
        self._record(source).lanes -= 1

    def brought(self, source: Source, size_bytes: int, now: float, saved_bytes: int = 0) -> None:
        """A proved piece came from it, packed so that some of its bytes did not go over the wire."""
        self.bytes_saved += saved_bytes
        record = self._record(source)
        record.pieces += 1
        record.bytes_fetched += size_bytes
        record.failures_since_success = 0
        record.meter.add(size_bytes, now)

    def failed(self, source: Source, error: BadPeer | Busy, now: float) -> None:
        record = self._record(source)
        record.failures += 1
        record.failures_since_success += 1
        record.trouble = str(error)
        self.failures += 1
        if isinstance(error, BadPeer):
            record.dropped_until = now + DROPPED_S

    def slow(self, source: Source, trouble: str) -> None:
        """Somebody else had to be asked for what it was asked for."""
        self._record(source).trouble = trouble

    def dropped(self, source: Source, now: float) -> str:
        """Why it is not asked for now; empty when it may be."""
        record = self._records.get(source)
        return record.trouble if record is not None and record.dropped_until > now else ""

    def in_order(self, sources: Iterable[Source]) -> list[Source]:
        """The sources to ask: those that failed least first, in random order so that a crowd spreads over them."""
        found = list(dict.fromkeys(sources))
        self.rng.shuffle(found)
        return sorted(found, key=self._failures_of)

    def _failures_of(self, source: Source) -> int:
        record = self._records.get(source)
        return record.failures_since_success if record else 0

    def infos(self, now: float) -> tuple[SourceInfo, ...]:
        return tuple(
            SourceInfo(
                str(source),
                _state(record, now),
                record.pieces,
                record.bytes_fetched,
                round(record.meter.rate(now)) if record.lanes else 0,
                record.failures,
                record.trouble,
            )
            for source, record in self._shown()
        )

    def _shown(self) -> list[tuple[Source, _Record]]:
        newest_first = reversed(self._records.items())
        ranked = sorted(newest_first, key=lambda item: (not item[1].lanes, not item[1].trouble))
        return ranked[:SOURCES_SHOWN_MAX]

    def _record(self, source: Source) -> _Record:
        if source not in self._records and len(self._records) >= SOURCES_REMEMBERED_MAX:
            del self._records[next(known for known, record in self._records.items() if not record.lanes)]
        return self._records.setdefault(source, _Record())


def _state(record: _Record, now: float) -> SourceState:
    if record.dropped_until > now:
        return "dropped"
    if record.lanes:
        return "active"
    return "failed" if record.failures_since_success else "idle"
