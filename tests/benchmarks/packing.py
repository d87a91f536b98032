"""Weights from a node in another process over links of several speeds: packed where that is faster, beside as they are.

Part of `make bench-shards`. The link is the limit of the node that serves. Both sides are the whole of a fetch, and
what the connection spends on finding out which way is faster is in it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from contracts.types import PIECE_SIZE, NodeId
from node.network.addresses import parse_data
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.pace import Pace
from node.network.server import DataServer
from node.network.sources import PeerSource
from node.storage.manifest import ManifestShard
from node.storage.store import ShardStore
from tests.benchmarks import report
from tests.node.network.artifacts import describe, put, weights

SIZE = 128 * PIECE_SIZE
RUNS = 3
LINKS = {20_000_000: 1.2, 100_000_000: None, 0: None}
"""Bytes a second, 0 for loopback without a limit, and the goal."""


def serve(root: Path, rate: int) -> None:
    async def main() -> None:
        identity, store = NodeIdentity.generate(), ShardStore(root, reserve_bytes=0)
        server = DataServer(
            identity, store, is_member=lambda _: True, listen_host="127.0.0.1", listen_port=0, pace=Pace(rate)
        )
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(server.run)
            print(port, identity.node_id, flush=True)

    trio.run(main)


@contextmanager
def peer(root: Path, rate: int) -> Iterator[PeerSource]:
    command = [sys.executable, "-m", "tests.benchmarks.packing", str(root), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port, node_id = process.stdout.readline().split()
            yield PeerSource(NodeId(node_id), parse_data(f"aigen+tls://127.0.0.1:{port}"))
        finally:
            process.kill()


def fetched(root: Path, shard: ManifestShard, source: PeerSource, compression: bool) -> float:
    """MB/s of one fetch into an empty store."""
    folder = Path(tempfile.mkdtemp(prefix="target-", dir=root))
    try:
        fetcher = Fetcher(ShardStore(folder, reserve_bytes=0), NodeIdentity.generate(), compression=compression)
        began = time.perf_counter()
        trio.run(fetcher.fetch_shard, shard, [source])
        return shard.size / (time.perf_counter() - began) / 1e6
    finally:
        shutil.rmtree(folder)


def rows(root: Path) -> list[report.Row]:
    store = root / "weights"
    manifest, shards = describe(weights(SIZE), SIZE)
    put(ShardStore(store, reserve_bytes=0), manifest, shards)
    found = []
    for rate, goal in LINKS.items():
        link = f"a link of {rate // 1_000_000} MB/s" if rate else "loopback without a limit"
        speeds: dict[bool, list[float]] = {True: [], False: []}
        with peer(store, rate) as source:
            for _ in range(RUNS):
                for compression, measured in speeds.items():
                    measured.append(fetched(root, manifest.shards[0], source, compression))
        what = f"fetch {SIZE >> 20} MiB of bf16 weights over {link}, packed where that is faster"
        found.append(report.compared(what, "MB/s", speeds[True], "as they are", speeds[False], goal))
    return found


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
