"""How soon a node answers while its engine generates and a model of 14.5 GB is loaded.

A node of a network of its own, as a process: a small model answers all the time, the large one is loaded through
`loadModel`, and `health` is asked over HTTP at fixed times. An answer that comes so late that the next question should
have been put makes the next late as well: each counts from when its question was due, or from when it was put if that
was later for the asker's own reasons.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from statistics import quantiles
from threading import Event, Thread

from contracts.types import ManifestHash
from node.inference.spec import ModelSpec
from node.storage.store import ShardStore
from tests.benchmarks import paging
from tests.benchmarks.processes import line, running, tell
from tests.benchmarks.report import Row
from tests.benchmarks.runtime import WORDS, spec_of
from tests.node.cluster import Cluster, Node, aigen, until

LARGE, SMALL = "mistral-7b", "small"
EVERY_S = 0.02
SAMPLES_MIN = 1000
LOAD_TIMEOUT_S = 60.0
"""Quantising takes minutes beside an answer: the node is stopped then."""
POLL_S = 0.1
P99_MS_MAX = 50.0
ANSWER_TOKENS = 64
ANSWER_TIMEOUT_S = 60.0
PRECISIONS = {"none": "loading as stored (page cache dropped, proved; then mapped)", "int8": "quantising to int8"}
ASKED = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "health"})


@contextmanager
def network(path: Path, shard_size: int) -> Iterator[tuple[Cluster, Node]]:
    """The node is not started yet; at the end it is killed."""
    cluster = Cluster(path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        cluster.new_key(name)
    assert cluster.new_genesis(cluster.genesis, "--shard-size", shard_size).json["shard_size"] == shard_size
    try:
        yield cluster, cluster.init("a", "worker")
    finally:
        cluster.kill_all()


def take_in(cluster: Cluster, node: Node, model_id: str, directory: Path, *options: str) -> ModelSpec:
    """`aigen model import`."""
    imported = aigen("model", "import", directory, *options, "--data-dir", node.data_dir, "--json").json
    cluster.manifests[model_id] = imported["manifest_hash"]
    store = ShardStore(node.data_dir / "store")
    manifest = store.manifest(ManifestHash(bytes.fromhex(imported["manifest_hash"].removeprefix("0x"))))
    return spec_of(f"{model_id}@1", manifest, store)


def rows(cluster: Cluster, node: Node, large: ModelSpec, progress: Callable[[str], None]) -> list[Row]:
    """Both models are in the node's store, and nothing is registered yet."""
    made: list[Row] = []
    for quantization, what in PRECISIONS.items():
        paging.drop(map(Path, large.shards))
        os.environ["AIGEN_INFERENCE_QUANTIZATION"] = quantization
        node.start()
        node.wait_ready()
        if not made:
            for model_id in (SMALL, LARGE):
                _publish(cluster, node, model_id)
        node.ask("loadModel", model_id=SMALL, wait=True)
        progress(f"health, {what}: the host takes the free pages back")
        paging.settle()
        loading = Found()
        with _generating(node) as answered:
            progress(f"health, {what}: nothing loading yet")
            quiet = Found()
            _asking(node, quiet, lambda: time.sleep(SAMPLES_MIN * EVERY_S))
            left = paging.resident(map(Path, large.shards))
            assert left <= paging.LEFT_MAX, f"{left:.1%} of the model came back to memory before the load"
            progress(f"health, {what}")
            tokens = answered.tokens
            while len(loading.delays_s) < SAMPLES_MIN:
                if loading.loads:
                    node.ask("unloadModel", model_id=LARGE)
                _asking(node, loading, lambda: _loaded(node, LOAD_TIMEOUT_S))
            tokens = answered.tokens - tokens
        made.append(_row(what, loading, quiet, tokens))
        node.stop()
    return made


def _loaded(node: Node, timeout_s: float) -> None:
    """Begin a load; return when it is done, or time is up."""
    deadline = time.monotonic() + timeout_s
    with node.rpc() as rpc:
        rpc.call("loadModel", model_id=LARGE)
        while (state := rpc.call("getLoadState", model_id=LARGE)["state"]) != "loaded" and time.monotonic() < deadline:
            assert state != "failed", node.log_tail()
            time.sleep(POLL_S)


def _publish(cluster: Cluster, node: Node, model_id: str) -> None:
    done = aigen(
        *("model", "publish", model_id, "--manifest", cluster.manifests[model_id], "--tier", "basic"),
        *("--key", cluster.key("admin"), "--data-dir", node.data_dir, "--rpc", node.url, "--json"),
    )
    assert done.json["succeeded"]
    until(lambda: set(node.copies(model_id)) == {1}, "the node has announced its shards", (node,))


@dataclass
class Found:
    """What was seen while something went on."""

    delays_s: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each time it went on."""
    reported_bytes: int = 0
    """Free pages that the host took back meanwhile: the machine stands still for that."""

    @property
    def loads(self) -> int:
        return len(self.seconds)

    @property
    def p99_ms(self) -> float:
        return 1000 * quantiles(self.delays_s, n=100)[-1]


def _asking(node: Node, found: Found, work: Callable[[], object]) -> None:
    """Ask for `health` all the while, from a process that does nothing else."""
    with running([sys.executable, "-m", "tests.benchmarks.responsive", str(node.rpc_port)]) as asker:
        assert line(asker) == "ready"
        started, reported = time.perf_counter(), paging.reported_bytes()
        work()
        found.seconds.append(time.perf_counter() - started)
        found.reported_bytes += paging.reported_bytes() - reported
        tell(asker, "over")
        found.delays_s += json.loads(line(asker))


def _asked(port: int, over: Event) -> list[float]:
    """How late each answer was."""
    delays_s = []
    connection = HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    due = done = time.perf_counter()
    while not over.is_set():
        time.sleep(max(0.0, due - time.perf_counter()))
        asked = due if done > due else time.perf_counter()
        connection.request("POST", "/", ASKED, {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        done = time.perf_counter()
        assert answer["result"]["status"] == "ready", answer
        delays_s.append(done - asked)
        due += EVERY_S
    connection.close()
    return delays_s


def main() -> None:
    """`python -m tests.benchmarks.responsive PORT`: asks until a line comes in, then tells how late each answer was."""
    over = Event()

    def wait() -> None:
        sys.stdin.readline()
        over.set()

    print("ready", flush=True)
    Thread(target=wait).start()
    print(json.dumps(_asked(int(sys.argv[1]), over)), flush=True)


@dataclass
class _Answered:
    tokens: int = 0


@contextmanager
def _generating(node: Node) -> Iterator[_Answered]:
    """One answer after the other, streamed."""
    found, over = _Answered(), Event()
    talker = Thread(target=_talk, args=(node, found, over))
    talker.start()
    try:
        yield found
    finally:
        over.set()
        talker.join()
    assert found.tokens, "nothing was generated"


def _talk(node: Node, found: _Answered, over: Event) -> None:
    messages = [{"role": "user", "content": WORDS}]
    with node.rpc() as rpc:
        while not over.is_set():
            stream = rpc.stream("chatCompletion", model_id=SMALL, messages=messages, max_tokens=ANSWER_TOKENS)
            for _ in stream:
                pass
            found.tokens += stream.result["usage"]["completion_tokens"]


def _row(what: str, loading: Found, quiet: Found, tokens: int) -> Row:
    """The goal is a bound."""
    times = f"{loading.loads} loads" if loading.loads > 1 else "1 load"
    asked = f"{len(loading.delays_s)} answers in {times} of {sum(loading.seconds):.0f} s"
    ratio = P99_MS_MAX / loading.p99_ms
    return Row(
        f"health over HTTP, p99, a small model generating, 7B {what}",
        f"{loading.p99_ms:.1f} ms, longest {1000 * max(loading.delays_s):.0f} ms ({asked}, {tokens} tokens meanwhile, "
        f"the host took {loading.reported_bytes >> 20} MiB)",
        f"the limit: {P99_MS_MAX:.0f} ms; before the load: {quiet.p99_ms:.1f} ms",
        round(ratio, 3),
        1.0,
        ratio >= 1.0,
    )


if __name__ == "__main__":
    main()
