"""Moving a model into the store: each file goes once its bytes are safely in shards, and a crash loses none.

Owns the journal `.aigen-import/` inside the source directory. Between the first deletion and the manifest, the shards
are the only home of the deleted files; the journal says which shards those are, so that the next import of the same
directory reads them from there and goes on. It is written, with a sync, before each deletion.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from contracts.errors import BadInput, Busy, Conflict, Corrupt
from contracts.types import ShardHash
from node.storage.artifact import Cutter, FileSource, ShardSource, Source, StreamReader
from node.storage.directory import JOURNAL, Description, ModelDirectory
from node.storage.files import explained, read_file, sync_directory, try_lock, write_file
from node.storage.manifest import MANIFEST_SIZE_MAX, check_paths, check_shard_size
from node.storage.store import ShardStore

_RECORD = "journal"
_FORMAT = 1
_CANNOT_LOCK = frozenset({errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    size: int
    sha256: bytes
    """Empty while the file is not yet wholly in shards."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    store: str
    shard_size: int
    description: Description
    files: tuple[_File, ...]
    shards: tuple[ShardHash, ...]


@dataclass(frozen=True)
class Work:
    """An import to be done: where each file's bytes are now, in stream order."""

    sources: tuple[Source, ...]
    description: Description
    recorded: int
    """How many files, from the first on, the record says are in shards."""


@contextlib.contextmanager
def exclusive(root: Path, move: bool) -> Iterator[None]:
    """One import of a directory at a time, so that none reads what another deletes."""
    with explained("locking", root):
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            free = try_lock(descriptor)
        except OSError as error:
            # A network file system may not lock directories; a plain import deletes nothing and can do without.
            if move or error.errno not in _CANNOT_LOCK:
                raise BadInput(f"{root} cannot be locked ({error.strerror}); import it without moving") from error
            free = True
        if not free:
            raise Busy(f"{root} is being imported by another process; wait for it")
        yield
    finally:
        os.close(descriptor)


def interrupted(root: Path, store: ShardStore, shard_size: int) -> Work | None:
    """What an earlier move of this directory left to do, or None when there was none."""
    path = root / JOURNAL / _RECORD
    if not path.exists():
        return None
    record = _load(path)
    if record.store != str(store.root.resolve()):
        raise Conflict(
            f"{root} was moved in part into the store {record.store}; finish there first (the same import with that "
            "data directory)"
        )
    if record.shard_size != shard_size:
        raise Conflict(
            f"{root} was moved in part in shards of {record.shard_size:,} bytes; finish with that shard size, "
            f"not with {shard_size:,}"
        )
    sources: list[Source] = []
    offset = 0
    for file in record.files:
        location = root / file.path
        if location.exists():
            source: Source = FileSource(file.path, location, file.sha256 or None)
            if source.size_bytes != file.size:
                raise BadInput(f"{location} changed since the import began; put the old file back and import again")
            sources.append(source)
        elif file.sha256:
            reader = StreamReader(store, record.shard_size, record.shards)
            sources.append(ShardSource(file.path, file.size, file.sha256, reader, offset))
        else:
            raise BadInput(f"{location} is gone since the import began; put it back and import again")
        offset += file.size
    recorded = sum(1 for file in record.files if file.sha256)
    return Work(tuple(sources), record.description, recorded)


def _load(path: Path) -> _Record:
    data = read_file(path, MANIFEST_SIZE_MAX)
    try:
        record = msgspec.msgpack.decode(data, type=_Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"the record of the interrupted import {path} is malformed: {error}") from error
    if record.format != _FORMAT:
        raise Corrupt(f"the record of the interrupted import {path} has the unknown format {record.format}")
    check_shard_size(record.shard_size)
    check_paths([file.path for file in record.files])
    return record


class Mover:
    """Deletes the sources of a running cut behind it."""

    def __init__(self, root: Path, store: ShardStore, shard_size: int, work: Work) -> None:
        self._root = root
        self._store = store
        self._shard_size = shard_size
        self._sources = work.sources
        self._description = work.description
        # A resumed move never records less than is recorded: those files may be nowhere but in the shards.
        self._recorded = work.recorded
        self.begun = work.recorded > 0
        """Once it is, shards hold bytes that exist nowhere else: they are no longer ours to undo."""

    def take_behind(self, cutter: Cutter) -> None:
        """Another shard is held: delete the files that lie wholly in held shards."""
        held_bytes = min(len(cutter.shards) * self._shard_size, cutter.total_bytes)
        safe, end = 0, 0
        while safe < len(cutter.files) and end + cutter.files[safe].size <= held_bytes:
            end += cutter.files[safe].size
            safe += 1
        if safe > self._recorded:
            self._record(cutter, safe)
            self._delete(safe)

    def _delete(self, count: int) -> None:
        for source in self._sources[:count]:
            with explained("removing", self._root / source.path):
                (self._root / source.path).unlink(missing_ok=True)
        with explained("removing from", self._root):
            sync_directory(self._root)

    def _record(self, cutter: Cutter, safe: int) -> None:
        files = tuple(
            _File(source.path, source.size_bytes, cutter.files[index].sha256 if index < safe else b"")
            for index, source in enumerate(self._sources)
        )
        shards = tuple(shard.sha256 for shard in cutter.shards)
        store = str(self._store.root.resolve())
        record = _Record(_FORMAT, store, self._shard_size, self._description, files, shards)
        journal = self._root / JOURNAL
        with explained("creating", journal):
            journal.mkdir(exist_ok=True)
            self.begun = True
            write_file(journal / _RECORD, msgspec.msgpack.encode(record), journal)
            sync_directory(self._root)
        self._recorded = safe

    def finish(self) -> None:
        """The manifest is stored: whatever is left of the files can go, and the record has done its work."""
        self._delete(len(self._sources))
        journal = self._root / JOURNAL
        with contextlib.suppress(OSError):
            # A crash may have left parts of a record. They go before it: alone they would look like a model's files.
            for path in journal.iterdir():
                if path.name != _RECORD:
                    path.unlink()
        shutil.rmtree(journal, ignore_errors=True)


def delete_sources(model: ModelDirectory) -> None:
    """The model is in the store already, verified: its files can go."""
    for path in model.paths:
        with explained("removing", model.root / path):
            (model.root / path).unlink()
    with explained("removing from", model.root):
        sync_directory(model.root)


def peak_bytes(sizes: Sequence[int], shard_size: int) -> int:
    """The most disk a move takes at once beyond the model itself: shards written minus files deleted."""
    total, gone, deleted, peak = sum(sizes), 0, 0, 0
    waiting = list(sizes)
    while gone < total:
        gone = min(gone + shard_size, total)
        peak = max(peak, gone - deleted)
        while waiting and deleted + waiting[0] <= gone:
            deleted += waiting.pop(0)
    return peak
