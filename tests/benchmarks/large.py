"""Models of billions of weights: how fast they are read for each token, how soon the first comes, who waits meanwhile.

`python -m tests.benchmarks.large [PART...]`: 1b, cold and 7b, unless some are named. The weights are random, in the
shapes of a Llama of 1B and of Mistral-7B, in shards of 4 GiB. It takes 24 GiB of disk under build/, given back at the
end, memory for the larger model (20 GB), and some ten minutes. AIGEN_BENCH_SKIP_7B=1 leaves out what needs the larger
one; BENCH_THREADS are those of both sides.

Ours is measured from outside, through the engine process. At a cold start both sides' processes have answered with a
small model before: neither their start nor their imports count.
"""

import mmap
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import trio

from node.inference.engine import Engine, EngineSettings
from node.inference.spec import ModelSpec, Parameters
from node.storage.importer import import_model
from node.storage.store import ShardStore
from tests.benchmarks import paging, responsive, shapes
from tests.benchmarks.processes import line, running, tell
from tests.benchmarks.report import BUILD, Row, compared, publish
from tests.benchmarks.runtime import ours, random_model, spec_of

ROUNDS = 5
COLD_ROUNDS = 3
READ_S = 2.5
SHARD_SIZE = 4 << 30
ROOM_BYTES = 24 << 30
PROMPT = "Once upon a time "
BANDWIDTH_GOAL = 0.8
COLD_GOAL = 1 / 0.75
READ_TIMES_MAX = 1.05
"""Bytes from the disk, in bytes of the model."""
TOKENS = {16: 32, 32: 10}
"""Of an answer, by layers: some seconds."""

Progress = Callable[[str], None]


class Memory:
    """Reads a buffer that no cache holds in several ways; the fastest says what the machine can. Its pages are
    huge ones where the kernel has them."""

    def __init__(self, size: int = 1 << 30) -> None:
        self._size = size
        room = mmap.mmap(-1, size)
        room.madvise(mmap.MADV_HUGEPAGE)
        floats = torch.frombuffer(room, dtype=torch.float32).fill_(0.5)
        longs, halves = floats.view(torch.int64), floats.view(torch.bfloat16).view(-1, 4096)
        ones = torch.ones(4096)
        narrow = ones.bfloat16()
        self._ways: dict[str, Callable[[], object]] = {
            "sum of fp32": floats.sum,
            "sum of int64": longs.sum,
            "max of fp32": floats.max,
            "max of int64": longs.max,
            "fp32 matrix by vector": lambda: torch.mv(floats.view(-1, 4096), ones),
            "bf16 matrix by vector": lambda: torch.mv(halves, narrow),
        }

    def bytes_per_second(self) -> float:
        """Of the way that is the fastest now, for as long as an answer takes: not of its luckiest moment."""
        way = min(self._ways.values(), key=lambda way: min(_seconds(way) for _ in range(3)))
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < READ_S:
            way()
            count += 1
        return count * self._size / (time.perf_counter() - started)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@asynccontextmanager
async def warm_engine(small: ModelSpec, cache_bytes: int, threads: int) -> AsyncIterator[Engine]:
    """An engine whose process has answered once."""
    async with trio.open_nursery() as nursery:
        engine = Engine(EngineSettings(cache_bytes, threads))
        await nursery.start(engine.run)
        await engine.load(small)
        await engine.complete(small.key, PROMPT, Parameters(max_tokens=2))
        yield engine
        nursery.cancel_scope.cancel()


def taken_in(key: str, directory: Path, store: ShardStore, move: bool) -> ModelSpec:
    return spec_of(key, import_model(directory, store, SHARD_SIZE, move=move).manifest, store)


async def bandwidth(
    what: str, config: Any, small: ModelSpec, spec: ModelSpec, threads: int, progress: Progress
) -> list[Row]:
    """Weights read for each second of an answer, beside reading memory and nothing else."""
    memory, tokens = Memory(), TOKENS[config.num_hidden_layers]
    mine, machine = [], []
    async with warm_engine(small, 2 * spec.total_size, threads) as engine:
        await engine.load(spec)
        await ours(engine, spec.key, PROMPT, 4)
        for number in range(ROUNDS):
            progress(f"{what}: decode, round {number + 1} of {ROUNDS}")
            machine.append(memory.bytes_per_second() / 1e9)
            _, seconds, count = await ours(engine, spec.key, PROMPT, tokens)
            mine.append(shapes.step_bytes(config) * count / seconds / 1e9)
    name = f"weights read in decode, one request, {what}"
    row = compared(name, "GB/s", mine, f"reading memory, the fastest of 6 ways, {threads} threads", machine, None)
    rate = 1e9 * sorted(mine)[len(mine) // 2] / shapes.step_bytes(config)
    met = row.ratio >= BANDWIDTH_GOAL
    return [replace(row, ours=f"{row.ours} ({rate:.2f} tokens/s)", goal=BANDWIDTH_GOAL, met=met)]


async def loads(small: ModelSpec, spec: ModelSpec, threads: int, progress: Progress) -> list[Row]:
    """Loads of a model that is in the page cache, beside copying it from there."""
    load, first, copy = [], [], []
    buffer = memoryview(bytearray(64 << 20))
    async with warm_engine(small, 2 * spec.total_size, threads) as engine:
        for number in range(COLD_ROUNDS):
            progress(f"7B: load, round {number + 1} of {COLD_ROUNDS}")
            copy.append(sum(_seconds(lambda path=path: _copy(path, buffer)) for path in spec.shards))  # type: ignore[misc]
            started = time.perf_counter()
            loaded = await engine.load(spec)
            load.append(time.perf_counter() - started)
            await ours(engine, spec.key, PROMPT, 1)
            first.append(time.perf_counter() - started)
            await engine.unload(spec.key)
    sizes = f"{loaded.mapped_bytes / 1e9:.2f} GB mapped, {loaded.private_bytes / 1e9:.2f} copied"
    peer, what = "copying its shards from the page cache", f"7B in bf16, {len(spec.shards)} shards of 4 GiB, in memory"
    row = compared(f"load, {what}", "s", load, peer, copy, None, less_is_better=True)
    tokens = f"prompt of {len(PROMPT)}"
    return [
        replace(row, ours=f"{row.ours}, {sizes}"),
        compared(f"load and first token ({tokens}), {what}", "s", first, peer, copy, None, less_is_better=True),
    ]


def _copy(path: str, buffer: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


async def cold_starts(small: tuple[Path, ModelSpec], work: Path, threads: int, progress: Progress) -> list[Row]:
    """From nothing in the page cache to the first token."""
    progress("4 GB: writing, taking in")
    directory = shapes.write(work / "4gb", shapes.mistral(8))
    spec = taken_in("4gb@1", directory, ShardStore(work / "store-4gb"), move=False)
    mine, theirs, read = [], [], []
    command = [sys.executable, "-m", "tests.benchmarks.loader", str(small[0]), str(directory), str(threads)]
    for number in range(COLD_ROUNDS):
        progress(f"4 GB: cold start, round {number + 1} of {COLD_ROUNDS}")
        async with warm_engine(small[1], 2 * spec.total_size, threads) as engine:
            paging.drop(map(Path, spec.shards))
            pid = engine.statistics().pid
            assert pid is not None
            before, started = paging.bytes_from_disk(pid), time.perf_counter()
            await engine.load(spec)
            await ours(engine, spec.key, PROMPT, 1)
            mine.append(time.perf_counter() - started)
            read.append(paging.bytes_from_disk(pid) - before)
        with running(command) as process:
            assert line(process) == "ready"
            paging.drop(directory.iterdir())
            tell(process, PROMPT)
            theirs.append(float(line(process)))
    what = f"{spec.total_size / 1e9:.2f} GB in bf16 from shards, page cache dropped"
    peer = f"transformers {transformers.__version__}"
    limit = [READ_TIMES_MAX * spec.total_size / 1e9] * len(read)
    shutil.rmtree(directory)
    return [
        compared(f"to the first token, {what}", "s", mine, peer, theirs, COLD_GOAL, less_is_better=True),
        compared(
            f"read from disk by then, {what}",
            "GB",
            [one / 1e9 for one in read],
            f"{READ_TIMES_MAX} times the model",
            limit,
            1.0,
            less_is_better=True,
        ),
    ]


async def measure_1b(small: tuple[Path, ModelSpec], work: Path, threads: int, progress: Progress) -> list[Row]:
    progress("1B: writing, taking in")
    spec = taken_in("1b@1", shapes.write(work / "1b", shapes.LLAMA_1B), ShardStore(work / "store-1b"), move=True)
    return await bandwidth("Llama of 1B in bf16", shapes.LLAMA_1B, small[1], spec, threads, progress)


async def measure_7b(small: tuple[Path, ModelSpec], work: Path, threads: int, progress: Progress) -> list[Row]:
    """In the store of a node, which has it later."""
    config = shapes.mistral(32)
    with responsive.network(work / "network", SHARD_SIZE) as (cluster, node):
        progress("7B: writing 14.5 GB")
        directory = shapes.write(work / "7b", config)
        progress("7B: moving it into shards")
        spec = responsive.take_in(cluster, node, responsive.LARGE, directory, "--move")
        responsive.take_in(cluster, node, responsive.SMALL, small[0])
        rows = await bandwidth("Mistral-7B's shape in bf16", config, small[1], spec, threads, progress)
        rows += await loads(small[1], spec, threads, progress)
        return rows + await trio.to_thread.run_sync(responsive.rows, cluster, node, spec, progress)
    return rows


async def measure(parts: list[str], work: Path, threads: int, progress: Progress) -> list[Row]:
    torch.set_num_threads(threads)
    directory = random_model(work / "small")
    small = directory, taken_in("small@1", directory, ShardStore(work / "store-small"), move=False)
    rows = []
    for part in parts:
        place = work / part
        place.mkdir()
        started = time.monotonic()
        rows += await PARTS[part](small, place, threads, progress)
        progress(f"{part} took {time.monotonic() - started:.0f} s")
        shutil.rmtree(place)
    return rows


PARTS = {"1b": measure_1b, "cold": cold_starts, "7b": measure_7b}


def _told_since(started: float) -> Progress:
    return lambda line: print(f"{time.monotonic() - started:4.0f} s  {line}", file=sys.stderr, flush=True)


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = int(os.environ.get("BENCH_THREADS", "0")) or os.cpu_count() or 1
    parts = sys.argv[1:] or [part for part in PARTS if part != "7b" or os.environ.get("AIGEN_BENCH_SKIP_7B") != "1"]
    BUILD.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(BUILD).free
    assert free >= ROOM_BYTES, f"{free >> 30} GiB are free under {BUILD}; the benchmark takes {ROOM_BYTES >> 30}"
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="large-") as scratch:
        rows = trio.run(measure, parts, Path(scratch), threads, _told_since(time.monotonic()))
    runs = f"medians of {ROUNDS} (decode) or {COLD_ROUNDS} runs in turns"
    note = f"{runs}; random weights; torch {torch.__version__}; {threads} threads"
    publish("large", rows, note)


if __name__ == "__main__":
    main()
