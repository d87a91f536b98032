"""A piece packed for the wire: its bytes in planes, and those in a zstd frame.

Of 16-bit floats every second byte holds sign and exponent, of 32-bit floats every fourth: these repeat, what lies
between them hardly does. Byte k of every number makes plane k, the planes follow one another, and zstd then finds what
repeats. A packed piece is one byte, the number of planes, and one frame (RFC 8878) that says the size of its content.

How many planes is tried on a sample: a piece may begin anywhere in a number, lie in several tensors or in none, so a
wrong guess costs room, never a bit. Knows no sockets, no hashes, and not whether packing is worth its time.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import zstandard

from contracts.errors import BadPeer
from contracts.types import PIECE_SIZE

PLANES: Final = (1, 2, 4)
"""One plane is the piece as it is, for what is no floats."""
LEVEL: Final = 1
"""Higher ones take twice the time and more, and make planes of weights no smaller."""
SAMPLES: Final = 4
SAMPLE_BYTES: Final = 4096
"""Of each; together they cost a tenth of what packing costs."""
SHRINK_MIN: Final = 1 / 16
"""The part of the sample that must be saved, or the piece is not packed."""

_Bytes = npt.NDArray[np.uint8]


class Packer:
    """Packs pieces, one at a time."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdCompressor(level=LEVEL)

    def pack(self, piece: memoryview) -> bytes | None:
        """The piece packed, always smaller than it is; None when it hardly shrinks."""
        data = np.frombuffer(piece, np.uint8)
        sample = _sample(data)
        sizes = {count: self._size(sample, count) for count in PLANES}
        count = min(PLANES, key=sizes.__getitem__)
        if sizes[count] > len(sample) * (1 - SHRINK_MIN):
            return None
        packed = bytes((count,)) + self._zstd.compress(_split(data, count).data)
        return packed if len(packed) < len(piece) else None

    def _size(self, sample: _Bytes, count: int) -> int:
        """What a sample takes in so many planes, each on its own: zstd has one code for a whole block, and only the
        planes of a piece are longer than a block."""
        return sum(len(self._zstd.compress(np.ascontiguousarray(sample[plane::count]).data)) for plane in range(count))


class Unpacker:
    """Unpacks pieces, one at a time."""

    def __init__(self) -> None:
        # Without this, a frame that is cut short could ask for a window of 128 MiB.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=PIECE_SIZE)

    def unpack(self, packed: memoryview, piece: memoryview) -> None:
        """Fill `piece`. Nothing is made that is larger than it. Raises BadPeer."""
        count, frame = packed[0], packed[1:]
        if count not in PLANES:
            raise BadPeer(f"comes in {count} planes, {', '.join(map(str, PLANES))} are known")
        try:
            size = zstandard.frame_content_size(frame)
            if size != len(piece):
                raise BadPeer(f"comes in a frame that says it has {size:,} bytes where {len(piece):,} are due")
            planes = self._zstd.decompress(frame, max_output_size=len(piece), allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise BadPeer(f"comes in {len(packed):,} bytes that cannot be unpacked: {error}") from None
        _join(np.frombuffer(planes, np.uint8), count, np.frombuffer(piece, np.uint8))


def _sample(data: _Bytes) -> _Bytes:
    """Some of the bytes from several places: a piece may begin in one tensor and end in another."""
    if len(data) <= SAMPLES * SAMPLE_BYTES:
        return data
    step = len(data) // SAMPLES // max(PLANES) * max(PLANES)  # the bytes of a number stay in step
    return np.concatenate([data[at * step : at * step + SAMPLE_BYTES] for at in range(SAMPLES)])


def _split(data: _Bytes, count: int) -> _Bytes:
    """The planes, one after the other; the first ones are a byte longer when the length is no multiple."""
    return np.concatenate([data[plane::count] for plane in range(count)])


def _join(planes: _Bytes, count: int, into: _Bytes) -> None:
    """Undo `_split`."""
    at = 0
    for number in range(count):
        plane = into[number::count]
        plane[:] = planes[at : at + len(plane)]
        at += len(plane)
