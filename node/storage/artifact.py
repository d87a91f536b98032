"""An artifact as one byte stream: cut into shards, read back across them, written out as files again.

Owns the single pass over the bytes: each block is read, hashed as piece, shard and file, and written, and then its
memory is used for the next but one. Knows nothing about what the files mean.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self

from contracts.errors import BadInput, Conflict, Corrupt
from contracts.types import PIECE_SIZE, ShardHash
from node.storage.files import ScratchFile, explained, open_regular, read_exactly, sync_directory, write_all
from node.storage.hashing import BLOCK_SIZE, HASH_THREADS, Hash, ShardHasher
from node.storage.manifest import (
    FORMAT,
    Manifest,
    ManifestFile,
    ManifestShard,
    check,
    check_paths,
    check_shard_count,
    check_shard_size,
)
from node.storage.store import ShardStore


@dataclass(frozen=True)
class Progress:
    """How far a long job is, in bytes of its present stage."""

    stage: Literal["checking", "converting", "cutting", "verifying", "writing"]
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[Progress], None]
"""Called between blocks; what it raises ends the job, which then leaves nothing half done."""


def no_progress(_: Progress) -> None:
    """For callers that do not watch."""


class Source(Protocol):
    """One file of an artifact, wherever its bytes are."""

    @property
    def path(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    def open(self) -> None: ...
    def read(self, view: memoryview, offset: int) -> None: ...
    def close(self) -> None: ...
    def finish(self) -> None:
        """All was read: let go, and raise if the file changed meanwhile."""

    def prove(self, digest: bytes) -> None:
        """What was read has this SHA-256: raise if that is not what was promised."""


class FileSource:
    """A file on disk; refused if it changes while it is read."""

    def __init__(self, path: str, location: Path, sha256_expected: bytes | None = None) -> None:
        self.path = path
        self.location = location
        self._expected = sha256_expected
        with explained("reading", location):
            self._facts = os.stat(location, follow_symlinks=False)
        self.size_bytes = self._facts.st_size
        self._descriptor = -1

    def open(self) -> None:
        with explained("reading", self.location):
            self._descriptor = open_regular(self.location)

    def read(self, view: memoryview, offset: int) -> None:
        with explained("reading", self.location):
            if read_exactly(self._descriptor, view, offset) != len(view):
                raise self._changed()

    def finish(self) -> None:
        now, before = os.fstat(self._descriptor), self._facts
        self.close()
        if (now.st_ino, now.st_size, now.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
            raise self._changed()

    def prove(self, digest: bytes) -> None:
        if self._expected is not None and digest != self._expected:
            raise self._changed()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _changed(self) -> BadInput:
        return BadInput(f"{self.location} changed while it was read; leave it alone and import again")


class StreamReader:
    """Random reads of the artifact's stream out of the held shards of a store."""

    def __init__(self, store: ShardStore, shard_size: int, shard_hashes: Sequence[ShardHash]) -> None:
        self._store = store
        self._shard_size = shard_size
        self._hashes = shard_hashes
        self._open_index = -1
        self._descriptor = -1

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the stream."""
        while len(view) > 0:
            index, start = divmod(offset, self._shard_size)
            part = view[: self._shard_size - start]
            self._switch(index)
            path = self._store.path(self._hashes[index])
            with explained("reading", path):
                if read_exactly(self._descriptor, part, start) != len(part):
                    raise Corrupt(f"shard {path} is shorter than it should be; `aigen shard verify` repairs it")
            view, offset = view[len(part) :], offset + len(part)

    def _switch(self, index: int) -> None:
        if index != self._open_index:
            self.close()
            path = self._store.path(self._hashes[index])
            with explained("reading", path):
                self._descriptor = open_regular(path)
            self._open_index = index

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._open_index = -1, -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class ShardSource:
    """A file whose bytes are in the store already and nowhere else: an interrupted move left them there."""

    def __init__(self, path: str, size_bytes: int, sha256_expected: bytes, reader: StreamReader, offset: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._expected = sha256_expected
        self._reader = reader
        self._offset = offset

    def open(self) -> None:
        pass

    def read(self, view: memoryview, offset: int) -> None:
        self._reader.read(view, self._offset + offset)

    def finish(self) -> None:
        self.close()

    def prove(self, digest: bytes) -> None:
        if digest != self._expected:
            raise Corrupt(f"the shards of the interrupted import are damaged: {self.path} differs; import it anew")

    def close(self) -> None:
        self._reader.close()


class _Filled(NamedTuple):
    block: memoryview
    parts: list[tuple[Hash, memoryview]]
    ended: list[tuple[Source, Hash]]


class Feeder:
    """The sources' bytes one after the other, with each file's hash taken as they pass."""

    def __init__(self, sources: Sequence[Source], block_size: int = BLOCK_SIZE) -> None:
        self._buffers = [memoryview(bytearray(block_size)) for _ in range(2)]
        self._waiting = list(sources)
        self._current: Source | None = None
        self._offset = 0
        self._hash: Hash = sha256()
        self._ended: list[tuple[Source, Hash]] = []
        self.files: list[ManifestFile] = []

    def blocks(self, size: int, executor: Executor) -> Iterator[tuple[memoryview, list[tuple[Hash, memoryview]]]]:
        """The next `size` bytes, block by block, and which hash each part of a block belongs to; they are to be hashed
        before the next block is asked for, which is read meanwhile."""
        place, reading = 0, executor.submit(self._fill, self._buffers[0][:size])
        while size:
            filled = reading.result()
            size -= len(filled.block)
            place = 1 - place
            if size:
                reading = executor.submit(self._fill, self._buffers[place][:size])
            yield filled.block, filled.parts
            self._settle(filled.ended)

    def _fill(self, block: memoryview) -> _Filled:
        parts: list[tuple[Hash, memoryview]] = []
        left = block
        while len(left) > 0:
            source = self._advance()
            part = left[: source.size_bytes - self._offset]
            source.read(part, self._offset)
            parts.append((self._hash, part))
            self._offset += len(part)
            left = left[len(part) :]
            self._end_full()
        ended, self._ended = self._ended, []
        return _Filled(block, parts, ended)

    def _settle(self, ended: Iterable[tuple[Source, Hash]]) -> None:
        """The parts of a block have been hashed: finish the files that ended in it."""
        for source, hasher in ended:
            digest = hasher.digest()
            source.prove(digest)
            self.files.append(ManifestFile(source.path, source.size_bytes, digest))

    def drain(self) -> None:
        """Empty files at the very end belong to the artifact as well."""
        while self._waiting:
            assert self._waiting[0].size_bytes == 0
            self._advance()
            self._end_full()
        self._settle(self._ended)

    def close(self) -> None:
        if self._current is not None:
            self._current.close()

    def _advance(self) -> Source:
        while self._current is None:
            self._current = self._waiting.pop(0)
            self._current.open()
            self._offset, self._hash = 0, sha256()
            if self._waiting:
                self._end_full()
        return self._current

    def _end_full(self) -> None:
        if self._current is not None and self._offset == self._current.size_bytes:
            self._current.finish()
            self._ended.append((self._current, self._hash))
            self._current = None


class Cutter:
    """Cut sources into shards of a store, one shard at a time, in bounded memory."""

    def __init__(self, sources: Sequence[Source], store: ShardStore, shard_size: int) -> None:
        check_shard_size(shard_size)
        check_paths([source.path for source in sources])
        self.total_bytes = sum(source.size_bytes for source in sources)
        self._count = check_shard_count(self.total_bytes, shard_size)
        self._feeder = Feeder(sources, min(BLOCK_SIZE, shard_size))
        self._store = store
        self._shard_size = shard_size
        self.shards: list[ManifestShard] = []
        self.created: list[ShardHash] = []
        """The shards that were not held before: what has to go if the job is given up."""

    @property
    def files(self) -> Sequence[ManifestFile]:
        """The files all of whose bytes are in `shards` or in the shard being written."""
        return self._feeder.files

    def run(self, on_progress: ProgressCallback, on_shard: Callable[[], None] | None = None) -> Manifest:
        """Cut everything. `on_shard` is called whenever another shard is safely held, also the last."""
        try:
            with ThreadPoolExecutor(HASH_THREADS) as executor:
                for index in range(self._count):
                    done_bytes = index * self._shard_size
                    size = min(self._shard_size, self.total_bytes - done_bytes)
                    self._cut_one(size, done_bytes, executor, on_progress)
                    if index == self._count - 1:
                        self._feeder.drain()
                    if on_shard is not None:
                        on_shard()
        finally:
            self._feeder.close()
        manifest = Manifest(FORMAT, self._shard_size, PIECE_SIZE, tuple(self.files), tuple(self.shards))
        check(manifest)
        return manifest

    def _cut_one(self, size: int, done_bytes: int, executor: Executor, on_progress: ProgressCallback) -> None:
        """While a block is hashed, it is written and the next one is read."""
        with self._store.scratch_file() as scratch:
            hasher, written = ShardHasher(executor), 0
            for block, parts in self._feeder.blocks(size, executor):
                writing = executor.submit(self._write, scratch, block, written)
                try:
                    hasher.update(block, parts)
                finally:
                    writing.result()
                written += len(block)
                on_progress(Progress("cutting", done_bytes + written, self.total_bytes))
            shard_hash = ShardHash(hasher.digest())
            if self._store.adopt(scratch, shard_hash):
                self.created.append(shard_hash)
            self.shards.append(ManifestShard(shard_hash, size, hasher.pieces()))

    def _write(self, scratch: ScratchFile, block: memoryview, offset: int) -> None:
        with explained("writing", scratch.path):
            write_all(scratch.descriptor, block, offset)

    def undo(self) -> None:
        """Remove the shards this job has added."""
        for shard_hash in self.created:
            if self._store.held(shard_hash):
                self._store.remove(shard_hash)
        self.created.clear()


def cut(
    sources: Sequence[Source], store: ShardStore, shard_size: int, on_progress: ProgressCallback = no_progress
) -> Manifest:
    """Cut an artifact into the store. When it fails, the store is as it was. The manifest is not stored yet."""
    cutter = Cutter(sources, store, shard_size)
    try:
        return cutter.run(on_progress)
    except BaseException:
        cutter.undo()
        raise


def stream(manifest: Manifest, store: ShardStore) -> Iterator[memoryview]:
    """The artifact's bytes again, block by block; a block is valid until the next one is asked for."""
    buffer = memoryview(bytearray(BLOCK_SIZE))
    total = manifest.total_size
    with StreamReader(store, manifest.shard_size, manifest.shard_hashes) as reader:
        for offset in range(0, total, BLOCK_SIZE):
            block = buffer[: min(BLOCK_SIZE, total - offset)]
            reader.read(block, offset)
            yield block


def read_artifact_file(manifest: Manifest, store: ShardStore, path: str, size_max: int) -> bytes:
    """One small file of an artifact (config.json, a tokenizer), proved by its SHA-256."""
    place = manifest.file_range(path)
    if place is None:
        raise BadInput(f"the artifact has no file {path}")
    offset, size = place
    if size > size_max:
        raise BadInput(f"the artifact's {path} has {size:,} bytes, more than the {size_max:,} it may have")
    data = bytearray(size)
    with StreamReader(store, manifest.shard_size, manifest.shard_hashes) as reader:
        reader.read(memoryview(data), offset)
    expected = next(file.sha256 for file in manifest.files if file.path == path)
    if sha256(data).digest() != expected:
        raise Corrupt(f"the artifact's {path} is damaged in its shards; `aigen shard verify` repairs them")
    return bytes(data)


def extract(manifest: Manifest, store: ShardStore, target: Path, on_progress: ProgressCallback = no_progress) -> None:
    """Write an artifact out as files again. `target` appears whole or not at all; it must not exist."""
    if target.exists() or target.is_symlink():
        raise Conflict(f"{target} exists already; choose a new directory to write the model to")
    building = target.with_name(f".{target.name}.{os.getpid()}.part")
    with explained("writing", target):
        try:
            building.mkdir(parents=True)
            _extract_files(manifest, store, building, on_progress)
            os.rename(building, target)
            sync_directory(target.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _extract_files(manifest: Manifest, store: ShardStore, root: Path, on_progress: ProgressCallback) -> None:
    buffer = memoryview(bytearray(BLOCK_SIZE))
    start = 0
    with StreamReader(store, manifest.shard_size, manifest.shard_hashes) as reader:
        for file in manifest.files:
            path = root / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            hasher = sha256()
            with open(path, "xb") as out:
                for offset in range(0, file.size, BLOCK_SIZE):
                    block = buffer[: min(BLOCK_SIZE, file.size - offset)]
                    reader.read(block, start + offset)
                    hasher.update(block)
                    out.write(block)
                    on_progress(Progress("writing", start + offset + len(block), manifest.total_size))
                out.flush()
                os.fsync(out.fileno())
            if hasher.digest() != file.sha256:
                raise Corrupt(f"{file.path} is damaged in its shards; `aigen shard verify` repairs them")
            sync_directory(path.parent)
            start += file.size
