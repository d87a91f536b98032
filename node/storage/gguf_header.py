"""The header of a GGUF file from a stranger: metadata and tensor table, with every length checked against the file.

Owns the format's bounds (versions 2 and 3, little endian). Reads no tensor. Knows nothing about what the keys mean.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from contracts.errors import BadInput
from node.storage.files import explained, open_regular

MAGIC = b"GGUF"
TENSORS_MAX = 1 << 16
KEYS_MAX = 1 << 14
ARRAY_LENGTH_MAX = 1 << 22
STRING_SIZE_MAX = 1 << 24
HEADER_SIZE_MAX = 64 << 20
DIMENSIONS_MAX = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# (elements, bytes) of one block of each tensor type, by its number in the format.
_BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}

Value = bool | int | float | str | list["Value"]


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` is in the usual order (rows first), not the file's."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int
    """From the start of the file."""
    size_bytes: int

    @property
    def row_bytes(self) -> int:
        elements, size = _BLOCKS[self.type_number]
        return self.shape[-1] // elements * size


@dataclass(frozen=True)
class GgufHeader:
    """A checked header."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a file on disk; BadInput says what is wrong with it."""
    with explained("reading", path):
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if size < 24 or os.pread(descriptor, 4, 0) != MAGIC:
                raise BadInput(f"{path} is no GGUF file: it does not begin with 'GGUF'")
            with mmap.mmap(descriptor, min(size, HEADER_SIZE_MAX), access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
        finally:
            os.close(descriptor)


class _Reader:
    """A cursor that never leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap, file_size: int) -> None:
        self._path = path
        self._data = data
        self._file_size = file_size
        self._at = len(MAGIC)

    def header(self) -> GgufHeader:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise self._bad(f"it has version {version}, versions 2 and 3 (little endian) are read")
        tensor_count, key_count = self._scalar("<Q"), self._scalar("<Q")
        if not 0 < tensor_count <= TENSORS_MAX or key_count > KEYS_MAX:
            raise self._bad(f"it claims {tensor_count:,} tensors and {key_count:,} keys")
        metadata: dict[str, Value] = {}
        for _ in range(int(key_count)):
            key = self._string()
            if key in metadata:
                raise self._bad(f"the key {key[:80]!r} appears twice")
            metadata[key] = self._value(int(self._scalar("<I")))
        entries = [self._entry() for _ in range(int(tensor_count))]
        return GgufHeader(metadata, self._tensors(entries, metadata.get("general.alignment", 32)))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 0 < dimensions <= DIMENSIONS_MAX:
            raise self._bad(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(int(self._scalar("<Q")) for _ in range(int(dimensions)))
        return name, shape[::-1], int(self._scalar("<I")), int(self._scalar("<Q"))

    def _tensors(self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: Value) -> dict[str, GgufTensor]:
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._bad(f"it has the alignment {str(alignment)[:20]}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in entries:
            if name in tensors:
                raise self._bad(f"tensor {name[:80]!r} appears twice")
            block = _BLOCKS.get(type_number)
            if block is None:
                raise self._bad(f"tensor {name[:80]!r} has type {type_number}, which is not converted")
            elements, block_size = block
            if any(not 0 < size < 1 << 40 for size in shape) or shape[-1] % elements:
                raise self._bad(f"tensor {name[:80]!r} has an impossible shape")
            size = prod(shape) // elements * block_size
            if offset % alignment or start + offset + size > self._file_size:
                raise self._bad(f"tensor {name[:80]!r} lies outside the file of {self._file_size:,} bytes (truncated?)")
            tensors[name] = GgufTensor(name, shape, type_number, start + offset, size)
        return tensors

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(self._format(kind))
        inner = int(self._scalar("<I"))
        length = int(self._scalar("<Q"))
        if inner == _ARRAY or length > ARRAY_LENGTH_MAX:
            raise self._bad(f"it has an array of {length:,} elements of type {inner}")
        if inner == _STRING:
            return [self._string() for _ in range(length)]
        layout = self._format(inner)
        raw = self._take(struct.calcsize(layout) * length)
        return list(struct.unpack(f"<{length}{layout[1]}", raw))

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._bad(f"it has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _scalar(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return value

    def _string(self) -> str:
        length = int(self._scalar("<Q"))
        if length > STRING_SIZE_MAX:
            raise self._bad(f"it has a string of {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._bad("it has a string that is not UTF-8") from error

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise self._bad(f"its header runs over the end of the file at byte {self._at:,} (truncated?)")
        self._at += count
        return self._data[self._at - count : self._at]

    def _bad(self, why: str) -> BadInput:
        return BadInput(f"{self._path} is not a GGUF file this version takes in: {why}")
