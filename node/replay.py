"""The ledger replayed into the node's State: at the start from the ledger's snapshot or block 0, then block by block as
they become final.

Owns when the state is hashed and when a snapshot of it is taken, both at every CHECKPOINT_BLOCKS-th block, so that any
two nodes have blocks to compare at. Knows no rules; folding is `node.state`'s. Readers take `state`, a frozen value
that is whole after every block.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from contracts.errors import Corrupt, Refused
from ledger import snapshot as snapshots
from ledger.accounts import Standing
from ledger.ledger import Ledger
from ledger.record import BlockRecord
from ledger.snapshot import Snapshot
from ledger.store import Store
from node import state as states
from node.agreement import StateHasher, StateMark
from node.state import State

CHECKPOINT_BLOCKS = 16
"""Every so many blocks the state is remembered, to be hashed when someone asks. The same on every node."""

CHECKPOINTS_KEPT = 4
"""Two nodes find a common block while neither is further ahead than about CHECKPOINT_BLOCKS times this."""

SNAPSHOT_EVENTS = 10_000
"""A snapshot is due after so many events: the most that a start folds, but for the last few blocks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Everything folded from the blocks up to `number`; -1 before the first. `events` counts from this start on."""

    number: int
    hash: bytes
    state: State
    standing: Standing
    events: int

    def after(self, record: BlockRecord) -> Checkpoint:
        return Checkpoint(
            record.number,
            record.hash,
            states.fold(self.state, (record,)),
            self.standing.after(record.hash, record.events()),
            self.events + sum(len(transaction.events) for transaction in record.transactions),
        )


BEGINNING = Checkpoint(-1, b"", State(), Standing(), 0)


class Replay:
    def __init__(self, ledger: Ledger, snapshot_events: int = SNAPSHOT_EVENTS) -> None:
        """Begins with what `ledger` was opened from. `snapshot_events`: how many events make a snapshot due."""
        self._ledger = ledger
        self._snapshot_events = snapshot_events
        self._changed = trio.Event()
        self._newest = _opening(ledger.opened_from)
        self._checkpoints: deque[Checkpoint] = deque(maxlen=CHECKPOINTS_KEPT)
        if self._newest.number >= 0:
            self._checkpoints.append(self._newest)
        self._hasher = StateHasher()
        self._hashing = trio.Lock()
        self._hashes: dict[int, bytes] = {}

    @property
    def state(self) -> State:
        return self._newest.state

    @property
    def number(self) -> int:
        """Of the newest block that `state` holds; -1 before the first."""
        return self._newest.number

    def catch_up(self) -> None:
        """Fold every final block that is not in `state` yet."""
        if self._ledger.head.number == self.number:
            return
        with _many_values():
            for record in self._ledger.records(self.number + 1):
                self._newest = self._newest.after(record)
                if record.number % CHECKPOINT_BLOCKS == 0:
                    self._checkpoints.append(self._newest)
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Follow the head, and take a snapshot now and then, for as long as it runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_snapshots)
            while True:
                self.catch_up()
                await self._ledger.wait_head(self.number)

    async def wait_change(self, after: int) -> None:
        """Return once `number` is above `after`."""
        while self.number <= after:
            await self._changed.wait()

    async def wait_until(self, holds: Callable[[State], bool]) -> State:
        """The first state in which `holds`."""
        while not holds(self.state):
            await self.wait_change(self.number)
        return self.state

    # The hash of the state

    async def state_hash(self, number: int) -> bytes | None:
        """The hash of state and accounts after block `number`, the newest or one of the last CHECKPOINTS_KEPT that
        CHECKPOINT_BLOCKS divides; None for any other. Made in a worker thread when it is asked for the first time."""
        async with self._hashing:
            at = next((found for found in self._remembered() if found.number == number), None)
            if at is None:
                return None
            if number not in self._hashes:
                found = await trio.to_thread.run_sync(self._hasher.hash, at.state, at.standing.accounts)
                kept = {remembered.number for remembered in self._remembered()} | {number}
                self._hashes = {n: h for n, h in self._hashes.items() if n in kept} | {number: found}
            return self._hashes[number]

    def _remembered(self) -> list[Checkpoint]:
        """The blocks whose state can be hashed, the newest last."""
        older = [found for found in self._checkpoints if found.number < self.number]
        return [*older, self._newest] if self.number >= 0 else []

    async def marks(self) -> tuple[StateMark, ...]:
        """The hashes to compare with other nodes: of every block that can be hashed, the newest last."""
        found = []
        for number in [at.number for at in self._remembered()]:
            value = await self.state_hash(number)
            if value is not None:
                found.append(StateMark(number, value))
        return tuple(found)

    async def newest_mark(self) -> StateMark:
        """The hash of the state as it is now; only after the first catch_up."""
        while True:
            number = self.number
            if (value := await self.state_hash(number)) is not None:
                return StateMark(number, value)

    # Snapshots

    async def _keep_snapshots(self) -> None:
        kept_at = 0
        while True:
            number = self.number
            if self._checkpoints and self._checkpoints[-1].events - kept_at >= self._snapshot_events:
                at = self._checkpoints[-1]
                await trio.to_thread.run_sync(self._keep_snapshot, at)
                kept_at = at.events
            await self.wait_change(number)

    def _keep_snapshot(self, at: Checkpoint) -> None:
        """In a worker thread: `at` never changes. The node needs no snapshot, so one that cannot be kept is passed
        over until the next is due; a full disk ends the node when the ledger itself meets it."""
        with _many_values():
            encoded = states.encode(at.state)
        try:
            snapshots.write(
                self._ledger.path, Snapshot(self._ledger.genesis_hash, at.number, at.hash, at.standing, encoded)
            )
        except Refused as error:
            log.warning("%s", error)
        else:
            log.info("kept a snapshot of block %d, %d bytes of projections", at.number, len(encoded))


@contextmanager
def _many_values() -> Iterator[None]:
    """The cyclic collector rests meanwhile: among the values of a state there are no cycles, and looking through all of
    them again and again while they are made takes three times as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _opening(snapshot: Snapshot | None) -> Checkpoint:
    """Where the fold begins."""
    if snapshot is not None:
        try:
            with _many_values():
                state = states.decode(snapshot.projections)
        except Corrupt as error:
            log.warning("the snapshot of block %d is passed over: %s", snapshot.number, error)
        else:
            return Checkpoint(snapshot.number, snapshot.hash, state, snapshot.standing, 0)
    return BEGINNING


def check_snapshot(path: Path, genesis_hash: bytes) -> None:
    """Fold the ledger in the folder `path` from genesis up to its snapshot. Raises Corrupt when that gives anything
    else, as it does when a memory has erred: the blocks may be right and the snapshot not."""
    with Store(path) as store:
        found = snapshots.load(store, genesis_hash)
        if found is None:
            return
        at = BEGINNING
        for record in store.records(0, found.number + 1):
            at = at.after(record)
        if (at.standing, states.encode(at.state)) != (found.standing, found.projections):
            raise Corrupt(
                f"the snapshot {snapshots.path_of(path)} is not what the blocks up to {found.number} fold to: remove "
                "that file; the next start folds them again"
            )
