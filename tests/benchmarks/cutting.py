"""The row of `make bench-shards` about taking a model in: cut and hashed, beside what the disk and the cores can do.

Every byte is hashed three times on its way into the store: as part of its file, of its shard and of its piece. What
bounds that is the slower of two things: a plain read of the file, and the hashing alone, by as many threads as there
are cores. The copy into the store is ours to hide behind them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import median

from contracts.types import PIECE_SIZE
from node.storage.artifact import FileSource, cut
from node.storage.hashing import BLOCK_SIZE
from node.storage.store import ShardStore
from tests.benchmarks import report

RUNS = 3
GOAL = 0.8
HASHES = 3


def write(path: Path, size: int) -> None:
    """Random bytes; a block is repeated with a number in it."""
    block = Random(3).randbytes(PIECE_SIZE - 8)
    with path.open("wb") as file:
        for index in range(size // PIECE_SIZE):
            file.write(index.to_bytes(8, "little") + block)


def cutting(path: Path, root: Path, shard_size: int) -> float:
    """MB/s from the file into a store."""
    folder = Path(tempfile.mkdtemp(dir=root))
    store = ShardStore(folder, reserve_bytes=0)
    began = time.perf_counter()
    cut([FileSource(path.name, path)], store, shard_size)
    taken = time.perf_counter() - began
    shutil.rmtree(folder)
    return path.stat().st_size / taken / 1e6


def reading(path: Path) -> float:
    """MB/s into memory, in the blocks that cutting reads."""
    buffer = memoryview(bytearray(BLOCK_SIZE))
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - began) / 1e6


def hashing(size: int) -> float:
    """MB/s of bytes that are in memory and hashed three times each, on all cores."""
    block, cores = Random(4).randbytes(BLOCK_SIZE), os.cpu_count() or 1
    each = HASHES * size // BLOCK_SIZE // cores

    def work(_number: int) -> None:
        hasher = sha256()
        for _ in range(each):
            hasher.update(block)

    began = time.perf_counter()
    with ThreadPoolExecutor(cores) as threads:
        list(threads.map(work, range(cores)))
    return each * cores * BLOCK_SIZE / HASHES / (time.perf_counter() - began) / 1e6


def row(root: Path, size: int) -> report.Row:
    path = root / "weights.safetensors"
    write(path, size)
    ours: list[float] = []
    read: list[float] = []
    hashed: list[float] = []
    for run in range(RUNS + 1):
        found = cutting(path, root, size // 2), reading(path), hashing(size)
        if run:  # the first only warms up
            for speeds, speed in zip((ours, read, hashed), found, strict=True):
                speeds.append(speed)
    path.unlink()
    bound, name = min((read, "the disk reads"), (hashed, "the cores hash"), key=lambda of: median(of[0]))
    return report.compared(f"cut and hash {size >> 20} MiB into shards", "MB/s", ours, name, bound, GOAL)
