"""The ledger replayed into the node's State: at the start from block 0, then block by block as they become final.

Knows no rules; folding is `node.state`'s. Readers take `state`, a frozen value that is whole after every block.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from ledger.ledger import Ledger
from node import state as states
from node.state import State


class Replay:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._changed = trio.Event()
        self.state = State()
        self.number = -1
        """Of the newest block that `state` holds; -1 before the first."""

    def catch_up(self) -> None:
        """Fold every final block that is not in `state` yet."""
        head = self._ledger.head.number
        if head == self.number:
            return
        self.state = states.fold(self.state, self._ledger.records(self.number + 1))
        self.number = head  # the head moves on this very thread: it is still the one that `records` went up to
        self._changed.set()
        self._changed = trio.Event()

    async def run(self) -> None:
        """Follow the head for as long as it runs."""
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
