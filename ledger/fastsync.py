"""Joining a long chain without executing it, as the node sees it: `ledger.staging` in worker threads, call by call.

It is for a ledger whose head is genesis; whatever makes another block the head ends it. Knows no peers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from contracts.errors import Conflict
from ledger.chain import Chain
from ledger.staging import Parcel, Staging
from ledger.timing import Clock, in_thread


class FastSync:
    """`open`, then what Staging has."""

    def __init__(
        self,
        chain: Chain,
        clock: Clock,
        writing: Callable[[], AbstractAsyncContextManager[None]],
        end: Callable[[Staging], Callable[[], None]],
    ) -> None:
        """`writing` gives the right to write; `end` moves the head on disk and returns what moves it in memory."""
        self._chain = chain
        self._clock = clock
        self._writing = writing
        self._end = end
        self._staging: Staging | None = None

    @property
    def is_possible(self) -> bool:
        """Whether there is a chain to join: nothing was executed here."""
        return self._chain.tip.number == 0

    @property
    def number(self) -> int:
        """The newest block that was taken in."""
        return self._chain.tip.number if self._staging is None else self._staging.tip.number

    @property
    def nodes_seen(self) -> int:
        """State nodes that are here, as far as they were looked at."""
        return 0 if self._staging is None else self._staging.nodes_seen

    async def open(self) -> None:
        """Go on from what is on disk. Raises Corrupt."""
        async with self._writing():
            if self._staging is None and self.is_possible:
                self._staging = await in_thread(Staging, self._chain)

    async def stage(self, parcels: Sequence[Parcel]) -> None:
        """Check blocks and write those that are new. Raises BadPeer or Busy, see Staging; Conflict as well when a block
        was executed."""
        async with self._writing():
            if self._staging is None or not self.is_possible:
                self._staging = None
                raise Conflict(f"the head is block {self._chain.tip.number}: blocks are executed from here on")
            await in_thread(self._staging.stage, parcels, self._clock())

    async def wanted(self, count_max: int) -> list[bytes]:
        """Hashes of state nodes to ask a peer for; empty when all others are on their way, or the head has moved, which
        it does with the last node."""
        async with self._writing():
            if (staging := self._staging) is None or not self.is_possible:
                return []
            found = await in_thread(staging.wanted, count_max)
            if staging.is_whole:
                move_head = await in_thread(self._end, staging)
                move_head()
                self._staging = None
            return found

    async def give(self, asked: Sequence[bytes], nodes: Sequence[bytes]) -> None:
        """What a peer answered to `asked`. Raises BadPeer."""
        async with self._writing():
            if self._staging is not None:
                await in_thread(self._staging.give, asked, nodes)

    async def put_back(self, asked: Sequence[bytes]) -> None:
        """A peer did not answer: another one is to be asked."""
        async with self._writing():
            if self._staging is not None:
                self._staging.put_back(asked)
