"""The header of a safetensors file, read as what it is: bytes from a stranger. Knows no tensors and no mapping."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import msgspec

from contracts.errors import BadInput

HEADER_BYTES_MAX = 100 << 20
"""As the safetensors library has it."""

TENSORS_MAX = 1 << 17
"""Tensors of one file; a 1,024-layer model with experts stays below."""

RANK_MAX = 8
"""Dimensions of one tensor."""

LENGTH_BYTES = 8
"""The header's length, little endian, opens the file."""

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
"""Bits of one element; types beyond these are refused when a file has them."""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file; `offset` counts from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def parse(path: str, size: int, read: Callable[[int, int], bytes]) -> tuple[TensorEntry, ...]:
    """The tensors of the file, in the order of their bytes. `read(offset, size)` gives bytes of the file.

    Refused: a length beyond the file, no JSON, unknown types, sizes that disagree with shapes, overlaps and holes.
    """
    if size < LENGTH_BYTES:
        raise BadInput(f"{path} has {size} bytes: no safetensors file is that short; import the model again")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if length > min(HEADER_BYTES_MAX, size - LENGTH_BYTES):
        raise BadInput(
            f"{path} says its header has {length} bytes, the file has {size} and a header at most {HEADER_BYTES_MAX}: "
            "truncated or no safetensors; import the model again"
        )
    entries = _decode(path, read(LENGTH_BYTES, length))
    if len(entries) > TENSORS_MAX:
        raise BadInput(f"{path} has {len(entries)} tensors; at most {TENSORS_MAX} are taken")
    data = LENGTH_BYTES + length
    expected = 0
    tensors = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        _check_entry(path, name, entry)
        if begin != expected:
            raise BadInput(f"tensor {name} of {path} begins at {begin}, {expected} expected: overlap or hole")
        expected = end
        tensors.append(TensorEntry(name, entry.dtype, tuple(entry.shape), data + begin, end - begin))
    if expected != size - data:
        raise BadInput(
            f"the tensors of {path} take {expected} bytes, the file has {size - data} for them: "
            "truncated or padded; import the model again"
        )
    return tuple(tensors)


def _decode(path: str, header: bytes) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        return {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadInput(f"the header of {path} is no safetensors header: {error}") from error


def _check_entry(path: str, name: str, entry: _Entry) -> None:
    bits = ITEM_BITS.get(entry.dtype)
    if bits is None:
        raise BadInput(f"tensor {name} of {path} has the unknown type {entry.dtype[:16]!r}")
    if len(entry.shape) > RANK_MAX or any(extent < 0 for extent in entry.shape):
        raise BadInput(f"tensor {name} of {path} has the shape {entry.shape[: RANK_MAX + 1]}")
    begin, end = entry.data_offsets
    size = prod(entry.shape) * bits // 8
    if begin < 0 or end - begin != size:
        raise BadInput(f"tensor {name} of {path} lies at {begin} to {end}, its shape {entry.shape} takes {size} bytes")
