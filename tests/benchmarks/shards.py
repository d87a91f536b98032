"""`make bench-shards`: one shard from another process, proved, beside curl + sha256sum on the same bytes and disk.

Ours is the whole of it: TLS with the pinned key, each piece's SHA-256 before it counts, the shard's SHA-256, fsync and
rename. The peer's is a plain file over plain HTTP, hashed once afterwards, not synced.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import trio

from contracts.types import PIECE_SIZE
from node.network.addresses import parse_data
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.server import DataServer
from node.network.sources import PeerSource
from node.storage.manifest import ManifestShard
from node.storage.store import ShardStore
from tests.benchmarks import report
from tests.node.network.artifacts import make, put

SHARD_SIZE = 128 << 20
RUNS = 5
GOAL = 1.0
"""As fast as tools that prove less; what lies above it is the business of many sources at once."""


def serve(root: Path) -> None:
    """The other process: a data server over the store in `root`, and an HTTP server over the same file."""
    identity = NodeIdentity.load(root / "server.key")

    async def main() -> None:
        server = DataServer(
            identity, ShardStore(root / "store"), is_member=lambda _: True, listen_host="127.0.0.1", listen_port=0
        )
        handler = partial(_Quiet, directory=str(root / "store" / "shards"))
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, http.serve_forever, abandon_on_cancel=True))
            port: int = await nursery.start(server.run)
            sys.stdout.write(f"{port} {http.server_port}\n")
            sys.stdout.flush()

    trio.run(main)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """A line for each request would be measured too."""


@contextmanager
def other_process(root: Path) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-m", "tests.benchmarks.shards", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        data_port, http_port = map(int, process.stdout.readline().split())
        try:
            yield data_port, http_port
        finally:
            process.kill()


async def ours(root: Path, shard: ManifestShard, source: PeerSource) -> float:
    """MB/s of one fetch into an empty store."""
    target = Path(tempfile.mkdtemp(prefix="ours-", dir=root))
    fetcher = Fetcher(ShardStore(target), NodeIdentity.load(root / "client.key"))
    began = time.perf_counter()
    await fetcher.fetch_shard(shard, [source])
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return shard.size / seconds / 1e6


def peers(root: Path, shard: ManifestShard, port: int) -> float:
    """MB/s of curl and then sha256sum."""
    target, name = root / "curl", shard.sha256.hex()
    began = time.perf_counter()
    subprocess.run(["curl", "-sS", "-o", target, f"http://127.0.0.1:{port}/{name}"], check=True)
    found = subprocess.run(["sha256sum", target], check=True, capture_output=True, text=True).stdout.split()[0]
    seconds = time.perf_counter() - began
    assert found == name
    target.unlink()
    return shard.size / seconds / 1e6


def versions() -> str:
    curl = subprocess.run(["curl", "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    tool = subprocess.run(["sha256sum", "--version"], check=True, capture_output=True, text=True).stdout.split("\n")[0]
    return f"curl {curl} + sha256sum {tool.split()[-1]}"


async def main() -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="bench-shards-") as folder:
        root = Path(folder)
        server = NodeIdentity.create(root / "server.key")
        NodeIdentity.create(root / "client.key")
        manifest, data = make(SHARD_SIZE, SHARD_SIZE, seed)
        put(ShardStore(root / "store"), manifest, data)
        del data
        with other_process(root) as (data_port, http_port):
            source = PeerSource(server.node_id, parse_data(f"aigen+tls://127.0.0.1:{data_port}"))
            pairs = []
            for run in range(RUNS + 1):
                pair = await ours(root, manifest.shards[0], source), peers(root, manifest.shards[0], http_port)
                if run:  # the first only warms up
                    pairs.append(pair)
    what = f"fetch and prove one shard of {SHARD_SIZE >> 20} MiB in pieces of {PIECE_SIZE >> 20} MiB"
    rows = [report.compared(what, "MB/s", [a for a, _ in pairs], versions(), [b for _, b in pairs], GOAL)]
    report.publish("shards", rows, "one source, loopback, median of " + str(RUNS))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(Path(sys.argv[1]))
    else:
        trio.run(main)
