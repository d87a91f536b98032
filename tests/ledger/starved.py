"""What the tests of a full or failing disk run in a child process under faults.c: a small life of a node."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import trio

from contracts.errors import Refused
from ledger.consensus import Consensus
from ledger.ledger import Ledger
from node.replay import Replay
from tests.ledger.crash import CONFIG, SENDERS, SNAPSHOT_EVENTS, hourly_clock
from tests.ledger.world import AUTHORITY, join, raw_call
from tests.ledger.zygote import Tell

TRANSACTIONS = 4
"""Two that wait for their block, two that are only accepted."""


async def _live(path: Path, hour: int, tell: Tell) -> None:
    """Open the ledger, accept transactions and seal; told is each transaction that was acknowledged."""
    ledger = Ledger.open(path, CONFIG, hourly_clock(hour))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ledger.watch_disk)
            nursery.start_soon(Replay(ledger, SNAPSHOT_EVENTS).run)
            nursery.start_soon(Consensus(ledger, AUTHORITY).run)
            key = SENDERS[0]
            for number in range(TRANSACTIONS):
                name = await ledger.submit(raw_call(key, ledger.account(key.address).next_nonce, join("12D3Ka")))
                tell(name.hex())
                if number < TRANSACTIONS // 2:
                    await ledger.wait_receipt(name)
            nursery.cancel_scope.cancel()
    finally:
        ledger.close()


# Jobs


def live(tell: Tell, path: str, hour: int, nth: int, number: int) -> None:
    """From the `nth` change to the disk on every one fails with errno `number`; 0: none does.

    Told last is how it ended: the changes there were, and each distinct line of what was refused.
    """
    faults = ctypes.CDLL(None)
    faults.fault_arm(str(Path(path).parent).encode(), nth, number)
    lines: set[tuple[str, str]] = set()
    try:
        trio.run(_live, Path(path), hour, tell, strict_exception_groups=True)
    except Refused as error:
        lines = {(type(error).__name__, str(error))}
    except BaseExceptionGroup as group:
        lines = {(type(error).__name__, str(error)) for error in _leaves(group)}
    changes = faults.fault_count()
    faults.fault_arm(b"", 0, 0)
    tell({"changes": changes, "refused": sorted(lines)})


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
