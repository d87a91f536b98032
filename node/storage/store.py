"""The shard store: `shards/` (held), `partial/` (on their way), `manifests/`, `quantised/` (weights in fewer bits, made
from held shards), `conversions/`, `scratch/`.

Owns the layout and the rule that a file in `shards/` is a shard whose whole SHA-256 matched its name. It keeps no
state beside the file system, so another process (`aigen model import` beside a running node) may add shards at any
time. Knows no ledger and no peers. Blocking: call it from a worker thread.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from contracts.errors import BadInput, Busy, Conflict, Corrupt, NoSpace, NotFound
from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage.files import (
    ScratchFile,
    explained,
    free_bytes,
    is_regular,
    open_regular,
    read_exactly,
    read_file,
    scratch_directory,
    size_text,
    still_named,
    sweep_scratch,
    sync_directory,
    try_lock,
    write_file,
)
from node.storage.manifest import HASH_SIZE, MANIFEST_SIZE_MAX, Manifest, decode, piece_count
from node.storage.partial import PartialShard
from node.storage.proving import Damaged, OnBytes, damaged_pieces

DISK_RESERVE_BYTES = 64 << 20
"""Left free on the disk by every shard we take in, so that the ledger beside it can still write its blocks."""

_HEX_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoreStatistics:
    """What the store holds, at one moment."""

    shards_held: int
    shard_bytes: int
    partial_shards: int
    partial_bytes: int
    quantised_bytes: int
    manifests: int
    free_bytes: int
    disk_budget_bytes: int | None


class ShardStore:
    """Shards by their SHA-256 under one directory."""

    def __init__(
        self, root: Path, disk_budget_bytes: int | None = None, reserve_bytes: int = DISK_RESERVE_BYTES
    ) -> None:
        self.root = root
        self._budget_bytes = disk_budget_bytes
        self._reserve_bytes = reserve_bytes
        self._shards = root / "shards"
        self._partial = root / "partial"
        self._manifests = root / "manifests"
        self._quantised = root / "quantised"
        self._conversions = root / "conversions"
        self._scratch = root / "scratch"
        self._writers: dict[ShardHash, PartialShard] = {}
        self._writers_lock = threading.Lock()
        with explained("creating", root):
            kept = (self._shards, self._partial, self._manifests, self._quantised, self._conversions, self._scratch)
            for directory in kept:
                directory.mkdir(parents=True, exist_ok=True)
            sync_directory(root)
            for directory in (self._quantised, self._scratch):
                sweep_scratch(directory)

    # --- what is held

    def held(self, shard_hash: ShardHash) -> bool:
        return is_regular(self._held_path(shard_hash))

    def held_shards(self) -> list[ShardHash]:
        return [ShardHash(name) for name in _names(self._shards)]

    def path(self, shard_hash: ShardHash) -> Path:
        """The file of a held shard, to map or to send."""
        path = self._held_path(shard_hash)
        if not is_regular(path):
            raise NotFound(f"shard {shard_hash.hex()} is not held here; fetch it first")
        return path

    def read_piece(
        self, shard_hash: ShardHash, index: int, piece_hash: bytes | None = None, buffer: bytearray | None = None
    ) -> memoryview:
        """One piece of a held shard, or one of a shard in flight that has come; with `piece_hash` it is proved before
        it is handed out. `buffer` has room for a piece; whoever reads many saves time with one."""
        view = memoryview(buffer if buffer is not None else bytearray(PIECE_SIZE))
        writer = self._writers.get(shard_hash)
        if writer is not None and writer.has(index):
            # It may become held before its file is open.
            with contextlib.suppress(NotFound):
                return self._read_piece(self._partial_path(shard_hash), index, piece_hash, view)
        return self._read_piece(self.path(shard_hash), index, piece_hash, view)

    def _read_piece(self, path: Path, index: int, piece_hash: bytes | None, view: memoryview) -> memoryview:
        with explained("reading", path):
            descriptor = open_regular(path)
            try:
                size = os.fstat(descriptor).st_size
                if not 0 <= index < piece_count(size):
                    raise NotFound(f"shard {path.name} has {piece_count(size):,} pieces, none is number {index}")
                piece = view[: min(PIECE_SIZE, size - index * PIECE_SIZE)]
                piece = piece[: read_exactly(descriptor, piece, index * PIECE_SIZE)]
            finally:
                os.close(descriptor)
        if piece_hash is not None and sha256(piece).digest() != piece_hash:
            raise Corrupt(f"piece {index} of shard {path} is damaged on disk; `aigen shard verify` repairs it")
        return piece

    def arrived(self, shard_hash: ShardHash) -> bytes | None:
        """Which pieces have come of a shard that this process takes in: bit i % 8 of byte i // 8. None: of no such
        shard."""
        writer = self._writers.get(shard_hash)
        return None if writer is None else writer.bits()

    def verify(
        self,
        shard_hash: ShardHash,
        piece_hashes: bytes,
        on_bytes: OnBytes = lambda count: None,
        damaged: Damaged = damaged_pieces,
    ) -> list[int]:
        """The damaged pieces of a held shard, found by `damaged`; nothing damaged means its whole SHA-256 fits,
        and does not mean that `piece_hashes` are true.
        `on_bytes` is told of each portion that was read: to slow it down, or to end it."""
        return damaged(self.path(shard_hash), shard_hash, piece_hashes, on_bytes)

    def demote(self, shard_hash: ShardHash) -> None:
        """A damaged shard is no longer held; its good pieces stay, so repairing it is an ordinary resume."""
        source = self.path(shard_hash)
        with explained("moving", source):
            os.replace(source, self._partial_path(shard_hash))
            sync_directory(self._partial)
            sync_directory(self._shards)

    def remove(self, shard_hash: ShardHash) -> None:
        """Give a held shard up and free its space."""
        path = self.path(shard_hash)
        with explained("removing", path):
            path.unlink()
            sync_directory(self._shards)

    # --- taking shards in

    def open_partial(self, shard_hash: ShardHash, size_bytes: int, piece_hashes: bytes) -> PartialShard:
        """Become the one writer of a shard. Conflict: it is held already. Busy: somebody else writes it."""
        self._refuse_held(shard_hash)
        target = self._held_path(shard_hash)
        partial = PartialShard(self._partial_path(shard_hash), target, shard_hash, size_bytes, piece_hashes)
        try:
            # It may have been committed between the first look and our lock.
            self._refuse_held(shard_hash)
            with self._writers_lock:
                self._require_room_for(partial)
                self._writers[shard_hash] = partial
            partial.on_close(lambda: self._forget_writer(shard_hash))
            partial.resume()
        except BaseException:
            partial.close()
            raise
        return partial

    def scratch_file(self) -> contextlib.closing[ScratchFile]:
        """A file to build a shard in whose name is not known before its end; see `adopt`."""
        with explained("creating a file in", self._scratch):
            return contextlib.closing(ScratchFile(self._scratch))

    def scratch_directory(self) -> contextlib.AbstractContextManager[Path]:
        """A directory on the store's file system for the length of a `with`, swept later if we are killed."""
        return scratch_directory(self._scratch)

    def adopt(self, scratch: ScratchFile, shard_hash: ShardHash) -> bool:
        """Make a scratch file the held shard whose SHA-256 the caller has just taken; True if it was not held.

        It takes the place of a shard already held: those bytes are known to be good, the old ones only by name.
        """
        path = self._held_path(shard_hash)
        with explained("writing", path):
            new = not is_regular(path)
            os.fsync(scratch.descriptor)
            os.replace(scratch.path, path)
            sync_directory(self._shards)
        return new

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """One import at a time: one that fails takes back the shards it made, which another may count on by then."""
        path = self.root / "import.lock"
        with explained("locking", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            if not (try_lock(descriptor) and still_named(descriptor, path)):
                raise Busy(f"another process is importing into {self.root}; wait for it")
            try:
                yield
            finally:
                with explained("unlocking", path):
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    # --- manifests

    def manifests(self) -> list[ManifestHash]:
        return [ManifestHash(name) for name in _names(self._manifests)]

    def has_manifest(self, manifest_hash: ManifestHash) -> bool:
        return is_regular(self._manifests / manifest_hash.hex())

    def manifest_bytes(self, manifest_hash: ManifestHash) -> bytes:
        """The canonical bytes, checked against their hash, to serve to a peer."""
        path = self._manifests / manifest_hash.hex()
        if not is_regular(path):
            raise NotFound(f"the manifest {manifest_hash.hex()} is not here; fetch it first")
        data = read_file(path, MANIFEST_SIZE_MAX)
        if sha256(data).digest() != manifest_hash:
            raise Corrupt(f"the manifest {path} is damaged on disk; it is fetched again from a peer")
        return data

    def manifest(self, manifest_hash: ManifestHash) -> Manifest:
        return decode(self.manifest_bytes(manifest_hash))

    def put_manifest(self, data: bytes, expected_hash: ManifestHash) -> Manifest:
        """Keep a manifest from anyone, if it is the one that was asked for and holds together."""
        found = sha256(data).digest()
        if found != expected_hash:
            raise BadInput(f"the manifest's SHA-256 is {found.hex()}, asked for was {expected_hash.hex()}")
        manifest = decode(data)
        write_file(self._manifests / expected_hash.hex(), data, self._scratch)
        return manifest

    def missing_shards(self, manifest: Manifest) -> list[int]:
        """The indices of the shards of an artifact that are not held."""
        return [index for index, shard in enumerate(manifest.shards) if not self.held(shard.sha256)]

    # --- quantised weights: files of the engine's own, which is the only one to know their form

    def quantised_stem(self, manifest_hash: ManifestHash) -> Path:
        """What the names of a model's files begin with; its precision follows after a dot."""
        return self._quantised / manifest_hash.hex()

    def remove_quantised(self, manifest_hash: ManifestHash) -> None:
        """Its shards are given up; what was made of them goes too. A model that is loaded keeps its memory."""
        with explained("removing", self._quantised):
            for path in self._quantised.glob(f"{manifest_hash.hex()}.*"):
                path.unlink(missing_ok=True)

    # --- conversions: which artifact came out of which foreign file, so that it is converted once

    def conversion(self, key: bytes) -> ManifestHash | None:
        path = self._conversions / key.hex()
        if not is_regular(path):
            return None
        data = read_file(path, size_max=HASH_SIZE)
        return ManifestHash(data) if len(data) == HASH_SIZE else None

    def remember_conversion(self, key: bytes, manifest_hash: ManifestHash) -> None:
        write_file(self._conversions / key.hex(), manifest_hash, self._scratch)

    # --- space

    def room_bytes(self) -> int:
        """How many bytes of shards would be taken beyond those that are here or on their way."""
        with self._writers_lock:
            coming_bytes = sum(writer.missing_bytes for writer in self._writers.values())
        room = free_bytes(self.root) - self._reserve_bytes - coming_bytes
        if self._budget_bytes is not None:
            room = min(room, self._budget_bytes - self.used_bytes() - coming_bytes)
        return max(0, room)

    def used_bytes(self) -> int:
        """What counts against the disk budget: held shards, shards on their way, manifests, quantised weights."""
        return sum(_sizes(kept) for kept in (self._shards, self._partial, self._manifests, self._quantised))

    def require_room(self, what: str, kept_bytes: int, peak_bytes: int) -> None:
        """NoSpace unless `kept_bytes` fit in the budget and `peak_bytes` on the disk, beside what is coming in."""
        with self._writers_lock:
            coming_bytes = sum(writer.missing_bytes for writer in self._writers.values())
            self._require_budget(what, kept_bytes + coming_bytes, self.used_bytes())
            self._require_disk(what, peak_bytes, coming_bytes)

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            shards_held=len(self.held_shards()),
            shard_bytes=_sizes(self._shards),
            partial_shards=len(_names(self._partial)),
            partial_bytes=_sizes(self._partial),
            quantised_bytes=_sizes(self._quantised),
            manifests=len(self.manifests()),
            free_bytes=free_bytes(self.root),
            disk_budget_bytes=self._budget_bytes,
        )

    def _require_room_for(self, partial: PartialShard) -> None:
        what = f"shard {partial.shard_hash.hex()}"
        others = [writer for writer in self._writers.values() if writer is not partial]
        # A file on its way counts in full from the start, or many at once would pass one by one.
        names = {self._partial_path(writer.shard_hash).name for writer in (partial, *others)}
        used = sum(_sizes(kept) for kept in (self._shards, self._manifests, self._quantised))
        used += _sizes(self._partial, without=names)
        self._require_budget(what, partial.size_bytes, used + sum(writer.size_bytes for writer in others))
        need = partial.size_bytes - partial.allocated_bytes
        self._require_disk(what, need, sum(writer.missing_bytes for writer in others))

    def _require_budget(self, what: str, need: int, used: int) -> None:
        if self._budget_bytes is not None and used + need > self._budget_bytes:
            raise NoSpace(
                f"{what} needs {size_text(need)}, the disk budget of {size_text(self._budget_bytes)} has "
                f"{size_text(max(0, self._budget_bytes - used))} left; raise storage.disk_budget"
            )

    def _require_disk(self, what: str, need: int, promised: int) -> None:
        free = max(0, free_bytes(self.root) - self._reserve_bytes - promised)
        if need > free:
            raise NoSpace(
                f"{what} needs {size_text(need)} in {self.root}, free for it are {size_text(free)} "
                f"({size_text(self._reserve_bytes)} are kept free for the ledger); free some disk space"
            )

    def _refuse_held(self, shard_hash: ShardHash) -> None:
        if self.held(shard_hash):
            raise Conflict(f"shard {shard_hash.hex()} is held already; there is nothing to fetch")

    def _forget_writer(self, shard_hash: ShardHash) -> None:
        with self._writers_lock:
            self._writers.pop(shard_hash, None)

    def _held_path(self, shard_hash: ShardHash) -> Path:
        assert len(shard_hash) == HASH_SIZE
        return self._shards / shard_hash.hex()

    def _partial_path(self, shard_hash: ShardHash) -> Path:
        return self._partial / shard_hash.hex()


def _names(directory: Path) -> list[bytes]:
    return sorted(bytes.fromhex(name) for name in os.listdir(directory) if _HEX_NAME.fullmatch(name))


def _sizes(directory: Path, without: set[str] | None = None) -> int:
    return sum(size for name, size in _entries(directory) if not without or name not in without)


def _entries(directory: Path) -> Iterator[tuple[str, int]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            # Renames by other processes go on meanwhile: what is gone by now is not counted.
            with contextlib.suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False).st_size
