"""SHA-256 of a shard, of its pieces and of the files in it, in one pass over the bytes.

hashlib lets other threads run while it works on a large buffer, so the hashes of one block are taken side by side.
Knows nothing about files, names or disks.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from hashlib import sha256
from typing import Protocol

from contracts.types import PIECE_SIZE

BLOCK_SIZE = 8 * PIECE_SIZE
"""Bytes read, hashed and written at a time; cutting and checking take twice as much memory, joining no more."""

HASH_THREADS = 2


class Hash(Protocol):
    """The part of hashlib's objects used here."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class ShardHasher:
    """Feed a shard block by block (all but the last are whole pieces), then ask for its two kinds of hashes."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._whole = sha256()
        self._pieces = bytearray()

    def update(self, block: memoryview, files: Sequence[tuple[Hash, memoryview]] = ()) -> None:
        """Hash a block; `files` are the hashes of the files in it, each with its own part of the block."""
        assert len(self._pieces) == 0 or len(block) > 0
        whole = self._executor.submit(self._whole.update, block)
        others = self._executor.submit(_update_all, files) if files else None
        for start in range(0, len(block), PIECE_SIZE):
            self._pieces += sha256(block[start : start + PIECE_SIZE]).digest()
        whole.result()
        if others is not None:
            others.result()

    def digest(self) -> bytes:
        return self._whole.digest()

    def pieces(self) -> bytes:
        return bytes(self._pieces)


def _update_all(files: Sequence[tuple[Hash, memoryview]]) -> None:
    for hasher, part in files:
        hasher.update(part)
