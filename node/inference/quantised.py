"""The file of a model's quantised weights: made from its proved shards, checked whenever it is opened, mapped as it is.

Owns the file's form and its life: it appears under its name only whole, and what is damaged, half written or of another
CPU's form is made anew. Both are generators, so that answers get their turns meanwhile. Knows no architecture.
"""

import contextlib
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from struct import Struct

import torch

from contracts.errors import NoSpace
from node.inference.headers import TensorEntry
from node.inference.layout import ROWS_MULTIPLE, Layout, Part
from node.inference.mapping import ShardMapping
from node.inference.quantising import PRECISIONS, Packing, to_int4, to_int8
from node.inference.spec import LoadStep, QuantisedPlace
from node.storage.files import (
    ScratchFile,
    begin_writing_back,
    explained,
    is_regular,
    open_regular,
    read_exactly,
    size_text,
    sweep_scratch,
    sync_directory,
    write_all,
)

MAGIC = b"AIGENQ1\n"

HEADER = Struct(f"<{len(MAGIC)}s32s32sQ")
"""The magic, the digest of layout and origin, the SHA-256 and the number of the bytes that follow."""

HEADER_BYTES = 4096
"""The parts begin on a page."""

STEP_WEIGHTS = 1 << 18
"""Weights that are worked on between two turns: some milliseconds, and they stay in the CPU's cache."""

CHECK_BYTES = 8 << 20
"""Bytes that are hashed between two turns."""

Turns = Generator[LoadStep, None, None]

_log = logging.getLogger("aigen.engine")


@dataclass(frozen=True)
class QuantisedFile:
    """Where it is, what is in it, and how: `packing` of its int4 matrices, None in an int8 model."""

    place: QuantisedPlace
    layout: Layout
    packing: Packing | None

    @property
    def path(self) -> Path:
        """One for each model and precision."""
        return Path(f"{self.place.stem}.{self.layout.precision}")

    @property
    def size_bytes(self) -> int:
        """With the header."""
        return HEADER_BYTES + self.layout.size_bytes

    @property
    def _digest(self) -> bytes:
        return self.layout.digest(Path(self.place.stem).name, self.packing.name if self.packing else "")

    def ensure(self, source: ShardMapping, entries: Mapping[str, TensorEntry]) -> Turns:
        """Have it, sound: look at what is there, else make it. NoSpace when the disk or its budget is too small."""
        if not (yield from self._is_sound()):
            yield from self._make(source, entries)

    def map(self) -> ShardMapping:
        """The file as one range; `offset_of` says where a part's bytes are. Only after `ensure`."""
        return ShardMapping([self.path], self.size_bytes, self.size_bytes)

    def plain(self, mapping: ShardMapping, part: Part) -> torch.Tensor:
        """A part that is not quantised."""
        return mapping.tensor(PRECISIONS[part.dtype], part.shape, self.offset_of(part.offset))

    def offset_of(self, offset: int) -> int:
        """In the file."""
        return HEADER_BYTES + offset

    # Looking

    def _is_sound(self) -> Generator[LoadStep, None, bool]:
        if not is_regular(self.path):
            return False
        with explained("reading", self.path):
            descriptor = open_regular(self.path)
        try:
            trouble = yield from self._trouble(descriptor)
        finally:
            os.close(descriptor)
        if trouble:
            _log.warning("%s is made anew: %s", self.path, trouble)
        return not trouble

    def _trouble(self, descriptor: int) -> Generator[LoadStep, None, str]:
        size = os.fstat(descriptor).st_size
        if size != self.size_bytes:
            return f"it has {size} bytes instead of {self.size_bytes}"
        buffer = memoryview(bytearray(CHECK_BYTES))
        with explained("reading", self.path):
            read_exactly(descriptor, buffer[: HEADER.size], 0)
            magic, digest, checksum, count = HEADER.unpack(buffer[: HEADER.size])
            if (magic, digest, count) != (MAGIC, self._digest, self.layout.size_bytes):
                return "its header is of another form, model or kind of CPU"
            hasher = sha256()
            for done in range(0, count, CHECK_BYTES):
                part = buffer[: min(CHECK_BYTES, count - done)]
                read_exactly(descriptor, part, HEADER_BYTES + done)
                hasher.update(part)
                yield LoadStep("checking", self.layout.precision, done + len(part), count)
        return "" if hasher.digest() == checksum else "its checksum is wrong"

    # Making

    def _make(self, source: ShardMapping, entries: Mapping[str, TensorEntry]) -> Turns:
        directory = self.path.parent
        with explained("writing", self.path):
            directory.mkdir(exist_ok=True)
            sweep_scratch(directory)
            # One precision of a model at a time: what is of no use any more makes room for the new one.
            old = list(directory.glob(f"{self.path.stem}.*"))
            room_bytes = self.place.room_bytes + sum(path.lstat().st_size for path in old)
            if self.size_bytes > room_bytes:
                raise NoSpace(
                    f"the {self.layout.precision} weights need {size_text(self.size_bytes)} in {directory}, free for "
                    f"them are {size_text(room_bytes)}; free some disk space, or raise storage.disk_budget"
                )
            for path in old:
                path.unlink(missing_ok=True)
            with contextlib.closing(ScratchFile(directory)) as file:
                yield from self._write(file, source, entries)
                os.fsync(file.descriptor)
                os.replace(file.path, self.path)
                sync_directory(directory)

    def _write(self, file: ScratchFile, source: ShardMapping, entries: Mapping[str, TensorEntry]) -> Turns:
        hasher = sha256()
        total_bytes = sum(entries[name].size for part in self.layout.parts for name in part.names)
        end = done_bytes = 0

        def put(offset: int, tensor: torch.Tensor) -> None:
            """In the order of the bytes; what lies between two parts is zero."""
            nonlocal end
            content = memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
            hasher.update(bytes(offset - end))
            hasher.update(content)
            write_all(file.descriptor, content, HEADER_BYTES + offset)
            end = offset + len(content)

        for part in self.layout.parts:
            start, written = part.offset, end
            scales = None if part.kind == "plain" else torch.empty(part.scales_shape, dtype=torch.bfloat16)
            row = 0
            for rows, read_bytes in _portions(part, source, entries):
                numbers = self._quantised(part, rows, scales, row)
                put(start, numbers)
                start += numbers.nbytes
                row += len(rows)
                done_bytes += read_bytes
                yield LoadStep("quantising", self.layout.precision, done_bytes, total_bytes)
            if scales is not None:
                put(part.scales_offset, scales)
            begin_writing_back(file.descriptor, HEADER_BYTES + end, end - written)
        assert end == self.layout.size_bytes
        header = HEADER.pack(MAGIC, self._digest, hasher.digest(), self.layout.size_bytes)
        write_all(file.descriptor, header.ljust(HEADER_BYTES, b"\0"), 0)

    def _quantised(self, part: Part, rows: torch.Tensor, scales: torch.Tensor | None, row: int) -> torch.Tensor:
        """The numbers of some rows; their scales go to their place."""
        if scales is None:
            return rows.to(PRECISIONS[part.dtype])
        if part.kind == "int8":
            numbers, scales[row : row + len(rows)] = to_int8(rows)
            return numbers
        numbers, scales[:, row : row + len(rows)] = to_int4(rows)
        assert self.packing is not None
        return self.packing.pack(numbers)


def _portions(
    part: Part, source: ShardMapping, entries: Mapping[str, TensorEntry]
) -> Iterator[tuple[torch.Tensor, int]]:
    """The part's weights, some rows at a time, with the bytes they had; their pages are given back after use."""
    for entry in (entries[name] for name in part.names):
        row_bytes = entry.size // entry.shape[0]
        # Whole blocks of what is packed.
        rows_max = max(1, STEP_WEIGHTS // prod(entry.shape[1:]) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        for first in range(0, entry.shape[0], rows_max):
            count = min(rows_max, entry.shape[0] - first)
            offset, size = entry.offset + first * row_bytes, count * row_bytes
            # A copy, for the bytes need not be aligned in the stream.
            content = torch.frombuffer(bytearray(source.read(offset, size)), dtype=PRECISIONS[entry.dtype])
            yield content.view(count, *entry.shape[1:]), size
            source.forget(offset, size)
