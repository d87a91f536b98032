"""The rows of `make bench-ledger` about starting a node: from the ledger on disk to the registry, at three sizes of the
chain; and the hash of a large state.

The chains are synthetic: event records, indices and headers are written straight into the store, as sealing would write
them but without executing anything, since 100,000 executed transactions take minutes. What a start reads (the head, the
newest header, the event records, the snapshot) is all there, and valid. Each start is a process of its own; the time is
from everything imported to a state that holds every transaction, the memory what the process grew by meanwhile.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import rlp
from immutables import Map

from contracts import events
from contracts.types import ModelId, NodeId, TransactionHash, Version
from genesis.config import GenesisConfig
from ledger import seal
from ledger.accounts import Accounts
from ledger.block import SealedBlock, child_header
from ledger.chain import Chain
from ledger.record import BlockRecord, TransactionRecord
from node import state
from node.agreement import StateHasher
from node.shard_index import ShardIndex
from node.state import State
from tests.benchmarks import report
from tests.ledger import world

SIZES = (1_000, 10_000, 100_000)
"""Transactions, each with one event, BLOCK_TRANSACTIONS in a block."""

BLOCK_TRANSACTIONS = 10

START_S_GOAL = 2.0
LINEAR_GOAL = 0.8
"""A transaction of the largest chain may cost this much more than one of the middle one: its inverse, that is."""

MODELS, NODES = 100, 1_000
"""100,000 announcements: of the state that is hashed."""

HASH_MS_GOAL, AGAIN_MS_GOAL = 1_000.0, 20.0

RUNS = 3

Transactions = tuple[TransactionRecord, ...]

START = """
import json, sys, time, trio
from pathlib import Path
import psutil
from ledger import snapshot
from ledger.ledger import Ledger
from node.replay import Replay
from tests.benchmarks.ledger import CONFIG
process = psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
ledger = Ledger.open(Path(sys.argv[1]), CONFIG)
replay = Replay(ledger, snapshot_events=int(sys.argv[2]))
replay.catch_up()
found = {"s": time.perf_counter() - began, "bytes": process.memory_info().rss - before}
found |= {"models": len(replay.state.registry.models), "number": replay.number, "snapshot": bool(ledger.opened_from)}

async def keep_snapshot():
    write = snapshot.write
    async with trio.open_nursery() as nursery:
        def written(path, of):
            write(path, of)
            trio.from_thread.run_sync(nursery.cancel_scope.cancel)
        snapshot.write = written
        nursery.start_soon(replay.run)

if replay._snapshot_events == 1:
    trio.run(keep_snapshot)
print(json.dumps(found))
"""


def grow(chain: Chain, blocks: Sequence[Transactions]) -> None:
    """Blocks with these transactions, not executed: their headers follow one another and keep genesis' state root."""
    header = chain.tip.header
    for transactions in blocks:
        extra = seal.unsealed_extra_data(chain.tip.epoch, header.block_number + 1)
        header = child_header(header, header.timestamp + 1, world.AUTHORITY.address, extra)
        name = bytes(header.hash)
        sealed = SealedBlock(rlp.encode(header), (), seal.Certificate(chain.tip.epoch, name, header.block_number, ()))
        record = BlockRecord(header.block_number, name, header.timestamp, transactions)
        chain.store.commit([(sealed, record, rlp.encode([]))], {}, ())


def start(path: Path, snapshot_events: int = 1 << 40) -> dict[str, float]:
    """One start in a process of its own; with `snapshot_events` 1 it keeps a snapshot at its end."""
    command = [sys.executable, "-c", START, str(path), str(snapshot_events)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def starts(
    config: GenesisConfig, work: Callable[[int], list[TransactionRecord]]
) -> dict[tuple[int, str], list[dict[str, float]]]:
    """RUNS starts of each size, from genesis and from a snapshot."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for size in SIZES:
        transactions = work(size)
        models = sum(isinstance(event, events.ModelRegistered) for done in transactions for event in done.events)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "ledger"
            with world.open_chain(path, config) as chain:
                blocks = range(0, size, BLOCK_TRANSACTIONS)
                grow(chain, [tuple(transactions[at : at + BLOCK_TRANSACTIONS]) for at in blocks])
            found[size, "genesis"] = [start(path) for _ in range(RUNS)]
            start(path, snapshot_events=1)
            found[size, "a snapshot"] = [start(path) for _ in range(RUNS)]
        for (_, source), runs in found.items():
            assert all(run["snapshot"] == (source != "genesis") for run in runs)
        for source in ("genesis", "a snapshot"):
            assert all(run["models"] == models for run in found[size, source]), "the registry is not the chain's"
            assert all(run["number"] == size // BLOCK_TRANSACTIONS for run in found[size, source])
    return found


def large_state() -> State:
    """MODELS models, each announced by NODES nodes, five shards each."""
    nodes = [NodeId(f"12D3KooW{number:044d}") for number in range(NODES)]
    keys = [(ModelId(f"model-{number}"), Version("1")) for number in range(MODELS)]
    held = Map((node, frozenset(range(number % 11, number % 11 + 5))) for number, node in enumerate(nodes))
    return State(shards=ShardIndex(Map((key, held) for key in keys)))


def timed_ms(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return (time.perf_counter() - began) * 1000


def _made_and_read(now: state.State) -> state.State:
    return state.decode(state.encode(now))


def hashing() -> list[report.Row]:
    first, again, kept = [], [], []
    for _ in range(RUNS):
        now, hasher = large_state(), StateHasher()
        first.append(timed_ms(partial(hasher.hash, now, Accounts())))
        event = events.ShardsAnnounced(NodeId("12D3KooWnew"), ModelId("model-7"), Version("1"), (1,))
        moved = state.apply(now, event, TransactionHash(bytes(32)))
        again.append(timed_ms(partial(hasher.hash, moved, Accounts())))
        gc.disable()  # as node.replay does
        kept.append(timed_ms(partial(_made_and_read, now)))
        gc.enable()
    what = f"{MODELS * NODES:,} announcements"
    goals = [[goal] * RUNS for goal in (HASH_MS_GOAL, AGAIN_MS_GOAL, START_S_GOAL * 1000)]
    return [
        report.compared(f"state hash, {what}, the first", "ms", first, "the goal", goals[0], 1.0, less_is_better=True),
        report.compared("the same after one more", "ms", again, "the goal", goals[1], 1.0, less_is_better=True),
        report.compared(
            f"snapshot of {what}, made and read", "ms", kept, "the goal", goals[2], 1.0, less_is_better=True
        ),
    ]


def rows(config: GenesisConfig, work: Callable[[int], list[TransactionRecord]]) -> list[report.Row]:
    """`work` makes the records of so many transactions."""
    found = starts(config, work)
    made = []
    for (size, source), runs in found.items():
        seconds, goal = [run["s"] for run in runs], [START_S_GOAL] * RUNS
        what = f"start with {size:,} transactions, from {source}"
        made.append(report.compared(what, "s", seconds, "the goal", goal, 1.0, less_is_better=True))
    middle, largest = SIZES[-2:]
    for source in ("genesis", "a snapshot"):
        for unit, scale, name in (("us", 1e6, "s"), ("bytes", 1.0, "bytes")):
            ours = [run[name] / largest * scale for run in found[largest, source]]
            less = [run[name] / middle * scale for run in found[middle, source]]
            what = f"start from {source}, for each of {largest:,} transactions"
            made.append(report.compared(what, unit, ours, f"of {middle:,}", less, LINEAR_GOAL, less_is_better=True))
    return made + hashing()
