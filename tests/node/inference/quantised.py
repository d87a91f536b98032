"""Quantised models in tests: a place for their files, and the whole way in one call."""

from pathlib import Path

import msgspec
import torch

from node.inference.layout import GROUP, MIXED
from node.inference.loading import MappedModel, prepared
from node.inference.precision import Precision
from node.inference.quantising import MIDDLE, mixed, to_int4, to_int8
from node.inference.spec import LoadStep, ModelSpec, QuantisedPlace

ROOM_BYTES = 1 << 40
MANIFEST = "ab" * 32
SIZES = {
    "llama": {"intermediate_size": 192},
    "mistral": {"intermediate_size": 192},
    "codegen": {},
}
"""Of tiny models: rows that int4 takes."""


def placed(spec: ModelSpec, directory: Path, room_bytes: int = ROOM_BYTES) -> ModelSpec:
    """With a place for its quantised weights."""
    return msgspec.structs.replace(spec, quantised=QuantisedPlace(str(directory / MANIFEST), room_bytes))


def prepare(spec: ModelSpec, precision: Precision) -> list[LoadStep]:
    """Everything before the mapping; the steps it took."""
    return list(prepared(spec, precision))


def load(spec: ModelSpec, precision: Precision) -> MappedModel:
    """The whole way."""
    prepare(spec, precision)
    return MappedModel(spec, precision)


def rounded(weights: torch.Tensor, kind: str) -> torch.Tensor:
    """What quantised weights stand for, by the formula."""
    if kind == "int8":
        numbers, scales = to_int8(weights)
        return mixed(numbers.float() * scales.float()[:, None])
    numbers, both = to_int4(weights)
    scales, middles = both.float().transpose(0, 1).repeat_interleave(GROUP, 1).unbind(-1)
    return (numbers.float() - MIDDLE) * scales + middles


def multiplied_with(matrix: torch.Tensor, kind: str, fast: bool, integers: bool) -> torch.Tensor:
    """What a matrix is rounded to before it is multiplied: in bf16, in int8, or not where bf16 is not fast."""
    if kind == "int4":
        return matrix.to(torch.bfloat16).float() if fast else matrix
    rows = mixed(matrix)
    if integers:
        scales = rows.abs().amax(1, keepdim=True) / 127
        rows = (rows / scales).round() * scales
    elif fast:
        rows = rows.to(torch.bfloat16).float()
    return mixed(rows) / MIXED
