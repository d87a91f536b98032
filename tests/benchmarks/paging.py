"""What of a file is in the page cache, putting it out of there, and what a process has read from the disk."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
LEFT_MAX = 0.001
"""The share of the pages that may stay."""

REPORTED = Path("/sys/module/page_reporting/parameters/reported_kib")
"""What the kernel of a virtual machine has told its host it may take back."""

STILL_S = 8.0
"""It tells every two seconds."""

SETTLE_S_MAX = 600.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def drop(files: Iterable[Path]) -> None:
    """Have none of the files' bytes in memory, and make sure of it."""
    files = list(files)
    for file in files:
        with closing(_Descriptor(file)) as one:
            os.fsync(one.number)
            os.posix_fadvise(one.number, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(files) > LEFT_MAX:
        with suppress(PermissionError):
            DROP_CACHES.write_text("1\n")
    left = resident(files)
    assert left <= LEFT_MAX, f"{left:.1%} of {files[0].parent} stays in the page cache"


def resident(files: Iterable[Path]) -> float:
    """The share of the files' pages that is in the page cache."""
    pages = found = 0
    for file in files:
        with closing(_Descriptor(file)) as one:
            size = os.fstat(one.number).st_size
            count = -(-size // mmap.PAGESIZE)
            states = ctypes.create_string_buffer(count)
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, one.number, 0)
            assert _libc.mincore(address, size, states) == 0, os.strerror(ctypes.get_errno())
            _libc.munmap(address, size)
        pages += count
        found += sum(map((1).__and__, states.raw[:count]))
    return found / pages


def reported_bytes() -> int:
    """0 where nobody counts them."""
    return int(REPORTED.read_text()) << 10 if REPORTED.exists() else 0


def settle() -> None:
    """Wait until the host has what became free. While it takes the pages back, a gigabyte in half a second, everything
    on the machine stands still for tenths of a second, whoever it belongs to."""
    began = changed = time.monotonic()
    reported = reported_bytes()
    while (now := time.monotonic()) < changed + STILL_S and now < began + SETTLE_S_MAX:
        time.sleep(STILL_S / 8)
        if reported_bytes() != reported:
            reported, changed = reported_bytes(), time.monotonic()


def bytes_from_disk(pid: int) -> int:
    """What the process has had read for it so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class _Descriptor:
    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.number)
