"""The header of a safetensors file from a stranger: every length, offset and shape checked before anything uses it.

Owns the format's bounds. Reads the header only, never a tensor. Knows nothing about models.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import msgspec

from contracts.errors import BadInput
from node.storage.files import explained, open_regular, read_exactly

HEADER_SIZE_MAX = 100_000_000
"""The bound of the reference implementation."""
TENSORS_MAX = 1 << 18
DIMENSIONS_MAX = 16
_LENGTH_SIZE = 8

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the header; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header."""

    tensors: dict[str, Tensor]
    data_start: int


def read_header(path: Path) -> Header:
    """The header of a file on disk; BadInput says what is wrong with it."""
    with explained("reading", path):
        descriptor = open_regular(path)
        try:
            file_size = os.fstat(descriptor).st_size
            length_field = bytearray(_LENGTH_SIZE)
            if read_exactly(descriptor, memoryview(length_field), 0) != _LENGTH_SIZE:
                raise _bad(path, f"it has {file_size} bytes, too few for a header")
            length = int.from_bytes(length_field, "little")
            if length > min(HEADER_SIZE_MAX, file_size - _LENGTH_SIZE):
                raise _bad(path, f"its header claims {length:,} bytes, the file has {file_size:,}")
            raw = bytearray(length)
            read_exactly(descriptor, memoryview(raw), _LENGTH_SIZE)
        finally:
            os.close(descriptor)
    return _parse(path, bytes(raw), file_size - _LENGTH_SIZE - length)


def _parse(path: Path, raw: bytes, data_size: int) -> Header:
    if not raw.startswith(b"{"):
        raise _bad(path, "its header is not JSON")
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        metadata = entries.pop("__metadata__", None)
        if metadata is not None:
            msgspec.json.decode(metadata, type=dict[str, str])
        tensors = {name: msgspec.json.decode(entry, type=Tensor) for name, entry in entries.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(path, f"its header is malformed: {error}") from error
    if not 0 < len(tensors) <= TENSORS_MAX:
        raise _bad(path, f"it has {len(tensors):,} tensors, 1 to {TENSORS_MAX:,} are allowed")
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        _check_tensor(path, name, tensor)
        begin, end = tensor.data_offsets
        # No holes and no overlaps: every byte of the file belongs to one tensor.
        if begin != position:
            raise _bad(path, f"tensor {name[:80]!r} begins at byte {begin:,} of the data, expected was {position:,}")
        position = end
    if position != data_size:
        raise _bad(path, f"its tensors end at byte {position:,} of the data, the file at {data_size:,} (truncated?)")
    return Header(tensors, _LENGTH_SIZE + len(raw))


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    bits = _BITS.get(tensor.dtype)
    if bits is None:
        raise _bad(path, f"tensor {name[:80]!r} has the unknown type {tensor.dtype[:20]!r}")
    if len(tensor.shape) > DIMENSIONS_MAX or any(not 0 <= size < 1 << 48 for size in tensor.shape):
        raise _bad(path, f"tensor {name[:80]!r} has an impossible shape")
    begin, end = tensor.data_offsets
    if tensor.elements * bits != (end - begin) * 8 or begin < 0:
        raise _bad(path, f"tensor {name[:80]!r} takes {end - begin:,} bytes, its shape and type say otherwise")


def _bad(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is not a valid safetensors file: {why}")
