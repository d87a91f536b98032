"""Taking in the chain while peers are ahead, from all of them at once: who fetches what, and what comes when.

Every peer's lanes claim ranges of blocks, download them side by side, and take them in in their order; the lane that
downloaded a range takes it in, so that what is wrong with it ends that peer's session. Usually blocks are executed. A
new node that is far behind stages them with their receipts instead, and then fetches the nodes of the state after the
newest (`ledger.staging`). Knows no messages: a Source is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import msgspec
import trio

from contracts.errors import BadPeer
from node.network.failures import first_failure
from node.network.messages import BLOCKS_BYTES_MAX, BLOCKS_MAX, NODES_MAX
from node.network.ports import LedgerPort

log = logging.getLogger(__name__)

LANES: Final = 2
"""Of each peer: one downloads while the other's blocks are taken in."""

CLAIMS_MAX: Final = 8
"""Ranges that are downloaded or wait for their turn, each of about BLOCKS_BYTES_MAX in memory."""

OVERTAKE_S: Final = 5.0
"""How long all wait for a range before another peer is asked for it as well."""

Parcel = tuple[bytes, bytes]
"""An encoded block and its receipts, which are empty unless they were asked for."""

Mode = Literal["idle", "executing blocks", "taking in blocks", "fetching the state"]


class SyncStatistics(msgspec.Struct, frozen=True):
    """How far the chain was taken in, since block `start`; `target` is the highest that a peer says it has. `nodes` of
    the state are here so far; how many there are, only the last one tells."""

    mode: Mode
    start: int
    number: int
    target: int
    nodes: int

    def __str__(self) -> str:
        if self.mode == "idle":
            return f"block {self.number:,}"
        done = 100 * self.number // max(self.target, 1)
        nodes = f", {self.nodes:,} nodes so far" if self.mode == "fetching the state" else ""
        return f"block {self.number:,} of {self.target:,} ({done} %), {self.mode}{nodes}"


class Source(Protocol):
    """A connected peer."""

    @property
    def head_number(self) -> int: ...

    async def fetch_blocks(self, start: int, count: int, with_receipts: bool) -> Sequence[Parcel]:
        """The first ones of a range, at least one. Raises BadPeer for any other answer."""
        ...

    async def fetch_nodes(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """The first ones of these state nodes; none when the peer lacks the first."""
        ...

    async def wait_for_more(self, number: int) -> None:
        """Learn the peer's head, which is perhaps above `number` by now."""
        ...


@dataclass(eq=False)
class _Claim:
    """The blocks start <= number < stop, which a lane fetches or holds."""

    start: int
    stop: int
    since: float
    is_here: bool = False
    """They are downloaded: what they wait for now is ours."""
    is_overtaken: bool = False


class Sync:
    """One for all sessions: each calls `follow` while its peer is ahead."""

    def __init__(
        self, ledger: LedgerPort, sources: Callable[[], Collection[Source]], fast_blocks_min: int | None
    ) -> None:
        """`sources`: the peers of this network. `fast_blocks_min`: how far behind a new node does not execute; None: it
        always executes."""
        self._ledger = ledger
        self._sources = sources
        self._fast_blocks_min = fast_blocks_min
        self._claims: list[_Claim] = []
        self._block_bytes = BLOCKS_BYTES_MAX / BLOCKS_MAX
        """What a block takes in an answer, on average of late."""
        self._following = 0
        self._start = 0
        self._joins = False
        """Whether the chain is joined without executing it, as long as that is possible."""
        self._is_walking = False
        self._lacking: set[Source] = set()
        """Peers that have not the state after the newest staged block."""
        self._changed = trio.Event()

    def statistics(self) -> SyncStatistics:
        number = self._number()
        target = max((source.head_number for source in self._sources()), default=number)
        if not self._following:
            mode: Mode = "idle"
        elif self._is_staging:
            mode = "fetching the state" if self._is_walking else "taking in blocks"
        else:
            mode = "executing blocks"
        return SyncStatistics(mode, self._start, number, max(number, target), self._ledger.fast_sync.nodes_seen)

    async def follow(self, source: Source) -> None:
        """Take in what the peer has and we lack. Raises BadPeer for what is wrong with it."""
        if not self._following:
            self._start = self._number()
        self._following += 1
        try:
            if await self._goes_fast(source):
                await self._join(source)
            await self._lanes(source, self._take_blocks)
        finally:
            self._following -= 1
            self._lacking.discard(source)
            self.stir()

    def stir(self) -> None:
        """Have all that wait look again: something is taken in, or a peer came or went."""
        self._changed.set()
        self._changed = trio.Event()

    async def _lanes(self, source: Source, work: Callable[[Source], Awaitable[None]]) -> None:
        await first_failure(*(lambda: work(source) for _ in range(LANES)))

    @property
    def _is_staging(self) -> bool:
        return self._joins and self._ledger.fast_sync.is_possible

    def _number(self) -> int:
        """The newest block that was taken in."""
        return self._ledger.fast_sync.number if self._is_staging else self._ledger.head.number

    # Blocks

    async def _take_blocks(self, source: Source) -> None:
        """One lane: fetch ranges and take them in until the peer has no more."""
        while (claim := await self._claim(source)) is not None:
            try:
                parcels = await source.fetch_blocks(claim.start, claim.stop - claim.start, self._is_staging)
                claim.is_here = True
                size_bytes = sum(len(block) + len(receipts) for block, receipts in parcels)
                self._block_bytes += (size_bytes / len(parcels) - self._block_bytes) / 4
                if await self._wait_turn(claim):
                    await self._take_in(parcels)
                    self._check_reached(claim, len(parcels))
            finally:
                self._claims.remove(claim)
                self.stir()

    async def _claim(self, source: Source) -> _Claim | None:
        """The first blocks that nobody fetches, or None when the peer has none that we lack."""
        while source.head_number > self._number():
            start = self._first_free()
            if start <= source.head_number and len(self._claims) < CLAIMS_MAX:
                count = min(BLOCKS_MAX, max(1, int(BLOCKS_BYTES_MAX / self._block_bytes)))
                ends = [claim.start for claim in self._standing() if claim.start > start]
                claim = _Claim(start, min([start + count, source.head_number + 1, *ends]), trio.current_time())
                self._claims.append(claim)
                return claim
            await self._changed.wait()
        return None

    def _standing(self) -> list[_Claim]:
        return [claim for claim in self._claims if not claim.is_overtaken]

    def _first_free(self) -> int:
        start = self._number() + 1
        for claim in sorted(self._standing(), key=lambda claim: claim.start):
            if claim.start > start:
                break
            start = max(start, claim.stop)
        return start

    async def _wait_turn(self, claim: _Claim) -> bool:
        """Wait until all before a range is taken in. False when nobody fetches what is before it: better give the range
        up and fetch that."""
        while self._number() < claim.start - 1:
            first = next((c for c in self._standing() if c.start <= self._number() + 1 < c.stop), None)
            if first is None:
                return False
            with trio.move_on_at(float("inf") if first.is_here else first.since + OVERTAKE_S) as waiting:
                await self._changed.wait()
            if waiting.cancelled_caught:
                first.is_overtaken = not first.is_here
        return True

    async def _take_in(self, parcels: Sequence[Parcel]) -> None:
        if self._is_staging:
            await self._ledger.fast_sync.stage(parcels)
        else:
            await self._ledger.import_blocks([block for block, _ in parcels])

    def _check_reached(self, claim: _Claim, count: int) -> None:
        expected, number = claim.start + count - 1, self._number()
        if number < expected:
            raise BadPeer(f"sent {count} blocks for {claim.start} to {expected}; they end at {number}")

    # A chain that is joined without executing it

    async def _goes_fast(self, source: Source) -> bool:
        """Whether to join the chain instead of executing it: decided once, and kept to after a restart."""
        fast = self._ledger.fast_sync
        if self._fast_blocks_min is None or not fast.is_possible:
            return False
        await fast.open()
        self._joins |= fast.number > 0 or source.head_number >= self._fast_blocks_min
        return self._is_staging

    async def _join(self, source: Source) -> None:
        """Stage what this peer has, wait while others have more, then fetch the state."""
        fast = self._ledger.fast_sync
        while fast.is_possible:
            is_ahead = source.head_number > fast.number
            if is_ahead and self._may_stage():
                self._is_walking = False
                self._lacking.clear()
                await self._lanes(source, self._take_blocks)
            elif source in self._lacking and not is_ahead:
                await source.wait_for_more(fast.number)
            elif source in self._lacking or (self._may_stage() and self.is_any_ahead()):
                await self._changed.wait()
            else:
                self._is_walking = True
                await self._lanes(source, self._take_nodes)

    def is_any_ahead(self) -> bool:
        return any(source.head_number > self._number() for source in self._sources())

    def _may_stage(self) -> bool:
        """Not while the state after the newest staged block is fetched, unless nobody has it any more."""
        return not self._is_walking or self._lacking.issuperset(self._sources())

    async def _take_nodes(self, source: Source) -> None:
        """One lane: fetch state nodes until the peer lacks one or all are here."""
        fast = self._ledger.fast_sync
        while fast.is_possible and self._is_walking and source not in self._lacking:
            changed = self._changed
            asked = await fast.wanted(NODES_MAX)
            if not asked:
                if fast.is_possible:
                    await changed.wait()
                continue
            try:
                nodes = await source.fetch_nodes(asked)
                if nodes:
                    await fast.give(asked, nodes)
                else:
                    self._lacking.add(source)
            finally:
                with trio.CancelScope(shield=True):
                    await fast.put_back(asked)
                self.stir()
        self.stir()
