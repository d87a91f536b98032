"""`make bench-swarm`: 10 to 10,000 nodes fetch the same shard at once, simulated: when the last one has it, and at what
cost to each.

The planner, the flights and the limits are the product's own, the links are made up and the time is virtual: see
`tests.node.network.fetching.simulated`. So the times do not depend on this machine; the memory is that of this process,
with what the simulation needs itself. Each size has a process of its own. AIGEN_BENCH_NODES names other sizes,
AIGEN_BENCH_MIB the size of the shard and AIGEN_BENCH_RATE_MIB everybody's rate. 10,000 nodes take half an hour.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import subprocess
import sys
import time

import psutil

from tests.benchmarks import report
from tests.benchmarks.swarm import bound_s
from tests.node.network.fetching.simulated import Swarm

NODES = [int(text) for text in os.environ.get("AIGEN_BENCH_NODES", "10,100,1000,10000").split(",")]
PIECES = int(os.environ.get("AIGEN_BENCH_MIB", "16"))
RATE = int(os.environ.get("AIGEN_BENCH_RATE_MIB", "8")) << 20
"""Bytes a second, up and down, of the seeder and of every node."""
SEED = 0


def simulate(nodes: int) -> None:
    """One size; prints what is to be known of it as JSON."""
    logging.disable(logging.CRITICAL)  # a slow source is a warning, and here are thousands
    before = psutil.Process().memory_info().rss
    swarm = Swarm(nodes, PIECES, RATE, SEED)
    gc.set_threshold(200_000, 20, 50)  # millions of live objects: looking at them all again and again takes longest
    began = time.monotonic()
    outcome = swarm.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    told = {
        "last_s": outcome.done_s[-1],
        "median_s": outcome.done_s[nodes // 2],
        "messages": outcome.messages.total() / nodes,
        "by_kind": {kind: round(count / nodes, 1) for kind, count in outcome.messages.items()},
        "memory": (peak - before) / nodes,
        "seeder_copies": outcome.seeder_pieces / PIECES,
        "sent": outcome.pieces_served / nodes / PIECES,
        "attempts": outcome.attempts / nodes,
        "took_s": time.monotonic() - began,
    }
    print(json.dumps(told), flush=True)


def main() -> None:
    rows = []
    for nodes in NODES:
        command = [sys.executable, "-m", "tests.benchmarks.crowd", str(nodes)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(done.stdout)
        print(nodes, told, flush=True)
        bound = bound_s(PIECES << 20, RATE, [RATE] * nodes, [RATE] * nodes)
        cost = f"{told['messages']:,.0f} messages, {told['memory'] / 1e3:,.0f} kB a node"
        ratio = round(bound / told["last_s"], 3)
        ours = f"{told['last_s']:.1f} s ({1 / ratio:.2f} times); {cost}"
        rows.append(report.Row(f"the last of {nodes:,} nodes", ours, f"the bound: {bound:.1f} s", ratio, None, None))
    note = (
        f"simulated, seed {SEED}: {PIECES} MiB in pieces of 1 MiB, {RATE >> 20} MiB/s each way for the seeder and all "
        "nodes, 4 to 49 ms between two; all begin at once and know the seeder and the list of members; the memory is "
        "with the simulation's own"
    )
    report.publish("swarm", rows, note)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case [count]:
            simulate(int(count))
