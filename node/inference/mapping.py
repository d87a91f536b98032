"""The artifact's byte stream as one address range over the shard files: nothing copied, nothing written.

Owns the address range and the windows into it. Knows no file format: offsets in, bytes or tensors out.
"""

import ctypes
import mmap
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from contracts.errors import BadInput, Corrupt, NoSpace

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

HUGE_PAGE = 2 << 20
"""Where a file lies in memory in pieces of this size, the kernel maps them whole, if the address is a multiple too. Of
small pages, a model of 14.5 GB has 3.5 million."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class ShardMapping:
    """Shard files side by side in memory, read-only. Close it when no tensor over it is in use any more."""

    def __init__(self, shards: Sequence[Path], shard_size: int, total_size: int) -> None:
        assert total_size > 0
        assert len(shards) == -(-total_size // shard_size)
        self._total_size = total_size
        self._windows: list[weakref.ref[memoryview]] = []
        self._range = _Range(total_size)
        self.private_bytes = 0
        try:
            # The boundaries between shards fall on pages unless somebody cuts very odd shards; those are read.
            mapped = shard_size % mmap.PAGESIZE == 0 or len(shards) == 1
            if not mapped:
                self._range.own()
                self.private_bytes = total_size
            for index, path in enumerate(shards):
                offset = index * shard_size
                self._place(path, offset, min(shard_size, total_size - offset), mapped)
        except BaseException:
            self._range.release()
            raise

    @property
    def total_size(self) -> int:
        """Bytes of the stream."""
        return self._total_size

    def read(self, offset: int, size: int) -> bytes:
        """A copy of a small part, for headers and configuration files."""
        self._check(offset, size)
        return ctypes.string_at(self._range.address + offset, size)

    def forget(self, offset: int, size: int) -> None:
        """A part that is not needed for now: its pages leave this process's memory, the page cache may keep them."""
        self._check(offset, size)
        if not self.private_bytes:
            self._range.forget(offset, size)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
        """A tensor over the bytes at the offset, wherever shard boundaries fall; never write to it."""
        count = 1
        for extent in shape:
            count *= extent
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        self._check(offset, count * dtype.itemsize)
        # torch keeps its own reference to the window for as long as any view of the storage lives,
        # so a window that is still there at the end is a tensor that is still there.
        window = self._range.window(offset, count * dtype.itemsize)
        self._windows.append(weakref.ref(window))
        return torch.frombuffer(window, dtype=dtype, count=count).view(tuple(shape))

    def join(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor | None:
        """Two matrices as one, rows under rows, if they lie back to back in the stream; nothing is copied."""
        offset = first.data_ptr() - self._range.address
        if not 0 <= offset < self._total_size or first.data_ptr() + first.nbytes != second.data_ptr():
            return None
        if first.dtype != second.dtype or first.shape[1:] != second.shape[1:]:
            return None
        return self.tensor(first.dtype, (first.shape[0] + second.shape[0], *first.shape[1:]), offset)

    def in_use(self) -> int:
        """Tensors over this mapping that are still alive somewhere."""
        self._windows = [window for window in self._windows if window() is not None]
        return len(self._windows)

    def close(self) -> int:
        """Unmap. Tensors still alive keep the range mapped, for to touch them would crash; their number is returned."""
        alive = self.in_use()
        if alive == 0:
            self._range.release()
        return alive

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self._total_size:
            raise BadInput(f"bytes {offset} to {offset + size} lie outside the artifact of {self._total_size} bytes")

    def _place(self, path: Path, offset: int, size: int, mapped: bool) -> None:
        """Map one shard at its offset, or read it there."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Corrupt(f"shard {path} cannot be opened ({error.strerror}); fetch it again") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Corrupt(f"shard {path} is not a regular file; remove it and fetch the shard again")
            if status.st_size != size:
                raise Corrupt(f"shard {path} has {status.st_size} bytes instead of {size}; fetch it again")
            if mapped:
                self._range.map_file(descriptor, offset, size)
            else:
                self._range.read_file(descriptor, offset, size, path)
        finally:
            os.close(descriptor)


class _Range:
    """A reserved range of addresses, given back once."""

    def __init__(self, size: int) -> None:
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        found = _mmap(None, self._size + HUGE_PAGE, _PROT_NONE, flags, -1)
        self.address = -(-found // HUGE_PAGE) * HUGE_PAGE
        _unmap(found, self.address)
        _unmap(self.address + self._size, found + self._size + HUGE_PAGE)
        self._whole: memoryview | None = memoryview((ctypes.c_char * size).from_address(self.address)).cast("B")

    def map_file(self, descriptor: int, offset: int, size: int) -> None:
        """Put a file's pages at the offset, shared with the page cache."""
        _mmap(self.address + offset, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor)

    def own(self) -> None:
        """Make the whole range memory of our own, to read into."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(self.address, self._size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)

    def read_file(self, descriptor: int, offset: int, size: int, path: Path) -> None:
        """Copy a file to the offset."""
        view = self.window(offset, size)
        done = 0
        while done < size:
            count = os.preadv(descriptor, [view[done:]], done)
            if count == 0:
                raise Corrupt(f"shard {path} ended at {done} of {size} bytes while it was read; fetch it again")
            done += count

    def forget(self, offset: int, size: int) -> None:
        """Whole pages of a part that was mapped from files: they come back from there when they are touched."""
        begin = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            _libc.madvise(self.address + begin, end - begin, mmap.MADV_DONTNEED)

    def window(self, offset: int, size: int) -> memoryview:
        """An object of its own over a part, so that its life can be watched."""
        assert self._whole is not None
        return self._whole[offset : offset + size]

    def release(self) -> None:
        """Give the addresses back; a second call does nothing."""
        if self._whole is not None:
            self._whole = None
            _unmap(self.address, self.address + self._size)


def _unmap(begin: int, end: int) -> None:
    if begin < end:
        _libc.munmap(begin, end - begin)


def _mmap(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    result = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if result is None or result == _MAP_FAILED:
        number = ctypes.get_errno()
        raise NoSpace(f"{size} bytes of addresses cannot be mapped: {os.strerror(number)}; close other models")
    return int(result)
