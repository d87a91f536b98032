"""Weights in fewer bits: rows of int8 with a scale each, or groups of int4 with a scale and a middle each.

Pure arithmetic, the same bits on every machine and with any number of threads: element by element, extremes (which do
not depend on their order), and sums in one fixed order. Knows no files and no models.
"""

import functools
from dataclasses import dataclass

import torch

from contracts.errors import BadInput
from node.inference.layout import GROUP, MIXED, ROWS_MULTIPLE

PRECISIONS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The types weights may be stored in."""

CLIPS = (1.0, 0.9, 0.8)
"""Shares of a group's range that are tried. A smaller one cuts the extremes off and is finer for all others."""

MIDDLE = 8
"""The number of int4 that stands for a group's middle, as torch has it."""

INT8_MAX = 127
_INT4_MAX = 15
_PROBE_COLUMNS = GROUP


@dataclass(frozen=True)
class Packing:
    """How torch's int4 kernel wants its bytes on a kind of CPU: blocks of rows, two rows in a byte."""

    name: str
    block: int
    split: bool
    """A row shares bytes with the one half a block further on; otherwise with the next."""

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of numbers from 0 to 15, two in a byte."""
        rows, columns = values.shape
        blocks = values.view(rows // self.block, self.block, columns).transpose(1, 2)
        low, high = self._halves(blocks)
        return (low | (high << 4)).reshape(rows, columns // 2)

    def unpack(self, packed: torch.Tensor, out: torch.Tensor) -> None:
        """The numbers of all rows into a matrix that has a column for each row."""
        columns, rows = out.shape
        low, high = self._halves(out.view(columns, rows // self.block, self.block).transpose(0, 1))
        packed = packed.view(rows // self.block, columns, self.block // 2)
        low.copy_(packed & _INT4_MAX)
        high.copy_(packed >> 4)

    def _halves(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.split:
            return blocks[..., : self.block // 2], blocks[..., self.block // 2 :]
        return blocks[..., 0::2], blocks[..., 1::2]


PACKINGS = (Packing("split64", 64, True), Packing("split32", 32, True), Packing("pair32", 32, False))
"""Those of AVX-512, AVX2, and every other CPU."""


@functools.cache
def machine_packing() -> Packing:
    """What the kernel takes here, found by asking it."""
    values = (torch.arange(ROWS_MULTIPLE * _PROBE_COLUMNS, dtype=torch.int32) * 7 // 5 % (_INT4_MAX + 1)).view(
        ROWS_MULTIPLE, _PROBE_COLUMNS
    )
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    for packing in PACKINGS:
        if torch.equal(packing.pack(values.to(torch.uint8)), packed):
            return packing
    raise BadInput(
        f"torch {torch.__version__} packs int4 for this CPU ({torch.backends.cpu.get_cpu_capability()}) in a way that "
        'is not known here; set inference.quantization = "int8"'
    )


def mixed(rows: torch.Tensor) -> torch.Tensor:
    """Each row, fp32, with every MIXED of its numbers that lie one MIXEDth of it apart multiplied by a Hadamard matrix,
    whose elements are 1 and -1; twice gives MIXED times the row. A large number is in all of them then, and none stands
    out.

    A row of weights and a row it is multiplied with, both mixed, have MIXED times the product they had (so QuaRot
    keeps outliers out of what goes between matrices, arXiv 2404.00456).
    """
    columns = rows.shape[-1]
    numbers, others = rows.clone(), torch.empty_like(rows)
    apart = columns // 2
    while apart >= columns // MIXED:
        (first, second), (total, difference) = (one.view(-1, 2, apart).unbind(1) for one in (numbers, others))
        torch.add(first, second, out=total)
        torch.sub(first, second, out=difference)
        numbers, others = others, numbers
        apart //= 2
    return numbers


def to_int8(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers from -127 to 127 and the scale of each row, whose product, mixed, is the weight."""
    rows = mixed(weights.float() * (1.0 / MIXED))
    scales = (rows.abs().amax(1) * (1.0 / INT8_MAX)).to(torch.bfloat16)
    _require_finite(scales)
    values = (rows * _inverse(scales)[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values.to(torch.int8), scales


def to_int4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers from 0 to 15 in the shape of the weights, and (groups, rows, 2): a weight is
    `(number - 8) * scale + middle`. Several ranges of each group are tried, each also with the line that fits its
    rounded numbers best; the least squared error wins."""
    rows, columns = weights.shape
    # A group in each column: every step below then runs over whole rows of memory.
    groups = weights.float().view(-1, GROUP).t().contiguous()
    low, high = groups.amin(0), groups.amax(0)
    mean = _sum(groups) * (1.0 / GROUP)
    centred = groups - mean
    best = _Line(torch.zeros_like(mean), _as_stored(mean))
    least = torch.full_like(mean, torch.inf)
    for clip in CLIPS:
        tried = _Line.through(low * clip, high * clip)
        for line in (tried, tried.fitted(groups, centred, mean)):
            error = line.error(groups)
            better = error < least
            least = torch.where(better, error, least)
            best = best.where(better, line)
    both = torch.stack((best.scales, best.middles), -1).to(torch.bfloat16)
    _require_finite(both)
    numbers = best.rounded(groups).add_(MIDDLE).to(torch.uint8).t().reshape(rows, columns)
    return numbers, both.view(rows, columns // GROUP, 2).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _Line:
    """For each group, what its numbers from -8 to 7 mean: `number * scale + middle`, both as bf16 has them."""

    scales: torch.Tensor
    middles: torch.Tensor

    @classmethod
    def through(cls, low: torch.Tensor, high: torch.Tensor) -> "_Line":
        """The one whose ends are these."""
        scales = _as_stored((high - low) * (1.0 / _INT4_MAX))
        return cls(scales, _as_stored(low + scales * MIDDLE))

    def fitted(self, groups: torch.Tensor, centred: torch.Tensor, mean: torch.Tensor) -> "_Line":
        """The one of least squares through what this one's numbers stand for."""
        numbers = self.rounded(groups)
        share = _sum(numbers) * (1.0 / GROUP)
        numbers.sub_(share)
        scales = _as_stored(_sum(numbers * centred) / _sum(numbers.square_()))
        return _Line(scales, _as_stored(mean - scales * share))

    def rounded(self, groups: torch.Tensor) -> torch.Tensor:
        """The nearest numbers."""
        return (groups - self.middles).mul_(_inverse(self.scales)).round_().clamp_(-MIDDLE, _INT4_MAX - MIDDLE)

    def error(self, groups: torch.Tensor) -> torch.Tensor:
        """The squared errors of each group, in sum."""
        errors = self.rounded(groups).mul_(self.scales).add_(self.middles).sub_(groups)
        return _sum(errors.square_())

    def where(self, better: torch.Tensor, other: "_Line") -> "_Line":
        """The other one's where it is better."""
        scales = torch.where(better, other.scales, self.scales)
        return _Line(scales, torch.where(better, other.middles, self.middles))


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """The sum of a power of two of rows, always in the same order: rounding is part of the result."""
    while rows.shape[0] > 1:
        half = rows.shape[0] // 2
        rows = rows[:half] + rows[half:]
    return rows[0]


def _as_stored(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.to(torch.bfloat16).float()


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for what is all the same, or so nearly that its scale has no inverse."""
    scales = scales.float()
    return torch.where(scales >= torch.finfo(torch.float32).tiny, 1.0 / scales, torch.zeros_like(scales))


def _require_finite(scales: torch.Tensor) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise BadInput("the weights hold numbers that are not finite: they cannot be quantised; import a sound model")
