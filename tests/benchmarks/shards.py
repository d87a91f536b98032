"""`make bench-shards`: one shard from other processes, proved and stored, beside aria2c, libtorrent, curl + sha256sum.

All take the same bytes over loopback into the same folder, and what they leave is synced to the disk on every side.
Ours is the whole of it: each piece's SHA-256 before it counts, the shard's SHA-256, rename; over TLS with the pinned
key, or from a mirror over plain HTTP. AIGEN_BENCH_DIR names the folder; without it a file system in memory is taken
where there is one, so that the cores are the limit and not the disk. What is not installed is left out, and said.
Then a swarm of limited nodes, see `tests.benchmarks.swarm`; `python -m tests.benchmarks.shards swarm` is that alone.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import trio

from contracts.types import PIECE_SIZE, NodeId, ShardHash
from node.network.addresses import parse_data
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.server import DataServer
from node.network.sources import MirrorSource, PeerSource, Source
from node.storage.manifest import Manifest, ManifestFile, ManifestShard
from node.storage.store import ShardStore
from tests.benchmarks import cutting, packing, report, swarm
from tests.benchmarks.processes import line, running

SIZE = int(os.environ.get("AIGEN_BENCH_MIB", "2048")) << 20
RUNS = 3
SOURCES = 3
LIE_AT = 10
FASTEST_GOAL, BARE_GOAL, TLS_GOAL, SOURCES_GOAL = 1.5, 0.7, 1.0, 1.0
WASTE_MAX = 0.01
"""Of the shard's bytes, for one corrupted piece."""

NGINX = """\
daemon off; master_process off; pid {root}/nginx.pid; error_log stderr; events {{}}
http {{ access_log off; sendfile on; client_body_temp_path {root}/t1; proxy_temp_path {root}/t2;
fastcgi_temp_path {root}/t3; uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
server {{ listen 127.0.0.1:{port}; location / {{ root {root}/store; }} }} }}
"""


# Other processes


def serve(root: Path, lies: bool) -> None:
    """A data server over the store in `root`; one that lies flips a bit of the tenth piece it gives."""

    async def main() -> None:
        identity, store = NodeIdentity.generate(), ShardStore(root / "store")
        kind = _LyingServer if lies else DataServer
        server = kind(identity, store, is_member=lambda _: True, listen_host="127.0.0.1", listen_port=0)
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(server.run)
            print(port, identity.node_id, flush=True)

    trio.run(main)


class _LyingServer(DataServer):
    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        honest = self._shelf.piece

        given = itertools.count(1)

        def piece(shard_hash: ShardHash, index: int, buffer: bytearray | None = None) -> memoryview:
            data = honest(shard_hash, index, buffer)
            if next(given) == LIE_AT:
                data[0] ^= 1
            return data

        self._shelf.piece = piece  # type: ignore[method-assign]


@contextmanager
def peer(root: Path, lies: bool = False) -> Iterator[PeerSource]:
    command = [sys.executable, "-m", "tests.benchmarks.shards", "peer", str(root), *(["lies"] if lies else [])]
    with running(command) as process:
        port, node_id = line(process).split()
        yield PeerSource(NodeId(node_id), parse_data(f"aigen+tls://127.0.0.1:{port}"))


@contextmanager
def web(root: Path) -> Iterator[str]:
    """The same store over HTTP: nginx, or the server of the standard library, which knows no ranges."""
    if shutil.which("nginx") is None:
        with running([sys.executable, "-m", "tests.benchmarks.shards", "http", str(root)]) as process:
            yield f"http://127.0.0.1:{line(process)}"
            return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port))
    with running(["nginx", "-p", str(root), "-c", str(root / "nginx.conf")]):
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"


def serve_http(root: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(root / "store")))
    print(server.server_port, flush=True)
    server.serve_forever()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """A line for each request would be measured too."""


# The contenders; each returns MB/s


@dataclass(frozen=True)
class Bench:
    root: Path
    shard: ManifestShard
    url: str

    @property
    def file(self) -> Path:
        return self.root / "store" / "shards" / self.shard.sha256.hex()

    def timed(self, fetch: Callable[[Path], None]) -> float:
        """MB/s of filling an empty folder, synced."""
        folder = Path(tempfile.mkdtemp(prefix="target-", dir=self.root))
        try:
            began = time.perf_counter()
            fetch(folder)
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            return self.shard.size / (time.perf_counter() - began) / 1e6
        finally:
            shutil.rmtree(folder)

    def ours(self, *sources: Source) -> float:
        def fetch(folder: Path) -> None:
            fetcher = Fetcher(ShardStore(folder), NodeIdentity.generate())
            trio.run(fetcher.fetch_shard, self.shard, sources)

        return self.timed(fetch)

    def bare(self) -> float:
        """recv_into and write, nothing proved."""

        def fetch(folder: Path) -> None:
            host, _, port = self.url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port))) as sock, (folder / "bare").open("wb", 0) as file:
                request = f"GET /shards/{self.file.name} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
                sock.sendall(request.encode())
                buffer = memoryview(bytearray(PIECE_SIZE))
                while count := sock.recv_into(buffer):
                    file.write(buffer[:count])

        return self.timed(fetch)

    def curl(self) -> float:
        def fetch(folder: Path) -> None:
            target = folder / "curl"
            subprocess.run(["curl", "-sS", "-o", target, f"{self.url}/shards/{self.file.name}"], check=True)
            found = subprocess.run(["sha256sum", target], check=True, capture_output=True, text=True).stdout.split()[0]
            assert found == self.file.name

        return self.timed(fetch)

    def aria2c(self, connections: int) -> float:
        def fetch(folder: Path) -> None:
            options = ["-q", f"-x{connections}", f"-s{connections}", "-k1M", "--file-allocation=none"]
            checked = [f"--checksum=sha-256={self.file.name}", "-V", f"-d{folder}"]
            subprocess.run(["aria2c", *options, *checked, f"{self.url}/shards/{self.file.name}"], check=True)

        return self.timed(fetch)

    def libtorrent(self, port: int) -> float:
        seconds = 0.0

        def fetch(folder: Path) -> None:
            program = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.torrent", "fetch"]
            command = [*program, str(self.file), str(port), str(folder)]
            nonlocal seconds
            seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        self.timed(fetch)  # its start and imports are not counted, only what it took itself
        return self.shard.size / seconds / 1e6


def wasted(bench: Bench, honest: Source, liar: Source, root: Path) -> float:
    """The part of the shard's bytes that came in vain because one piece of one source is corrupted."""
    folder = Path(tempfile.mkdtemp(prefix="target-", dir=root))
    fetcher = Fetcher(ShardStore(folder), NodeIdentity.generate())
    received = 0
    real = fetcher._means.pace.take

    def count(share: object, size_bytes: int) -> None:
        nonlocal received
        received += size_bytes
        real(share, size_bytes)  # type: ignore[arg-type]

    fetcher._means.pace.take = count  # type: ignore[method-assign]
    trio.run(fetcher.fetch_shard, bench.shard, [honest, liar])
    shutil.rmtree(folder)
    return (received - bench.shard.size) / bench.shard.size


def make_shard(root: Path, size: int) -> Manifest:
    """A held shard of `size` random bytes. A block is repeated with a number in it: nothing here compresses."""
    store, block = ShardStore(root / "store", reserve_bytes=0), random.randbytes(PIECE_SIZE - 8)
    whole, pieces = sha256(), bytearray()
    (root / "store" / "scratch" / "made").touch()
    with (root / "store" / "scratch" / "made").open("wb") as file:
        for index in range(size // PIECE_SIZE):
            piece = index.to_bytes(8) + block
            whole.update(piece)
            pieces += sha256(piece).digest()
            file.write(piece)
    shard = ManifestShard(ShardHash(whole.digest()), size, bytes(pieces))
    os.replace(root / "store" / "scratch" / "made", root / "store" / "shards" / shard.sha256.hex())
    files = (ManifestFile("weights.bin", size, whole.digest()),)
    manifest = Manifest(1, size, PIECE_SIZE, files, (shard,))
    store.put_manifest(manifest.encode(), manifest.manifest_hash())
    return manifest


def measure(root: Path) -> None:
    results: dict[str, list[float]] = {}
    with ExitStack() as stack:
        (shard,) = make_shard(root, SIZE).shards
        bench = Bench(root, shard, stack.enter_context(web(root)))
        peers = [stack.enter_context(peer(root)) for _ in range(SOURCES)]
        mirror = MirrorSource(bench.url)
        contenders: dict[str, Callable[[], float]] = {
            "ours, TLS": lambda: bench.ours(peers[0]),
            f"ours, TLS from {SOURCES} peers": lambda: bench.ours(*peers),
            "bare loop": bench.bare,
            "curl + sha256sum": bench.curl,
        }
        if shutil.which("nginx"):
            contenders["ours, mirror"] = lambda: bench.ours(mirror)
        if shutil.which("aria2c"):
            contenders |= {f"aria2c -x{count}": partial(bench.aria2c, count) for count in (1, 4)}
        if importlib.util.find_spec("libtorrent"):
            seeder = stack.enter_context(
                running([sys.executable, "-W", "ignore", "-m", "tests.benchmarks.torrent", "seed", str(bench.file)])
            )
            contenders["libtorrent v2"] = partial(bench.libtorrent, int(line(seeder)))
        for run in range(RUNS + 1):
            for name, contender in contenders.items():
                speed = contender()
                if run:  # the first only warms up
                    results.setdefault(name, []).append(speed)
        liar = stack.enter_context(peer(root, lies=True))
        waste = wasted(bench, peers[0], liar, root)
    (root / "swarm").mkdir()
    limited, said = swarm.measure(root / "swarm", make_shard(root / "swarm", swarm.SIZE))
    more = [*packing.rows(root), cutting.row(root, SIZE // 2), *limited]
    publish(results, waste, root, more, said)


def publish(results: dict[str, list[float]], waste: float, root: Path, more: Sequence[report.Row], said: str) -> None:
    """`more` are the rows that others measured, and `said` what is to be known of them."""
    ours, several = results["ours, TLS"], results[f"ours, TLS from {SOURCES} peers"]
    plain = results.get("ours, mirror", ours)
    others = {name: speeds for name, speeds in results.items() if not name.startswith(("ours", "bare"))}
    fastest = max(others, key=lambda name: median(others[name]))
    what = f"fetch, prove and store {SIZE >> 20} MiB"

    def row(how: str, mine: list[float], peer_name: str, peer: list[float], goal: float | None) -> report.Row:
        return report.compared(f"{what}, {how}", "MB/s", mine, peer_name, peer, goal)

    rows = [
        row("the faster of the two below", max(ours, plain, key=median), fastest, others[fastest], FASTEST_GOAL),
        row("from a mirror over HTTP", plain, "bare loop", results["bare loop"], BARE_GOAL),
    ]
    for name, speeds in others.items():
        rows.append(row("over TLS", ours, name, speeds, TLS_GOAL if name == "aria2c -x1" else None))
    rows.append(row(f"over TLS from {SOURCES} peers", several, "from one", ours, SOURCES_GOAL))
    added, ratio = f"{waste:.3%}", round(WASTE_MAX / max(waste, 1e-6), 2)
    rows.append(
        report.Row("bytes that one corrupted piece adds", added, f"at most {WASTE_MAX:.0%}", ratio, 1.0, ratio >= 1)
    )
    missing = [name for name in ("aria2c", "libtorrent v2") if not any(name in key for key in results)]
    note = f"loopback, medians of {RUNS}, synced, in {root.parent}, nginx and ours as servers"
    rows += more
    report.publish("shards", rows, note + (f"; not installed: {', '.join(missing)}" if missing else "") + "; " + said)


def folder() -> str | None:
    """Where to work: a file system in memory when it has room for the shard and two copies."""
    if chosen := os.environ.get("AIGEN_BENCH_DIR"):
        return chosen
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 4 * SIZE else None


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            with tempfile.TemporaryDirectory(prefix="bench-shards-", dir=folder()) as made:
                measure(Path(made))
        case ["swarm"]:
            with tempfile.TemporaryDirectory(prefix="bench-swarm-", dir=folder()) as made:
                rows, said = swarm.measure(Path(made), make_shard(Path(made), swarm.SIZE))
                report.publish("shards-swarm", rows, said)
        case ["http", root]:
            serve_http(Path(root))
        case ["peer", root, *lies]:
            serve(Path(root), bool(lies))
