"""How long blocks take to become final, by the node that proposes them: from when it begins to make one until it is
final there. Decides nothing; knows the ledger and no votes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from ledger.ledger import Ledger


class OwnBlocks(msgspec.Struct, frozen=True):
    """The blocks that this node proposed since it started and that became final."""

    count: int = 0
    seconds: float = 0.0
    """What they took, all together."""
    newest_number: int = 0
    newest_began_at: float = 0.0
    """When this node began to make the newest of them, in Unix seconds by its own clock."""


@dataclass(frozen=True)
class _Running:
    number: int
    began: float


class Stopwatch:
    """Call `start` with each own block and `look` when the head moved; what was measured is `own_blocks`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._running: dict[bytes, _Running] = {}
        self.own_blocks = OwnBlocks()

    def start(self, header: Any, began: float) -> None:
        """A block that this node made, beginning at `began` of trio's clock."""
        self._running[bytes(header.hash)] = _Running(int(header.block_number), began)

    def look(self) -> None:
        """Take the time of blocks that are final now, and forget those that never will be."""
        head = self._ledger.head.number
        for block_hash, run in [found for found in self._running.items() if found[1].number <= head]:
            del self._running[block_hash]
            if self._ledger.record(run.number).hash == block_hash:
                took_s, before = trio.current_time() - run.began, self.own_blocks
                self.own_blocks = OwnBlocks(before.count + 1, before.seconds + took_s, run.number, time.time() - took_s)
