"""The row of `make bench-ledger` about joining a chain: fast, beside executing every block of it. In one process, from
one store into another, so that no network is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from genesis.config import GenesisConfig
from ledger.chain import Chain
from ledger.history import History
from ledger.staging import Staging
from node.network.messages import BLOCKS_BYTES_MAX, BLOCKS_MAX, NODES_BYTES_MAX, NODES_MAX
from tests.benchmarks import report
from tests.ledger import world

RUNS = 3
FAST_GOAL = 2.0


def joined(source: Chain, config: GenesisConfig) -> float:
    """Seconds to join the chain in portions as a peer would send them, to the head and its state."""
    history = History(source, lambda: 0)
    with TemporaryDirectory() as folder, world.open_chain(Path(folder) / "ledger", config) as chain:
        began = time.perf_counter()
        staging = Staging(chain)
        while staging.tip.number < source.tip.number:
            parcels = history.parcels(staging.tip.number + 1, BLOCKS_MAX, BLOCKS_BYTES_MAX)
            staging.stage(parcels, float(source.tip.header.timestamp))
        while not staging.is_whole:
            if asked := staging.wanted(NODES_MAX):
                staging.give(asked, history.state_nodes(asked, NODES_BYTES_MAX))
        staging.end((), ())
        took_s = time.perf_counter() - began
        assert chain.store.head() == (source.tip.number, source.tip.hash)
        return took_s


def row(
    config: GenesisConfig,
    blocks: list[bytes],
    count: int,
    execute: Callable[[list[bytes], int], float],
    forget: Callable[[], None],
) -> report.Row:
    """`execute` gives the transactions a second of importing the blocks, `forget` empties caches before each run."""
    fast: list[float] = []
    executed: list[float] = []
    with TemporaryDirectory() as folder, world.open_chain(Path(folder) / "ledger", config) as source:
        for block in blocks:
            world.import_block(source, block)
        for _ in range(RUNS):
            executed.append(execute(blocks, count))
            forget()
            fast.append(count / joined(source, config))
    what = f"join a chain of {count:,} transactions without executing it"
    return report.compared(what, "tx/s", fast, "executing it", executed, FAST_GOAL)
