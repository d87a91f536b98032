"""A swarm with limits: one seeder and eight nodes, each allowed the same rate both ways by the program's own limits.

Every node is a process with the data plane it has in the product: it fetches, and serves what it has. It is told of
the seeder alone, as by the ledger when one node has announced a shard, and finds the others through those it asks.
Beside it libtorrent, whose nodes are told of all others at once, as by a tracker. What counts is when the last node is
done, against the least time there is: Kumar and Ross, "Peer-Assisted File Distribution: The Minimum Distribution
Time", IEEE HotWeb 2006.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from subprocess import Popen

import psutil
import trio

from contracts.types import NodeId
from node.network.addresses import DataAddress
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.pace import Pace
from node.network.server import DataServer
from node.network.sources import PeerSource
from node.storage.manifest import Manifest
from node.storage.store import ShardStore
from tests.benchmarks import report
from tests.benchmarks.processes import line, running, tell

NODES = 8
RATE = 4 << 20
"""Bytes a second, up and down, of every node and the seeder: nine processes are then far from filling two cores."""
SIZE = 128 << 20
RUNS = 3
BOUND_TIMES_MAX = 1.3


def bound_s(size_bytes: int, seeder_up: float, ups: Sequence[float], downs: Sequence[float]) -> float:
    """The least time in which the last of the nodes can have `size_bytes`: no node and no seeder is faster than its
    link, and all copies have to leave somewhere. Rates in bytes a second."""
    all_together = len(ups) * size_bytes / (seeder_up + sum(ups))
    return max(size_bytes / seeder_up, size_bytes / min(downs), all_together)


BOUND_S = bound_s(SIZE, RATE, [RATE] * NODES, [RATE] * NODES)


@dataclass(frozen=True)
class Outcome:
    """One run."""

    seconds: float
    """From the word to begin until the last node had everything, proved."""
    seeder_copies: float
    """How often the seeder sent the whole: once is the least there is."""
    cores: float
    """How many cores its processes kept busy."""


def node(root: Path) -> None:
    """Serve the one shard whose manifest is in the store at `root`, fetch it first when told to."""

    async def main() -> None:
        identity, store = NodeIdentity.generate(), ShardStore(root, reserve_bytes=0)
        members: dict[NodeId, PeerSource] = {}
        fetcher = Fetcher(
            store,
            identity,
            locate=lambda node_id: [members[node_id]] if node_id in members else [],
            pace=Pace(RATE),
        )
        token = trio.lowlevel.current_trio_token()
        server = DataServer(
            identity,
            store,
            is_member=members.__contains__,
            listen_host="127.0.0.1",
            listen_port=0,
            on_asked=lambda shard_hash, node_id: token.run_sync_soon(fetcher.hear_of, shard_hash, node_id),
            coming=fetcher.coming,
            pace=Pace(RATE),
        )
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(server.run)
            print(json.dumps([identity.node_id, port]), flush=True)
            for name, at in json.loads(await _told()):
                members[NodeId(name)] = PeerSource(NodeId(name), DataAddress("127.0.0.1", at))
            (manifest_hash,) = store.manifests()
            (shard,) = store.manifest(manifest_hash).shards
            if seeder := await _told():
                await fetcher.fetch_shard(shard, [members[NodeId(seeder)]])
                print(time.monotonic(), flush=True)
            await _told()
            print(server.statistics().bytes_served, flush=True)
            nursery.cancel_scope.cancel()

    trio.run(main)


async def _told() -> str:
    text: str = await trio.to_thread.run_sync(sys.stdin.readline)
    return text.strip()


def ours(root: Path, manifest: Manifest, held: Path) -> Outcome:
    """One run in `root`; `held` is the shard's file, which the seeder has."""
    with ExitStack() as stack:
        folders = [root / f"node-{number}" for number in range(NODES + 1)]
        for folder in folders:
            ShardStore(folder, reserve_bytes=0).put_manifest(manifest.encode(), manifest.manifest_hash())
        os.link(held, folders[0] / "shards" / held.name)
        command = [sys.executable, "-m", "tests.benchmarks.swarm", "node"]
        seeder, *nodes = [stack.enter_context(running([*command, str(folder)])) for folder in folders]
        members = [json.loads(line(process)) for process in (seeder, *nodes)]
        for process in (seeder, *nodes):
            tell(process, json.dumps(members))
        tell(seeder, "")
        used, began = _cpu_s(seeder, *nodes), time.monotonic()
        for process in nodes:
            tell(process, members[0][0])
        ended = max(float(line(process)) for process in nodes)
        used = _cpu_s(seeder, *nodes) - used
        tell(seeder, "")
        served = int(line(seeder))
    for folder in folders[1:]:
        assert (folder / "shards" / held.name).stat().st_size == SIZE
    return Outcome(ended - began, served / SIZE, used / (ended - began))


def _cpu_s(*processes: Popen[str]) -> float:
    """The seconds that they have computed."""
    return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in processes)


def libtorrent(root: Path, held: Path) -> Outcome:
    """The same with libtorrent."""
    with ExitStack() as stack:
        command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.torrent", "swarm", str(held), str(RATE)]
        folders = [held.parent, *(root / f"torrent-{number}" for number in range(NODES))]
        seeder = stack.enter_context(running([*command, str(held.parent)]))
        ports = [int(line(seeder))]  # it has made the torrent file by then
        nodes = [stack.enter_context(running([*command, str(folder)])) for folder in folders[1:]]
        ports += [int(line(process)) for process in nodes]
        used, began = _cpu_s(seeder, *nodes), time.monotonic()
        for process in (seeder, *nodes):
            tell(process, json.dumps(ports))
        ended = max(float(line(process)) for process in nodes)
        used = _cpu_s(seeder, *nodes) - used
        tell(seeder, "")
        line(seeder)  # when it began
        served = int(line(seeder))
    return Outcome(ended - began, served / SIZE, used / (ended - began))


def measure(root: Path, manifest: Manifest) -> tuple[list[report.Row], str]:
    """The rows of the swarm, and what is to be known of them; `root` has a store with the one shard of `manifest`."""
    held = root / "store" / "shards" / manifest.shards[0].sha256.hex()
    has_peer = importlib.util.find_spec("libtorrent") is not None
    mine: list[Outcome] = []
    theirs: list[Outcome] = []
    for run in range(RUNS):
        folder = root / f"run-{run}"
        folder.mkdir()
        mine.append(ours(folder, manifest, held))
        if has_peer:
            theirs.append(libtorrent(folder, held))
        shutil.rmtree(folder)
    what = f"the last of {NODES} nodes has {SIZE >> 20} MiB, {RATE >> 20} MiB/s each way for all"
    own = [outcome.seconds for outcome in mine]
    goal = round(1 / BOUND_TIMES_MAX, 4)
    rows = [report.compared(what, "s", own, "the bound", [BOUND_S] * RUNS, goal, less_is_better=True)]
    if has_peer:
        peer = [outcome.seconds for outcome in theirs]
        rows.append(report.compared(what, "s", own, "libtorrent v2", peer, None, less_is_better=True))
    return rows, _said(mine, theirs)


def _said(mine: list[Outcome], theirs: list[Outcome]) -> str:
    def of(outcomes: list[Outcome]) -> str:
        times = ", ".join(f"{outcome.seconds / BOUND_S:.2f}" for outcome in outcomes)
        copies = median(outcome.seeder_copies for outcome in outcomes)
        cores = median(outcome.cores for outcome in outcomes)
        return f"{times} times the bound, the seeder sent {copies:.2f} copies, its processes used {cores:.2f} cores"

    said = (
        f"the swarm: medians of {RUNS} runs in turns, load {os.getloadavg()[0]:.1f} at the end; "
        f"ours {of(mine)} of {psutil.cpu_count()}, which are not the limit"
    )
    if theirs:
        return f"{said}; libtorrent, super seeding, all unchoked at once and told of all others, {of(theirs)}"
    return f"{said}; libtorrent is not installed"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["node", folder]:
            node(Path(folder))
