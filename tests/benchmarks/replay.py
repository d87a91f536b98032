"""The start of a node, for `make bench-ledger`: from the ledger on disk to the registry, at three sizes of the chain.

The chains are synthetic: their event records, indices and headers are written straight into the store, as sealing would
write them but without executing anything, since 100,000 executed transactions take minutes. What a start reads (the
head, the newest header, the event records, the snapshot) is all there, and valid. Each start is a process of its own;
the time is from an opened interpreter with everything imported to a state that holds every transaction.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import rlp

from ledger import seal
from ledger.block import SealedBlock, child_header
from ledger.chain import Chain
from ledger.record import BlockRecord, TransactionRecord
from tests.benchmarks import report
from tests.ledger import world

SIZES = (1_000, 10_000, 100_000)
"""Transactions, each with one event."""

START_S_GOAL = 2.0
GROWTH_GOAL = 0.8
"""Of a tenfold chain's time and memory beside ten times the smaller one's: 1 is a straight line, less grows faster."""

RUNS = 3

START = """
import json, sys, time, trio
from pathlib import Path
import psutil
from ledger.ledger import Ledger
from node.replay import Replay
from tests.benchmarks.ledger import CONFIG
process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
ledger = Ledger.open(Path(sys.argv[1]), CONFIG)
replay = Replay(ledger)
replay.catch_up()
taken, used = time.perf_counter() - began, process.memory_info().rss - before
assert len(replay.state.registry.models) == int(sys.argv[2]), len(replay.state.registry.models)

async def keep():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replay.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

if len(sys.argv) > 3:
    import trio.testing
    replay._snapshot_events = 1
    trio.run(keep)
print(json.dumps({"s": taken, "bytes": used, "from": ledger.opened_from.number if ledger.opened_from else -1}))
"""


def grow(chain: Chain, records: Sequence[tuple[TransactionRecord, ...]]) -> None:
    """Blocks with these transactions, not executed: their headers follow one another and keep genesis' state root."""
    header = chain.tip.header
    for transactions in records:
        extra = seal.unsealed_extra_data(header.block_number + 1)
        header = child_header(header, header.timestamp + 1, world.AUTHORITY.address, extra)
        sealed = SealedBlock(rlp.encode(header), (), seal.Certificate(bytes(header.hash), header.block_number, ()))
        record = BlockRecord(header.block_number, bytes(header.hash), header.timestamp, transactions)
        chain.store.commit(sealed, record, (), {}, ())


def start(path: Path, models: int, keep: bool = False) -> dict[str, float]:
    """One start in a process of its own; with `keep` it writes a snapshot at its end."""
    command = [sys.executable, "-c", START, str(path), str(models), *(["keep"] if keep else [])]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def rows(
    transactions: Callable[[int], list[tuple[TransactionRecord, ...]]], models: Callable[[int], int]
) -> list[report.Row]:
    """`transactions` makes the records of so many, block by block; `models` says how many models they register."""
    found = []
    means: dict[str, dict[int, list[dict[str, float]]]] = {"genesis": {}, "a snapshot": {}}
    with TemporaryDirectory() as folder:
        for size in SIZES:
            path = Path(folder) / str(size) / "ledger"
            from tests.benchmarks.ledger import CONFIG

            with world.open_chain(path, CONFIG) as chain:
                grow(chain, transactions(size))
            means["genesis"][size] = [start(path, models(size)) for _ in range(RUNS)]
            start(path, models(size), keep=True)
            means["a snapshot"][size] = [start(path, models(size)) for _ in range(RUNS)]
    print(json.dumps(means, indent=1))
    return found
