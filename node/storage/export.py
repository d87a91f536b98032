"""A model of the store laid out for other servers: `shards/SHA256` and `manifests/SHA256` under a directory.

Owns how an export comes about: every shard is hashed on its way, appears under its name only whole, and the manifest
comes last, so a directory with the manifest has all it lists. An export that is done again, or goes on after a kill,
hashes what is there and does the rest. Knows no web server. Blocking.

On one file system a shard is a hard link: no second copy, and the same inode that was hashed. Whatever lies in the
directory is held open or named within what is held open, so a symbolic link put there is refused, not followed.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from contracts.errors import BadInput, Busy, Corrupt, NoSpace, NotFound
from contracts.types import ManifestHash
from node.storage.files import (
    begin_writing_back,
    explained,
    open_regular,
    read_exactly,
    size_text,
    try_lock,
    write_all,
)
from node.storage.hashing import BLOCK_SIZE
from node.storage.manifest import ManifestShard, decode
from node.storage.store import DISK_RESERVE_BYTES, ShardStore

Progress = Callable[[int, int], None]
"""Bytes of shards done, and of all."""

_PART_NAME: Final = re.compile(r"\.[0-9a-f]{64}\.part")
_NO_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})
"""Another file system, one without links, a file that is not ours to link, too many links: then it is copied."""


@dataclass(frozen=True)
class Exported:
    """How many different shards were linked, copied, and there already; and the bytes of all of them."""

    linked: int
    copied: int
    kept: int
    size_bytes: int


def export(
    store: ShardStore,
    manifest_hashes: Sequence[ManifestHash],
    target: Path,
    copy: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> Exported:
    """Lay artifacts of `store` out under `target`; with `copy` never by links.

    Raises NotFound before anything is written when a shard is not held; Corrupt when one is damaged; NoSpace; Busy
    while another export goes into `target`; BadInput when something is in the way.
    """
    manifests = {manifest_hash: store.manifest_bytes(manifest_hash) for manifest_hash in manifest_hashes}
    shards = _held_shards(store, manifests)
    total = sum(shard.size for shard in shards)
    counts = {"linked": 0, "copied": 0, "kept": 0}
    done = 0
    with _exclusive(target) as root, _Folder(root, target / "shards") as folder:
        for shard in shards:
            counts[folder.take(store.path(shard.sha256), shard, copy)] += 1
            done += shard.size
            progress(done, total)
        with _Folder(root, target / "manifests") as last:
            for manifest_hash, data in manifests.items():
                last.write(manifest_hash.hex(), data)
        with explained("writing", target):
            os.fsync(root)
    return Exported(**counts, size_bytes=total)


def _held_shards(store: ShardStore, manifests: dict[ManifestHash, bytes]) -> list[ManifestShard]:
    """The different shards of some manifests, all of them held."""
    found: dict[bytes, ManifestShard] = {}
    for manifest_hash, data in manifests.items():
        manifest = decode(data)
        if missing := store.missing_shards(manifest):
            raise NotFound(
                f"{len(missing)} of the {len(manifest.shards)} shards of manifest {manifest_hash.hex()} are not held "
                f"in {store.root}, the first is number {missing[0]}: export on a node that holds them all, or let "
                "`aigen model load` fetch them"
            )
        found |= {shard.sha256: shard for shard in manifest.shards}
    return list(found.values())


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[int]:
    """The directory, made if need be and held open, with no other export going into it."""
    with explained("creating", target):
        with contextlib.suppress(FileExistsError):
            target.mkdir(parents=True)
        root = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            free = try_lock(root)
        except OSError as error:
            raise BadInput(f"{target} cannot be locked ({error.strerror}): export to a local disk") from error
        if not free:
            raise Busy(f"another export goes into {target}; wait for it")
        yield root
    finally:
        os.close(root)


class _Folder:
    """A directory of the export, held open. `path` is only what messages call it."""

    def __init__(self, root: int, path: Path) -> None:
        self._path = path
        with explained("opening", path):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.name, dir_fd=root)
            self._descriptor = os.open(
                path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root
            )

    def __enter__(self) -> Self:
        try:
            with explained("sweeping", self._path):
                for name in os.listdir(self._descriptor):
                    if _PART_NAME.fullmatch(name):  # of an export that was killed
                        os.unlink(name, dir_fd=self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def take(self, source: Path, shard: ManifestShard, copy: bool) -> str:
        """Have a held shard under its name, its bytes proved; says how it came: `linked`, `copied` or `kept`."""
        name = shard.sha256.hex()
        if self._has(name, shard.size, shard.sha256):
            return "kept"
        with explained("writing", self._path / name), self._part(name) as part:
            linked = not copy and self._link(source, part)
            # A link is hashed under its new name: what is proved is what is served, whatever the store does meanwhile.
            found = self._hash(part, shard.size) if linked else self._copy(source, part, shard.size)
            if found != shard.sha256:
                raise Corrupt(f"shard {source} is damaged on disk; `aigen shard verify` repairs it")
            self._publish(part, name)
        return "linked" if linked else "copied"

    def write(self, name: str, data: bytes) -> None:
        """Have a small file under its name, which is its SHA-256."""
        if self._has(name, len(data), bytes.fromhex(name)):
            return
        with explained("writing", self._path / name), self._part(name) as part:
            descriptor = self._create(part)
            try:
                write_all(descriptor, data, 0)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._publish(part, name)

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[str]:
        """A name for a file that is not whole yet; gone at the end, whatever happens."""
        part = f".{name}.part"
        try:
            yield part
        except FileExistsError as error:
            raise Busy(f"{self._path / part} came from elsewhere: let nobody else write into {self._path}") from error
        finally:
            # Also after it was renamed: onto a link to the same inode a rename does nothing.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part, dir_fd=self._descriptor)

    def _publish(self, part: str, name: str) -> None:
        os.replace(part, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        os.fsync(self._descriptor)

    def _has(self, name: str, size: int, digest: bytes) -> bool:
        """Whether the whole file is here already. What is not a file is refused, and not replaced."""
        with explained("reading", self._path / name):
            try:
                return self._hash(name, size) == digest
            except FileNotFoundError:
                return False

    def _hash(self, name: str, size: int) -> bytes | None:
        """The SHA-256 of a file here; None when it has another size."""
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._descriptor)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise BadInput(f"{self._path / name} is in the way and not a regular file; remove it")
            if facts.st_size != size:
                return None
            return _pass_through(descriptor, lambda _block, _offset: None)
        finally:
            os.close(descriptor)

    def _create(self, part: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(part, flags, 0o644, dir_fd=self._descriptor)

    def _link(self, source: Path, part: str) -> bool:
        try:
            os.link(source, part, dst_dir_fd=self._descriptor, follow_symlinks=False)
        except OSError as error:
            if error.errno in _NO_LINK:
                return False
            raise
        return True

    def _copy(self, source: Path, part: str, size: int) -> bytes:
        """The SHA-256 of what was copied."""
        facts = os.fstatvfs(self._descriptor)
        free = max(0, facts.f_bavail * facts.f_frsize - DISK_RESERVE_BYTES)
        if size > free:
            raise NoSpace(
                f"shard {source.name} needs {size_text(size)} in {self._path}, free for it are {size_text(free)} "
                f"({size_text(DISK_RESERVE_BYTES)} are left free); free some disk space, what is exported stays"
            )
        with contextlib.ExitStack() as stack:
            reading = open_regular(source)
            stack.callback(os.close, reading)
            writing = self._create(part)
            stack.callback(os.close, writing)

            def write(block: memoryview, offset: int) -> None:
                write_all(writing, block, offset)
                begin_writing_back(writing, offset + len(block), len(block))

            found = _pass_through(reading, write)
            os.fsync(writing)
        return found


def _pass_through(descriptor: int, use: Callable[[memoryview, int], None]) -> bytes:
    """Read a file block by block; `use` gets each with its offset. Returns the SHA-256 of all."""
    hasher = sha256()
    buffer = memoryview(bytearray(BLOCK_SIZE))
    offset = 0
    while count := read_exactly(descriptor, buffer, offset):
        hasher.update(buffer[:count])
        use(buffer[:count], offset)
        offset += count
    return hasher.digest()
