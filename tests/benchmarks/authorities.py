"""The rows of `make bench-ledger` about deciding on blocks: what it costs each node, by the number of authorities.

All authorities run in one process under a virtual clock (tests.ledger.simulation), with real agreement, signatures,
ledgers and stores, messages that take 2 ms on average, and a stand-in for the EVM: what is measured is agreement alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from tests.benchmarks import report
from tests.ledger import world
from tests.ledger.simulation import SENDERS, Simulation, Weather, simulate

COUNTS = (4, 7, 16, 31)
BLOCKS = 5
RUNS = 3
MESSAGE_S = 0.002


async def decide(simulation: Simulation) -> None:
    """A transaction, a block, and so on."""
    simulation.weather = Weather(delay_s=MESSAGE_S)
    await trio.sleep(1)
    first = simulation.nodes[0]
    for _ in range(BLOCKS):
        assert first.ledger is not None
        number = first.ledger.head.number
        await simulation.submit(first, SENDERS[0], world.enrol(world.address(1)))
        await first.ledger.wait_head(number)
        await trio.sleep(2)


def measured(count: int, seed: int) -> float:
    """CPU milliseconds of one node for one block."""
    with TemporaryDirectory() as folder:
        began = time.process_time()
        simulation = simulate(Path(folder) / "nodes", seed, count, decide)
        spent = time.process_time() - began
    assert len(simulation.final) >= BLOCKS
    return 1000 * spent / count / len(simulation.final)


def rows() -> list[report.Row]:
    found = {count: [measured(count, seed) for seed in range(RUNS)] for count in COUNTS}
    few = COUNTS[0]
    return [
        report.compared(
            f"a block decided by {count} authorities, CPU of each",
            "ms",
            found[count],
            f"{few} authorities",
            found[few],
            None,
            less_is_better=True,
        )
        for count in COUNTS[1:]
    ]
