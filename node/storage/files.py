"""The file system under the store: whole writes, directory syncs, locks, scratch space, errors in plain words.

Owns every rule about what survives a crash: a file appears under its name only after its bytes are on the disk, and a
rename counts only after its directory is synced. Knows nothing about models, shards or manifests.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from contracts.errors import BadInput, Conflict, Corrupt, NoSpace, NotAllowed, NotFound, Refused

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_SCRATCH_ATTEMPTS_MAX = 16
_SCRATCH_NAME = re.compile(r"[0-9a-f]{32}")


def size_text(size_bytes: int) -> str:
    """`269.1 MB (269,060,552 bytes)`: readable, and exact enough to act on."""
    value, unit = float(size_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    exact = f"{size_bytes:,} bytes"
    return exact if unit == "bytes" else f"{value:.1f} {unit} ({exact})"


def refusal(action: str, path: Path, error: OSError) -> Refused | None:
    """The expected error an OSError stands for, or None when it is none we can explain (then it is a bug)."""
    number = error.errno
    if number in _NO_SPACE:
        limit = "the file size limit (ulimit -f)" if number == errno.EFBIG else "the disk or its quota"
        return NoSpace(f"{action} {path}: {limit} is exhausted ({_free_text(path)}); free some space and try again")
    if number in _NOT_ALLOWED:
        return NotAllowed(f"{action} {path}: {os.strerror(number)}; check who owns it and how it is mounted")
    if number == errno.EIO:
        return Corrupt(f"{action} {path}: the disk reported an input/output error; check the disk")
    if number == errno.ELOOP:
        return BadInput(f"{action} {path}: it is a symbolic link, which is not followed; put the real file there")
    if number == errno.ENOENT:
        return NotFound(f"{action} {path}: there is no such file; check the path")
    if number in (errno.ENOTDIR, errno.EISDIR):
        return BadInput(f"{action} {path}: {os.strerror(number)}; check the path")
    return None


def _free_text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return f"{size_text(free_bytes(path))} free"
    return "free space unknown"


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn the OSErrors of its body into expected errors that name `action` and `path`."""
    try:
        yield
    except OSError as error:
        refused = refusal(action, path, error)
        if refused is None:
            raise
        raise refused from error


def free_bytes(path: Path) -> int:
    """What an ordinary process may still write on the file system of `path` (or of its first existing parent)."""
    probe = path
    while not probe.exists() and probe != probe.parent:
        probe = probe.parent
    facts = os.statvfs(probe)
    return facts.f_bavail * facts.f_frsize


def sync_directory(path: Path) -> None:
    """Make the renames, creations and removals in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write every byte at `offset`: pwrite may write fewer when the disk is nearly full, and says ENOSPC only then."""
    view = memoryview(data)
    while len(view) > 0:
        written = os.pwrite(descriptor, view, offset)
        view = view[written:]
        offset += written


def begin_writing_back(descriptor: int, end: int, size_bytes: int) -> None:
    """Have the kernel start to write the `size_bytes` before `end` to the disk, without waiting for it."""
    # Linux starts writing dirty pages of the range when told that they are not needed; those being written stay.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, end - size_bytes, size_bytes, os.POSIX_FADV_DONTNEED)


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; fewer bytes than asked for only at the end of the file."""
    filled = 0
    while filled < len(buffer):
        count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
        if count == 0:
            break
        filled += count
    return filled


def write_file(path: Path, data: bytes, scratch: Path) -> None:
    """Replace `path` with `data` so that a crash at any point leaves either the old file or the new one, whole."""
    with explained("writing", path), contextlib.closing(ScratchFile(scratch)) as file:
        write_all(file.descriptor, data, 0)
        os.fsync(file.descriptor)
        os.replace(file.path, path)
        sync_directory(path.parent)


def read_file(path: Path, size_max: int) -> bytes:
    """A small regular file, whole; larger than `size_max` or not a regular file is refused before it is read."""
    with explained("reading", path):
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if size > size_max:
                raise BadInput(f"{path} has {size:,} bytes, more than the {size_max:,} such a file may have")
            data = bytearray(size)
            count = read_exactly(descriptor, memoryview(data), 0)
            return bytes(data[:count])
        finally:
            os.close(descriptor)


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; symbolic links, devices and pipes are refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(f"{path} is not a regular file; only regular files are read")
    return descriptor


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock of an open file. It belongs to the open file, so the kernel drops it if we are killed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_regular(path: Path) -> bool:
    """Whether `path` itself is a regular file; what a symbolic link points to does not count."""
    try:
        return stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def still_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file: between open and lock another process may have moved it away."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)


class DirectoryLock:
    """One process per data directory: the second is refused, a killed one leaves nothing to clean up."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._descriptor = -1

    def acquire(self) -> None:
        with explained("locking", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise Conflict(
                f"the data directory {self._path.parent} is in use by process {holder}; "
                "stop that node or choose another --data-dir"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class ScratchFile:
    """A file under a random name in a scratch directory, locked while we live; what a crash leaves is swept later."""

    def __init__(self, directory: Path) -> None:
        for _ in range(_SCRATCH_ATTEMPTS_MAX):
            self.path = directory / secrets.token_hex(16)
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            # A sweep may take the file between its creation and its lock: then make another.
            if try_lock(self.descriptor) and still_named(self.descriptor, self.path):
                return
            os.close(self.descriptor)
        raise AssertionError(f"{_SCRATCH_ATTEMPTS_MAX} scratch files in a row were swept away in {directory}")

    def close(self) -> None:
        """Close and remove; after a rename to its final name there is nothing left to remove."""
        if self.descriptor >= 0:
            if still_named(self.descriptor, self.path):
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A directory for the length of the body, removed whatever happens. Its lock file stands beside it."""
    with explained("creating a directory in", parent):
        guard = ScratchFile(parent)
        directory = guard.path.with_suffix(".d")
        directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        guard.close()


def sweep_scratch(directory: Path) -> int:
    """Remove what killed processes left in a scratch directory; what a living process holds is left. Returns bytes."""
    freed = 0
    for entry in sorted(directory.iterdir()):
        if not _SCRATCH_NAME.fullmatch(entry.name):
            continue
        try:
            descriptor = os.open(entry, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            if try_lock(descriptor) and still_named(descriptor, entry):
                freed += os.fstat(descriptor).st_size
                shutil.rmtree(entry.with_suffix(".d"), ignore_errors=True)
                entry.unlink()
        finally:
            os.close(descriptor)
    # A directory whose guard is gone: the process died between the two removals above.
    for entry in directory.glob("*.d"):
        if not entry.with_suffix("").exists():
            shutil.rmtree(entry, ignore_errors=True)
    return freed
