"""Which weights of a model are quantised to what, and where each lies in the file that holds them.

A pure function of the tensors' names and shapes: the same on every machine, and known before a byte is computed.
Matrices that are multiplied with the same vector stand as one. Knows no torch and no values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Literal

import msgspec

from node.inference.headers import ITEM_BITS, TensorEntry

GROUP = 32
"""Neighbouring weights of a row that share a scale in int4. Smaller is not taken by torch, larger rounds worse."""

MIXED = 32
"""Numbers of a row that are mixed with one another in int8."""

COLUMNS_MULTIPLE = 32
"""torch's kernels want rows in multiples of this many weights, and so do groups and what is mixed."""

ROWS_MULTIPLE = 64
"""Rows of a block in the largest of torch's packings: int4 matrices have a multiple of it, on every machine."""

ALIGNMENT = 64
"""Of each part: a cache line, and more than any element."""

FORMAT = "aigen-quantised-2"
"""Changes with the arithmetic: files of another one are made anew."""

WEIGHT = ".weight"
COARSE = ("gate_proj", "up_proj", "fc_in")
"""Modules that bear int4: half of a Llama's weights and a third of a CodeGen's. In the others, it costs several times
as much quality for the bytes it saves (attention, above all its values, and what goes back into the residual stream),
so they are int8 in an int4 model as well."""

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules with the same input."""

INT8_COLUMNS_MAX = 1 << 17
"""Products of longer rows could leave 32 bits."""

SCALE_BYTES = 2
"""A bf16 number."""

Kind = Literal["plain", "int8", "int4"]


@dataclass(frozen=True)
class Part:
    """A tensor, or matrices one under the other. `plain` is as it is stored, but for matrices, which are bf16 then."""

    names: tuple[str, ...]
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scales_offset: int = 0

    @property
    def values_bytes(self) -> int:
        """The numbers alone."""
        bits = {"int8": 8, "int4": 4}.get(self.kind) or ITEM_BITS[self.dtype]
        return prod(self.shape) * bits // 8

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """One for each row; or for each group of each row, with a middle."""
        rows, columns = self.shape
        return (rows,) if self.kind == "int8" else (columns // GROUP, rows, 2)

    @property
    def end(self) -> int:
        """The first byte after it."""
        if self.kind == "plain":
            return self.offset + self.values_bytes
        return self.scales_offset + prod(self.scales_shape) * SCALE_BYTES


@dataclass(frozen=True)
class Layout:
    """The parts in the order of their bytes; offsets count from the first part."""

    precision: str
    parts: tuple[Part, ...]

    @property
    def size_bytes(self) -> int:
        """Of all parts."""
        return self.parts[-1].end if self.parts else 0

    def digest(self, *more: str) -> bytes:
        """Names this layout and what else the bytes depend on."""
        return sha256(msgspec.json.encode((FORMAT, self.precision, self.parts, more))).digest()


def lay_out(entries: Mapping[str, TensorEntry], precision: Literal["int8", "int4"]) -> Layout:
    """Where everything goes. `entries` are the tensors the model has, without those that are another one's."""
    parts: list[Part] = []
    offset = 0
    for names in _together(entries):
        part = _part(tuple(entries[name] for name in names), precision, offset)
        parts.append(part)
        offset = _aligned(part.end)
    return Layout(precision, tuple(parts))


def _together(entries: Mapping[str, TensorEntry]) -> Iterable[tuple[str, ...]]:
    """The names in order, those that stand together in one."""
    done: set[str] = set()
    for name in sorted(entries):
        if name in done:
            continue
        group = _group(name, entries)
        done.update(group)
        yield group


def _group(name: str, entries: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    prefix, _, module = name.removesuffix(WEIGHT).rpartition(".")
    for group in TOGETHER:
        names = tuple(f"{prefix}.{one}{WEIGHT}" for one in group)
        if name.endswith(WEIGHT) and module in group and all(other in entries for other in names):
            matrices = [entries[other].shape for other in names]
            if all(len(shape) == 2 and shape[1:] == matrices[0][1:] for shape in matrices):
                return names
    return (name,)


def _part(entries: tuple[TensorEntry, ...], precision: Literal["int8", "int4"], offset: int) -> Part:
    first = entries[0]
    names = tuple(entry.name for entry in entries)
    if len(first.shape) != 2 or not first.name.endswith(WEIGHT):
        return Part(names, "plain", first.dtype, first.shape, offset)
    shape = (sum(entry.shape[0] for entry in entries), first.shape[1])
    kind = _kind(entries, precision)
    if kind == "plain":
        return Part(names, kind, "BF16", shape, offset)
    values = Part(names, kind, "", shape, offset)
    return Part(names, kind, "", shape, offset, _aligned(offset + values.values_bytes))


def _kind(entries: tuple[TensorEntry, ...], precision: Literal["int8", "int4"]) -> Kind:
    """The precision that was asked for, or the next better that torch has for these shapes."""
    first = entries[0]
    if not 0 < first.shape[1] <= INT8_COLUMNS_MAX or first.shape[1] % COLUMNS_MULTIPLE:
        return "plain"
    coarse = first.name.removesuffix(WEIGHT).rpartition(".")[2] in COARSE
    whole_blocks = all(entry.shape[0] % ROWS_MULTIPLE == 0 for entry in entries)
    return "int4" if precision == "int4" and coarse and whole_blocks else "int8"


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
