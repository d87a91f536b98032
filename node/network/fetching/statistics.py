"""What the fetcher says of itself: frozen values, JSON as they stand. Sizes in bytes, rates in bytes a second."""

from typing import Literal

import msgspec

from contracts.types import ShardHash

SourceState = Literal["active", "idle", "failed", "dropped"]
"""`failed`: at the last attempt; it is asked again. `dropped`: it served something wrong, and is not for an hour."""


class SourceInfo(msgspec.Struct, frozen=True):
    """What this node has seen of a source since it started; `trouble` is the last there was, in one line."""

    source: str
    state: SourceState
    pieces: int
    bytes_fetched: int
    rate: int
    failures: int
    trouble: str


class FlightInfo(msgspec.Struct, frozen=True):
    """A shard on its way in. `bytes_done` are proved and on the disk; `time_left_s` is None while nothing comes."""

    shard_hash: ShardHash
    bytes_done: int
    bytes_total: int
    rate: int
    time_left_s: int | None
    connections: int


class FetcherStatistics(msgspec.Struct, frozen=True):
    """The fetcher at one moment; totals since it was made. `bytes_saved` did not come over the wire, because pieces
    came packed."""

    flights: tuple[FlightInfo, ...] = ()
    shards_fetched: int = 0
    manifests_fetched: int = 0
    pieces_fetched: int = 0
    bytes_fetched: int = 0
    bytes_saved: int = 0
    rate: int = 0
    source_failures: int = 0
    sources: tuple[SourceInfo, ...] = ()


def time_left_s(bytes_left: int, rate: float) -> int | None:
    """At this rate, in whole seconds; None while nothing moves."""
    return round(bytes_left / rate) if rate else None
