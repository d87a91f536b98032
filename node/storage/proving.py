"""Hashing a shard that lies on the disk: whether it is the one its name says, and if not, which pieces are damaged.

In this process, or by a `Prover` in one of its own, `python -m node.storage.proving`. Gigabytes take seconds in which
a thread of the node would need its interpreter lock over and over, and the cores that answers are made on: the other
process has a lock of its own, and gives way. It ends with the node: when its input does. Knows no store.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import msgspec

from contracts.errors import BadInput, Busy, Refused, refused
from contracts.types import PIECE_SIZE, ShardHash
from node import subprocesses
from node.storage.files import explained, open_regular, read_exactly
from node.storage.hashing import BLOCK_SIZE, HASH_THREADS, ShardHasher
from node.storage.manifest import HASH_SIZE

NICENESS = 5
"""Of the prover: behind the node and its engine. Beside threads that never wait it still has a quarter of a core."""

PORTION_BYTES = 4 * BLOCK_SIZE
"""Read between two reports: for each a thread of the node needs its interpreter lock, and may lose its core with it."""

OnBytes = Callable[[int], None]

Damaged = Callable[[Path, ShardHash, bytes, OnBytes], list[int]]
"""`damaged_pieces`, here or in a prover."""


def damaged_pieces(path: Path, shard_hash: ShardHash, piece_hashes: bytes, on_bytes: OnBytes) -> list[int]:
    """None when the file's SHA-256 is `shard_hash`; otherwise it is read once more, to tell which. `on_bytes` is told
    of each portion that was read: to slow it down, or to end it."""
    bytes_max = len(piece_hashes) // HASH_SIZE * PIECE_SIZE
    whole = sha256()
    with explained("reading", path):
        for block in _blocks(path, bytes_max):
            whole.update(block)
            on_bytes(len(block))
    if whole.digest() == shard_hash:
        return []
    digest, pieces = digest_and_pieces(path, bytes_max, on_bytes)
    expected, found = _hashes(piece_hashes), _hashes(pieces)
    damaged = [index for index, piece in enumerate(expected) if index >= len(found) or found[index] != piece]
    if not damaged and len(found) > len(expected):
        damaged = [len(expected) - 1]
    if not damaged and digest != shard_hash:
        raise BadInput(f"the piece hashes given for shard {shard_hash.hex()} belong to another shard")
    return damaged


def digest_and_pieces(path: Path, bytes_max: int, on_bytes: OnBytes) -> tuple[bytes, bytes]:
    """A file's SHA-256 and those of its pieces, joined."""
    with explained("reading", path), ThreadPoolExecutor(HASH_THREADS) as executor:
        hasher = ShardHasher(executor)
        for block in _blocks(path, bytes_max):
            hasher.update(block)
            on_bytes(len(block))
        return hasher.digest(), hasher.pieces()


def _hashes(joined: bytes) -> list[bytes]:
    return [joined[at : at + HASH_SIZE] for at in range(0, len(joined), HASH_SIZE)]


def _blocks(path: Path, bytes_max: int) -> Iterator[memoryview]:
    """A file's bytes, each block good until the next is asked for; that one is read meanwhile. Some bytes more than
    `bytes_max`, if there are any: what follows the end is damage as well."""
    descriptor = open_regular(path)
    try:
        with ThreadPoolExecutor(1) as executor:
            free, full = memoryview(bytearray(BLOCK_SIZE)), memoryview(bytearray(BLOCK_SIZE))
            offset = 0
            reading = executor.submit(read_exactly, descriptor, full, 0)
            while count := reading.result():
                offset += count
                free, full = full, free
                if offset <= bytes_max:
                    reading = executor.submit(read_exactly, descriptor, full, offset)
                yield free[:count]
                if offset > bytes_max:
                    return
    finally:
        os.close(descriptor)


# --- in a process of its own


class Task(msgspec.Struct, frozen=True):
    path: bytes
    """As the file system has it."""
    shard_hash: bytes
    piece_hashes: bytes


class Read(msgspec.Struct, frozen=True, tag=True):
    """A portion; the next is read when that is asked for."""

    count: int


class Found(msgspec.Struct, frozen=True, tag=True):
    damaged: list[int]


class Failed(msgspec.Struct, frozen=True, tag=True):
    code: int
    message: str


_GO_ON = b"\n"
_reports = msgspec.json.Decoder(Read | Found | Failed)


class Prover:
    """One shard at a time, in a worker thread. The process starts with the first, and anew after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def damaged_pieces(self, path: Path, shard_hash: ShardHash, piece_hashes: bytes, on_bytes: OnBytes) -> list[int]:
        """As the function does it. Whatever `on_bytes` raises ends the process."""
        try:
            report = self._ask(path, Task(os.fsencode(path), shard_hash, piece_hashes), on_bytes)
        except BaseException:
            self.close()
            raise
        if isinstance(report, Failed):
            raise refused(report.code, report.message)
        return report.damaged

    def _ask(self, path: Path, task: Task, on_bytes: OnBytes) -> Found | Failed:
        if self._process and self._process.poll() is not None:
            self.close()
        process = self._process = self._process or _start()
        assert process.stdout is not None
        _tell(process, msgspec.json.encode(task) + b"\n")
        while (line := process.stdout.readline()).endswith(b"\n"):
            report = _reports.decode(line)
            if not isinstance(report, Read):
                return report
            on_bytes(report.count)
            _tell(process, _GO_ON)
        raise Busy(f"the process that hashes shards ended ({self.close()}) while it worked on {path}; try again")

    def close(self) -> str:
        """End the process; says how it did if it had before."""
        process, self._process = self._process, None
        if process is None:
            return ""
        process.kill()
        with contextlib.suppress(BrokenPipeError), process:  # what was not read any more
            pass
        return subprocesses.ending(process.wait())


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "node.storage.proving"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=subprocesses.environment(),
        )
    except OSError as error:
        raise Busy(f"no process to hash shards can be started: {error.strerror}; try again") from error


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    """If it is gone, the end of its output says so."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()


def main() -> None:
    """`python -m node.storage.proving`."""
    # Ctrl-C in a terminal reaches the whole group; the node ends this process in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.nice(NICENESS)
    for line in sys.stdin.buffer:
        _say(_found(msgspec.json.decode(line, type=Task)))


def _found(task: Task) -> Found | Failed:
    progress = _Progress()
    try:
        damaged = damaged_pieces(
            Path(os.fsdecode(task.path)), ShardHash(task.shard_hash), task.piece_hashes, progress.add
        )
    except Refused as error:
        return Failed(error.code, str(error))
    progress.tell()
    return Found(damaged)


class _Progress:
    """Says what was read, and waits to be told to go on."""

    def __init__(self) -> None:
        self._untold = 0

    def add(self, count: int) -> None:
        self._untold += count
        if self._untold >= PORTION_BYTES:
            self.tell()

    def tell(self) -> None:
        if self._untold:
            _say(Read(self._untold))
            self._untold = 0
            if not sys.stdin.buffer.read(len(_GO_ON)):
                os._exit(0)  # not sys.exit: a thread is reading the next block


def _say(report: Read | Found | Failed) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
