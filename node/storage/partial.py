"""A shard on its way in: pieces in any order, from any thread, each proved before it counts.

Owns `partial/<hash>` from opening to commit. What lay there before is hashed again and trusted only where the hash
fits; there is no sidecar that could lie. Knows no peers: whoever brings a wrong piece is the caller's to name.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from contracts.errors import BadInput, BadPeer, Busy, Conflict
from contracts.types import PIECE_SIZE, ShardHash
from node.storage.files import (
    begin_writing_back,
    explained,
    read_exactly,
    still_named,
    sync_directory,
    try_lock,
    write_all,
)
from node.storage.manifest import HASH_SIZE, piece_count

WRITTEN_BACK_PIECES: Final = 16
"""Handed to the disk at a time."""


class PartialShard:
    """The one writer of a shard. Use as a context manager: leaving it keeps what arrived for the next attempt."""

    def __init__(self, path: Path, target: Path, shard_hash: ShardHash, size_bytes: int, piece_hashes: bytes) -> None:
        if size_bytes <= 0 or len(piece_hashes) != piece_count(size_bytes) * HASH_SIZE or len(shard_hash) != HASH_SIZE:
            raise BadInput(
                f"{len(piece_hashes):,} bytes of piece hashes do not describe a shard of {size_bytes:,} bytes; "
                "the manifest is wrong"
            )
        self.shard_hash = shard_hash
        self.size_bytes = size_bytes
        self.piece_count = piece_count(size_bytes)
        self._path = path
        self._target = target
        self._piece_hashes = piece_hashes
        self._present = bytearray(self.piece_count)
        self._came = threading.Condition()
        # The shard's own hash runs along as far as the pieces lie without a gap (see follow); commit() does the rest.
        self._whole = sha256()
        self._whole_next = 0
        self._whole_lock = threading.Lock()
        self._buffer = memoryview(bytearray(PIECE_SIZE))
        self._is_followed = True
        self._on_close: list[Callable[[], None]] = []
        self._descriptor = self._open()

    def _open(self) -> int:
        with explained("opening", self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not (try_lock(descriptor) and still_named(descriptor, self._path)):
            os.close(descriptor)
            raise Busy(f"shard {self.shard_hash.hex()} is being written by another task; wait for it")
        return descriptor

    def resume(self) -> None:
        """Hash again what lies there. Call once before anything else; the store does."""
        with explained("reading", self._path):
            existing = os.fstat(self._descriptor).st_size
            if existing > self.size_bytes:
                os.ftruncate(self._descriptor, self.size_bytes)
        if existing == 0:
            return
        with ThreadPoolExecutor(1) as executor:
            following = executor.submit(self.follow)
            try:
                self._find_pieces(min(existing, self.size_bytes))
            finally:
                self.stop_following()
            following.result()
        self._is_followed = True

    def _find_pieces(self, existing_bytes: int) -> None:
        buffer = memoryview(bytearray(PIECE_SIZE))
        for index in range(piece_count(existing_bytes)):
            piece = buffer[: self._piece_size(index)]
            with explained("reading", self._path):
                count = read_exactly(self._descriptor, piece, index * PIECE_SIZE)
            if count == len(piece) and sha256(piece).digest() == self._piece_hash(index):
                self._note_present(index)

    @property
    def allocated_bytes(self) -> int:
        """What the file takes on the disk by now (it may have holes)."""
        return min(os.fstat(self._descriptor).st_blocks * 512, self.size_bytes)

    @property
    def missing_bytes(self) -> int:
        return sum(self._piece_size(index) for index in self.missing())

    def missing(self) -> list[int]:
        """The pieces still to come, in order."""
        with self._came:
            return [index for index, present in enumerate(self._present) if not present]

    def has(self, index: int) -> bool:
        return bool(self._present[index])

    def bits(self) -> bytes:
        """Bit i % 8 of byte i // 8 is set for a piece that is here."""
        with self._came:
            present = bytes(self._present)
        eights = (present[first : first + 8] for first in range(0, len(present), 8))
        return bytes(sum(bit << at for at, bit in enumerate(eight)) for eight in eights)

    def write(self, index: int, data: bytes | bytearray | memoryview) -> bool:
        """Take one piece; whether it was new. It counts only if its SHA-256 is the one in the manifest; a piece we have
        is ignored."""
        assert 0 <= index < self.piece_count
        if self._present[index]:
            return False
        if len(data) != self._piece_size(index):
            raise BadPeer(
                f"piece {index} of shard {self.shard_hash.hex()} came with {len(data):,} bytes "
                f"instead of {self._piece_size(index):,}"
            )
        if sha256(data).digest() != self._piece_hash(index):
            raise BadPeer(f"piece {index} of shard {self.shard_hash.hex()} came with wrong bytes (SHA-256 differs)")
        with explained("writing", self._path):
            write_all(self._descriptor, data, index * PIECE_SIZE)
        return self._note_present(index)

    def _note_present(self, index: int) -> bool:
        """Whether it is new."""
        with self._came:
            new = not self._present[index]
            self._present[index] = 1
            self._came.notify_all()
        return new

    def follow(self) -> None:
        """Take the shard's own hash behind the pieces as they come, for as long as any are missing or until
        `stop_following`. Blocks, so it has a thread of its own. The bytes come out of the page cache, and are handed
        to the disk here: then commit() has little left to wait for."""
        while self._wait_for_next():
            self._hash_next()

    def stop_following(self) -> None:
        with self._came:
            self._is_followed = False
            self._came.notify_all()

    def _wait_for_next(self) -> bool:
        with self._came:
            while self._is_followed and self._whole_next < self.piece_count:
                if self._present[self._whole_next]:
                    return True
                self._came.wait()
        return False

    def commit(self) -> None:
        """Make it held: whole SHA-256, sync, rename, sync the directories. Nothing but this makes a shard held."""
        missing = self.missing()
        if missing:
            raise Conflict(
                f"shard {self.shard_hash.hex()} still misses {len(missing):,} of {self.piece_count:,} pieces"
            )
        while self._whole_next < self.piece_count:
            self._hash_next()
        digest = self._whole.digest()
        if digest != self.shard_hash:
            # Every piece fits the manifest and the whole does not fit the ledger: fetching again cannot help.
            self._path.unlink(missing_ok=True)
            self.close()
            raise BadInput(
                f"the pieces listed for shard {self.shard_hash.hex()} make {digest.hex()}; "
                "the model was registered with a wrong manifest"
            )
        with explained("writing", self._path):
            os.fsync(self._descriptor)
            os.replace(self._path, self._target)
            sync_directory(self._target.parent)
            sync_directory(self._path.parent)
        self.close()

    def close(self) -> None:
        """Let go. An empty file is removed, anything more stays for the next attempt."""
        if self._descriptor < 0:
            return
        if os.fstat(self._descriptor).st_size == 0 and still_named(self._descriptor, self._path):
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1
        for callback in self._on_close:
            callback()

    def on_close(self, callback: Callable[[], None]) -> None:
        self._on_close.append(callback)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _piece_size(self, index: int) -> int:
        return min(PIECE_SIZE, self.size_bytes - index * PIECE_SIZE)

    def _piece_hash(self, index: int) -> bytes:
        return self._piece_hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE]

    def _hash_next(self) -> None:
        """Take the next piece into the shard's hash, read back from the file."""
        with self._whole_lock, explained("reading", self._path):
            offset = self._whole_next * PIECE_SIZE
            piece = self._buffer[: self._piece_size(self._whole_next)]
            read_exactly(self._descriptor, piece, offset)
            self._whole.update(piece)
            self._whole_next += 1
            if self._whole_next % WRITTEN_BACK_PIECES == 0:
                begin_writing_back(self._descriptor, offset + PIECE_SIZE, WRITTEN_BACK_PIECES * PIECE_SIZE)
