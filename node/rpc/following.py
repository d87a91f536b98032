"""What is new on the ledger since a block: hashes or headers of blocks, or logs. The core of filters and subscriptions.

Nothing is queued anywhere: whoever follows keeps the number of the next block to look at, and reads from there at its
own pace. A slow reader costs no memory and misses nothing, because final blocks stay. Knows no client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import trio

from contracts.errors import BadInput
from ledger.history import Criteria, FoundLog, History
from node.rpc import ethereum_encoding as encoding
from node.rpc.limits import RpcLimits

HEADS_AT_ONCE = 256
"""Blocks whose hashes or headers are read in one go."""

T = TypeVar("T")


class Threads:
    """Runs reads of final blocks and tried calls in worker threads, a few at a time."""

    def __init__(self, count: int) -> None:
        self._limiter = trio.CapacityLimiter(count)

    async def run(self, read: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(read, *args, limiter=self._limiter)


@dataclass
class Cursor:
    """What is followed: blocks (no criteria) or logs, from `next_block` on, up to `stop` when there is one."""

    criteria: Criteria | None
    next_block: int
    stop: int | None = None

    def end(self, head: int) -> int:
        """The number after the newest block to look at, as things stand."""
        return head + 1 if self.stop is None else min(head + 1, self.stop)


def collect(
    history: History, criteria: Criteria, start: int, stop: int, limits: RpcLimits
) -> tuple[list[FoundLog], int]:
    """Logs of the blocks from `start` on, and the number of the first block that was not looked at: `stop`, or less
    when one answer is full. The first block is always taken whole, so whoever goes on from there gets on."""
    found: list[FoundLog] = []
    size_bytes = 0
    for number, logs in enumerate(history.logs(criteria, start, stop), start):
        size_bytes += sum(len(entry.log.data) for entry in logs)
        if number > start and (len(found) + len(logs) > limits.log_results or size_bytes > limits.log_bytes):
            return found, number
        found += logs
    return found, stop


def search(history: History, criteria: Criteria, start: int, stop: int, limits: RpcLimits) -> list[dict[str, Any]]:
    """The logs of the blocks start <= number < stop. Raises BadInput when they are too many for one answer."""
    if stop - start > limits.log_blocks:
        raise BadInput(f"{stop - start} blocks, at most {limits.log_blocks} at once (rpc.log_blocks): ask for fewer")
    found, reached = collect(history, criteria, start, stop, limits)
    if reached < stop:
        raise BadInput(
            f"more than {limits.log_results} logs or {limits.log_bytes} bytes of them: ask for blocks "
            f"{encoding.quantity(start)} to {encoding.quantity(reached - 1)} first"
        )
    return [encoding.log(entry) for entry in found]


def new_hashes(history: History, cursor: Cursor, head: int, limits: RpcLimits) -> tuple[list[Any], int]:
    """Hashes of new blocks, and where to go on."""
    stop = min(cursor.end(head), cursor.next_block + limits.log_blocks)
    return [encoding.data(history.block_hash(n)) for n in range(cursor.next_block, stop)], stop


def new_heads(history: History, cursor: Cursor, head: int) -> tuple[list[Any], int]:
    """Headers of new blocks, and where to go on."""
    stop = min(cursor.end(head), cursor.next_block + HEADS_AT_ONCE)
    return [encoding.header(history.header(n)) for n in range(cursor.next_block, stop)], stop


def new_logs(history: History, cursor: Cursor, head: int, limits: RpcLimits) -> tuple[list[Any], int]:
    """Logs of new blocks, and where to go on."""
    assert cursor.criteria is not None
    stop = min(cursor.end(head), cursor.next_block + limits.log_blocks)
    found, reached = collect(history, cursor.criteria, cursor.next_block, stop, limits)
    return [encoding.log(entry) for entry in found], reached
