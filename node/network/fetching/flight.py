"""One shard on its way in: lanes to many sources at once, until it is whole or nobody gives more.

Owns which sources have a connection now, and when one that failed is tried again. What to ask of whom is the queue's;
what counts as a piece is the store's. The queue is touched in trio's thread only; a lane's worker thread reports
what arrived.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from contracts.errors import BadPeer, Busy, Refused
from contracts.types import NodeId
from node.network.fetching import queue
from node.network.fetching.connections import Connection, Holding, Lacks
from node.network.fetching.means import Means
from node.network.fetching.meter import Meter
from node.network.fetching.queue import Lane, PieceQueue, Run
from node.network.fetching.statistics import FlightInfo, time_left_s
from node.network.pace import Share
from node.network.sources import PeerSource, Source
from node.network.wire import NotThere, piece_bytes
from node.storage.manifest import ManifestShard
from node.storage.partial import PartialShard

log = logging.getLogger(__name__)

LANES_WANTED: Final = 2
"""With fewer sources at hand than this, each gets a second connection: hashing then keeps two cores busy."""
SOURCES_KNOWN_MAX: Final = 64
"""Sources of one shard, those heard of from others included."""
REFUSALS_MAX: Final = 8
"""Pieces that a source may be taken to have and not give, in one connection."""
RETRY_S_MIN: Final = 0.5
RETRY_S_MAX: Final = 30.0
POLL_S: Final = 0.5
"""How often a source that has only a part of the shard is asked what it has by now."""
MISSES_COUNTED_MAX: Final = 3
"""One that has nothing yet is asked again after POLL_S, then twice that, doubled so many times."""
HEAR_S: Final = 2.0
"""How often one that has all of it is asked who else fetches it."""
FRESH_S: Final = 0.1
"""The same while others do: before nearly every run, so that no two nodes ask it for the same piece."""
WATCH_S: Final = 0.5
"""How often a lane without work looks whether another has gone silent."""
STARVED_S: Final = 10.0
"""A lane that had no work for this long ends."""


@dataclass
class _Candidate:
    """A source of this shard."""

    lanes: int = 0
    is_hearsay: bool = False
    """Another source named it: it need not have anything yet."""
    is_proved: bool = False
    """It has brought a piece."""
    failures: int = 0
    """In a row, without a piece between them."""
    misses: int = 0
    """How often it had nothing yet."""
    due: float = 0.0
    is_spent: bool = False
    """Its last connection brought nothing; it is tried again in a while if others keep the flight going."""


@dataclass(eq=False)
class Flight:
    shard: ManifestShard
    partial: PartialShard
    means: Means
    on_bytes: Callable[[int], None]
    """Called with the bytes that are here now, whenever more came."""
    reasons: list[str] = field(default_factory=list)
    """Why sources failed, each said once."""

    def __post_init__(self) -> None:
        self._queue = PieceQueue.of(self.shard.piece_count, self.partial.missing(), self.means.rng)
        self._candidates: dict[Source, _Candidate] = {}
        self._sources: dict[Lane, Source] = {}
        self._meter = Meter()
        self._meter.start(trio.current_time())
        self._bytes_here = self.shard.size - self.partial.missing_bytes
        self._lanes = 0
        self._located: set[NodeId] = set()
        """Those who fetch this too and were added: they are named at every turn."""
        self._has_asked_around = False
        self._heard = trio.current_time()
        """When a piece came last, or the flight began."""
        self._at_work: list[_Brought] = []
        self._changed = trio.Event()
        self._freed = trio.Event()
        self._failure: Refused | None = None
        self.coming = b""
        """The pieces that sources were asked for, as bits; read by other threads."""

    def statistics(self) -> FlightInfo:
        rate = self._meter.rate(trio.current_time())
        left = time_left_s(self.shard.size - self._bytes_here, rate)
        return FlightInfo(self.shard.sha256, self._bytes_here, self.shard.size, round(rate), left, self._lanes)

    def add(self, sources: Iterable[Source], is_hearsay: bool = False) -> None:
        """Sources to ask; one that is dropped, or this node itself, is not."""
        now = trio.current_time()
        for source in self.means.records.in_order(sources):
            if isinstance(source, PeerSource) and source.node_id == self.means.identity.node_id:
                continue
            if trouble := self.means.records.dropped(source, now):
                self._add_reason(f"{source} is not asked for now: {trouble}")
            elif source not in self._candidates and len(self._candidates) < SOURCES_KNOWN_MAX:
                self._candidates[source] = _Candidate(is_hearsay=is_hearsay)
                self._wake()

    def hear_of(self, others: Iterable[NodeId]) -> None:
        """Other nodes fetch this shard: what they have may be of use here, and the other way round."""
        if len(self._candidates) >= SOURCES_KNOWN_MAX:
            return
        for node_id in others:
            if node_id not in self._located and (found := self.means.locate(node_id)):
                self._located.add(node_id)
                self._queue.is_shared = True
                self.add(found, is_hearsay=True)

    async def run(self) -> None:
        """Return once every piece is here. Raises Busy when nobody gives more, and what our own disk raised."""
        self.on_bytes(self._bytes_here)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hash_behind, nursery.cancel_scope)
            while self._queue.missing:
                next_due = self._start_lanes(nursery)
                if not self._lanes and self._ask_around():
                    continue
                if not (self._lanes or self._is_hopeful()):
                    break
                await self._wait(next_due)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        if missing := self._queue.missing.bit_count():
            raise Busy(
                f"Shard {self.shard.sha256.hex()} misses {missing:,} of {self.shard.piece_count:,} pieces, "
                f"and no source gives more: {'; '.join(self.reasons) or 'nobody is known to have it'}"
            )

    async def _hash_behind(self, scope: trio.CancelScope) -> None:
        """The shard's own hash, in a thread that follows the pieces."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_following_at_end)
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(self.partial.follow)
                except Refused as error:
                    self._fail(error, scope)
            nursery.cancel_scope.cancel()

    async def _stop_following_at_end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.partial.stop_following()

    def _fail(self, error: Refused, scope: trio.CancelScope) -> None:
        """Our own trouble, not a source's: the flight ends with it."""
        self._failure = self._failure or error
        scope.cancel()

    # Which sources have a connection

    def _start_lanes(self, nursery: trio.Nursery) -> float:
        """Start what there is room for; when the next source is due to be tried again."""
        now, next_due = trio.current_time(), float("inf")
        lanes_max = self.means.lanes_max + min(self.means.lanes_max, self._count_silent(now))
        at_hand = sum(bool(candidate.lanes) or not candidate.is_spent for candidate in self._candidates.values())
        for source, candidate in self._candidates.items():
            if self._lanes >= lanes_max:
                return now + WATCH_S
            second = candidate.lanes == 1 and candidate.is_proved and at_hand < LANES_WANTED
            if candidate.lanes and not second:
                continue
            if candidate.due <= now or not (self._lanes or candidate.is_spent):
                candidate.lanes += 1
                self._lanes += 1
                nursery.start_soon(self._run_lane, source, candidate, nursery.cancel_scope)
            else:
                next_due = min(next_due, candidate.due)
        return next_due

    def _ask_around(self) -> bool:
        """Once for each flight; whether there is somebody new to ask. The holders may be full while many fetch the
        same, and each of these knows others."""
        if self._has_asked_around:
            return False
        self._has_asked_around = True
        known = len(self._candidates)
        self.add(self.means.anybody(), is_hearsay=True)
        return len(self._candidates) > known

    def _is_hopeful(self) -> bool:
        """Whether to wait though nobody gives anything: others fetch this shard too, and not for long nothing came."""
        return bool(self._located) and trio.current_time() - self._heard < STARVED_S

    def _count_silent(self, now: float) -> int:
        """Connections that bring nothing: others may be made beside them, or a few dead sources would keep them out."""
        return sum(now - brought.heard >= queue.SILENT_S for brought in self._at_work)

    async def _run_lane(self, source: Source, candidate: _Candidate, scope: trio.CancelScope) -> None:
        """One connection from beginning to end."""
        brought = _Brought(trio.current_time())
        self._at_work.append(brought)
        self.means.records.opened(source)
        try:
            means = self.means
            async with means.connect(source, self.shard, means.identity, means.limits) as connection:
                await self._use(connection, source, brought)
            self._end(candidate, brought.pieces, POLL_S)
        except (BadPeer, Busy) as error:
            self._note_failure(source, candidate, error, brought.pieces)
        except Refused as error:
            self._fail(error, scope)
        finally:
            self.means.records.closed(source)
            self._at_work.remove(brought)
            candidate.lanes -= 1
            self._lanes -= 1
            self._wake()

    def _note_failure(self, source: Source, candidate: _Candidate, error: BadPeer | Busy, pieces: int) -> None:
        if isinstance(error, NotThere) and candidate.is_hearsay:
            log.debug("the source %s has nothing yet: %s", source, error)
            self._end(candidate, pieces, POLL_S * 2 ** min(candidate.misses, MISSES_COUNTED_MAX))
            candidate.misses += 1
            return
        self.means.records.failed(source, error, trio.current_time())
        self._add_reason(f"{source}: {error}")
        if isinstance(error, BadPeer):
            log.warning("dropped the source %s: %s", source, error)
            candidate.due, candidate.is_spent = float("inf"), True
            return
        log.info("the source %s failed: %s", source, error)
        self._end(candidate, pieces, min(RETRY_S_MAX, RETRY_S_MIN * 2 ** min(candidate.failures, 16)))
        candidate.failures += not pieces

    def _end(self, candidate: _Candidate, pieces: int, pause_s: float) -> None:
        """A connection ended without a wrong byte: one that brought something may be made again at once."""
        candidate.is_spent = not pieces
        candidate.due = trio.current_time() + (0.0 if pieces else pause_s)
        if pieces:
            candidate.failures = candidate.misses = 0

    # What a connection does

    async def _use(self, connection: Connection, source: Source, brought: "_Brought") -> None:
        """Take run after run, until the shard is whole or this source has had nothing to give for a while."""
        holding = await self._ask(connection)
        lane = self._queue.join(holding.have, holding.coming, holding.given)
        self._sources[lane] = source
        receiver = _Receiver(self, source, lane, brought)
        working = asked = trio.current_time()
        refusal: Lacks | None = None
        try:
            while self._queue.missing:
                if refusal and (lane.refused.bit_count() >= REFUSALS_MAX or not self._queue.can_use(lane)):
                    raise refusal
                now = trio.current_time()
                if now - asked >= self._holds_for_s(lane):
                    holding = await self._ask(connection)
                    self._queue.update(lane, holding.have, holding.coming, holding.given)
                    asked = trio.current_time()
                if run := self._queue.take(lane, now, brought.rate()):
                    try:
                        await self._bring(connection, run, receiver)
                    except Lacks as error:
                        log.info("the source %s does not give %s", source, error)
                        self._queue.refuse(lane, error.piece)
                        refusal = error
                    self._queue.finish(lane)
                    working = trio.current_time()
                    brought.seconds += working - now
                elif now - working > STARVED_S:
                    self._add_reason(f"{source} has none of the missing pieces")
                    return
                else:
                    brought.heard = now  # it is not silent: it was not asked
                    with trio.move_on_at(now + WATCH_S):
                        await self._freed.wait()
        finally:
            if lane.asked:
                self._free()
            self._queue.leave(lane)
            del self._sources[lane]

    def _holds_for_s(self, lane: Lane) -> float:
        """How long what its source said of itself is good for."""
        if lane.have != self._queue.everything:
            return POLL_S
        return FRESH_S if self._queue.is_shared else HEAR_S

    async def _ask(self, connection: Connection) -> Holding:
        """What the source has by now; who else may have some is heard of."""
        holding = await connection.holding()
        self.hear_of(holding.others)
        return holding

    async def _bring(self, connection: Connection, run: Run, receiver: "_Receiver") -> None:
        if run.silent is not None and (waited_s := trio.current_time() - run.silent.heard) >= queue.SILENT_S:
            self._note_silent(self._sources[run.silent], run.pieces.start, waited_s)
        self._note_coming()
        await connection.fetch(run.pieces, receiver)

    def _note_coming(self) -> None:
        self.coming = self._queue.asked().to_bytes(self.shard.piece_count // 8 + 1, "little")

    def _note_silent(self, source: Source, index: int, seconds: float) -> None:
        trouble = f"slow: piece {index} of shard {self.shard.sha256.hex()} has not come, nothing for {seconds:.1f} s"
        log.warning("the source %s is %s; another one is asked", source, trouble)
        self.means.records.slow(source, trouble)

    def arrived(self, source: Source, lane: Lane, brought: "_Brought", index: int, wire_bytes: int) -> None:
        """A lane's thread proved and wrote a piece, which took so many bytes on the wire."""
        now, size = trio.current_time(), piece_bytes(self.shard.size, index)
        brought.pieces += 1
        brought.bytes += size
        brought.heard = now
        self.means.records.brought(source, size, now, size - wire_bytes)
        if not self._candidates[source].is_proved:
            self._candidates[source].is_proved = True
            self._wake()
        if self._queue.arrived(lane, index, now):
            self._meter.add(size, now)
            self._heard = now
            self._bytes_here += size
            self.on_bytes(self._bytes_here)
            if not self._queue.missing:
                self._wake()
                self._free()

    # Waiting

    def _wake(self) -> None:
        """There may be a connection to make."""
        self._changed.set()
        self._changed = trio.Event()

    def _free(self) -> None:
        """Lanes without work may look again: pieces that another one was asked for are free, or all are here."""
        self._freed.set()
        self._freed = trio.Event()

    async def _wait(self, until: float) -> None:
        with trio.move_on_at(until):
            await self._changed.wait()

    def _add_reason(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


@dataclass(eq=False)
class _Brought:
    """What one connection has brought, in how long, and when the last of it, or it began."""

    heard: float
    pieces: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def rate(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


class _Receiver:
    """What a lane's worker thread does with each piece."""

    def __init__(self, flight: Flight, source: Source, lane: Lane, brought: _Brought) -> None:
        self._flight = flight
        self._about = source, lane, brought
        self._share = Share(flight.means.pace, str(source))
        self._token = trio.lowlevel.current_trio_token()
        self._wire_bytes = 0

    def expect(self, size_bytes: int) -> None:
        self._wire_bytes = size_bytes
        self._share.take(size_bytes)

    def take(self, index: int, piece: memoryview) -> None:
        if self._flight.partial.write(index, piece):
            self._token.run_sync_soon(self._flight.arrived, *self._about, index, self._wire_bytes)

    def wake(self) -> None:
        self._share.close()
