"""A model's weight matrices by the names of their modules, as products: of weights as stored, or quantised.

What a decoder is built from, so that it need not know which of the two it has. Knows no architecture.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch.nn import functional

from node.inference.layout import GROUP, MIXED, WEIGHT, Part
from node.inference.mapping import ShardMapping
from node.inference.products import (
    Embedding,
    Fan,
    Product,
    StoredEmbedding,
    StoredProduct,
    Wide,
    multiplies_int8,
    without_onednn,
)
from node.inference.quantised import QuantisedFile
from node.inference.quantising import INT8_MAX, MIDDLE, Packing, mixed

KERNEL_ROWS_MAX = 12
"""Up to this many rows, torch's kernels are faster than what packs or widens every weight first."""

INTEGER_WEIGHTS_MIN = 1 << 22
"""With one row, a matrix of so many weights is multiplied faster in int8 alone than by torch's kernel."""

MIXING = mixed(torch.eye(MIXED))

SCALE_MIN = torch.finfo(torch.float32).tiny * INT8_MAX
"""Of the largest of a row that is all but zero: so that the number it is divided by has an inverse."""


class Matrices(Protocol):
    """Products and embeddings by the names of modules."""

    @property
    def steps_each_max(self) -> int:
        """Up to this many conversations, a step of each is faster than one of all."""

    @property
    def wide(self) -> Wide:
        """Where they are widened."""

    def one_row(self) -> AbstractContextManager[None]:
        """To be in for products of one row."""

    def product(self, module: str) -> Product:
        """Of one module, with its bias."""

    def fan(self, modules: Sequence[str]) -> Fan:
        """Of several that have the same input."""

    def embedding(self, module: str) -> Embedding:
        """Of the vocabulary."""


class StoredMatrices:
    """Those of transformers' modules, whose weights are views of the shards."""

    steps_each_max = 3

    def __init__(self, model: Any, mapping: ShardMapping, precision: torch.dtype) -> None:
        self.wide = Wide(precision)
        self._model = model
        self._mapping = mapping

    def one_row(self) -> AbstractContextManager[None]:
        """Faster so."""
        return without_onednn()

    def product(self, module: str) -> Product:
        """Over the shards."""
        found = self._model.get_submodule(module)
        return StoredProduct(found.weight, found.bias, self.wide)

    def embedding(self, module: str) -> Embedding:
        """Over the shards."""
        return StoredEmbedding(self._model.get_submodule(module).weight)

    def fan(self, modules: Sequence[str]) -> Fan:
        """Matrices that lie back to back in the file are one product; files have them in the order of their names."""
        found = {name: self._model.get_submodule(name) for name in sorted(modules)}
        biased = any(module.bias is not None for module in found.values())
        runs: list[tuple[list[str], torch.Tensor]] = []
        for name, module in found.items():
            joined = self._mapping.join(runs[-1][1], module.weight) if runs and not biased else None
            if joined is None:
                runs.append(([name], module.weight))
            else:
                runs[-1] = ([*runs[-1][0], name], joined)
        places: dict[str, tuple[int, int, int]] = {}
        for index, (names, _) in enumerate(runs):
            edges = accumulate((found[name].weight.shape[0] for name in names), initial=0)
            places.update({name: (index, *edge) for name, edge in zip(names, pairwise(edges), strict=True)})
        products = [StoredProduct(weight, found[names[0]].bias, self.wide) for names, weight in runs]
        return Fan(products, [places[module] for module in modules])


class QuantisedMatrices:
    """Those of a file of quantised weights; `tied` modules have the weights of others, `model` has the biases."""

    steps_each_max = 1

    def __init__(self, model: Any, file: QuantisedFile, mapping: ShardMapping, tied: Mapping[str, str]) -> None:
        self.wide = Wide(torch.bfloat16)
        self._model = model
        self._file = file
        self._mapping = mapping
        self._tied = tied
        self._parts = {name: part for part in file.layout.parts for name in part.names}

    def one_row(self) -> AbstractContextManager[None]:
        """With oneDNN: products in int8 are its own."""
        return nullcontext()

    def product(self, module: str) -> Product:
        """Of a matrix that stands alone."""
        part = self._part(module)
        assert len(part.names) == 1, part.names
        return self._product(part, self._model.get_submodule(module).bias)

    def fan(self, modules: Sequence[str]) -> Fan:
        """One product where the layout has put them together."""
        parts = [self._part(module) for module in modules]
        if len(parts[0].names) == 1:
            rows = [part.shape[0] for part in parts]
            products = [self.product(module) for module in modules]
            return Fan(products, [(index, 0, count) for index, count in enumerate(rows)])
        assert parts[0].names == tuple(f"{module}{WEIGHT}" for module in modules)
        found = [self._model.get_submodule(module) for module in modules]
        # A module without a bias beside one with it does not occur: one setting says so for all of them.
        bias = None if found[0].bias is None else torch.cat([module.bias for module in found])
        edges = accumulate((module.weight.shape[0] for module in found), initial=0)
        return Fan([self._product(parts[0], bias)], [(0, *edge) for edge in pairwise(edges)])

    def embedding(self, module: str) -> Embedding:
        """Int8, or as stored where torch has no kernel for its shape."""
        part = self._part(module)
        values, scales = self._tensors(part)
        return StoredEmbedding(values) if scales is None else Int8Embedding(values, scales)

    def _part(self, module: str) -> Part:
        name = f"{module}{WEIGHT}"
        return self._parts[self._tied.get(name, name)]

    def _product(self, part: Part, bias: torch.Tensor | None) -> Product:
        values, scales = self._tensors(part)
        if scales is None:
            return StoredProduct(values, bias, self.wide)
        if part.kind == "int8":
            return Int8Product(values, scales, bias, self.wide)
        assert self._file.packing is not None
        return Int4Product(values, scales, self._file.packing, bias, self.wide)

    def _tensors(self, part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The numbers and, of quantised ones, the scales."""
        if part.kind == "plain":
            return self._file.plain(self._mapping, part), None
        rows, columns = part.shape
        whole = part.kind == "int8"
        dtype, width = (torch.int8, columns) if whole else (torch.uint8, columns // 2)
        values = self._mapping.tensor(dtype, (rows, width), self._file.offset_of(part.offset))
        scales = self._mapping.tensor(torch.bfloat16, part.scales_shape, self._file.offset_of(part.scales_offset))
        return values, scales


class Int8Product(Product):
    """Rows of int8 with a scale each, mixed, as what they are multiplied with is first.

    Where that is faster, what they are multiplied with goes in in int8 as well, with a scale for each row; torch's
    kernel and widened weights take it in bf16.
    """

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, wide: Wide) -> None:
        super().__init__(bias)
        self._values = values
        self._transposed = values.t()
        self._scales = scales
        self._wide_scales = scales.float()
        self._numbers = torch.empty((1, values.shape[1]), dtype=torch.int8)
        self._wide = wide
        wide.fit(values.numel())

    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        row = _mixed(vector[None])
        if self._values.numel() < INTEGER_WEIGHTS_MIN or not multiplies_int8():
            return self._kernel(row)[0]
        least, most = torch.aminmax(row)
        largest = max(-least.item(), most.item(), SCALE_MIN)
        self._numbers.copy_(row.mul_(INT8_MAX / largest).round_())
        sums = torch._int_mm(self._numbers, self._transposed)[0]
        return sums.float().mul_(self._wide_scales).mul_(largest / INT8_MAX)

    def _multiplied_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """The scales go on the results, which are fewer than the weights."""
        rows = _mixed(matrix)
        if len(rows) <= KERNEL_ROWS_MAX:
            return self._kernel(rows).float()
        if multiplies_int8():
            scales = rows.abs().amax(1, keepdim=True).mul_(1 / INT8_MAX)
            numbers = rows.div_(scales).round_().to(torch.int8)
            return torch._int_mm(numbers, self._transposed).float().mul_(self._wide_scales).mul_(scales)
        product = functional.linear(rows.to(self._wide.precision), self._wide.of(self._values))
        return product.float().mul_(self._wide_scales)

    def _kernel(self, rows: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(rows.to(torch.bfloat16), self._values, self._scales)


def _mixed(rows: torch.Tensor) -> torch.Tensor:
    """As `mixed`, a new matrix: by products, which are faster but not the same bits on every machine."""
    numbers = rows.float().view(len(rows), MIXED, rows.shape[1] // MIXED)
    return torch.bmm(MIXING.expand(len(rows), MIXED, MIXED), numbers).view(rows.shape)


class Int4Product(Product):
    """Groups of int4 with a scale and a middle each, two numbers in a byte as torch's kernel wants them here."""

    def __init__(
        self,
        values: torch.Tensor,
        scales: torch.Tensor,
        packing: Packing,
        bias: torch.Tensor | None,
        wide: Wide,
    ) -> None:
        super().__init__(bias)
        rows, columns = values.shape[0], values.shape[1] * 2
        self._shape = (columns, rows)
        self._values = values
        self._scales = scales
        self._packing = packing
        self._wide = wide
        wide.fit(rows * columns)

    def _multiplied_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Widened with a column for each row: the scales of a group then lie beside one another."""
        if len(matrix) <= KERNEL_ROWS_MAX:
            return self._kernel(matrix).float()
        return (matrix.to(self._wide.precision) @ self._widened()).float()

    def _widened(self) -> torch.Tensor:
        columns, rows = self._shape
        wide = self._wide.room(columns, rows)
        self._packing.unpack(self._values, wide)
        scales, middles = self._scales.float().view(columns // GROUP, 1, rows, 2).unbind(-1)
        wide.view(columns // GROUP, GROUP, rows).sub_(MIDDLE).mul_(scales).add_(middles)
        return wide

    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        return self._kernel(vector[None])[0]

    def _kernel(self, matrix: torch.Tensor) -> torch.Tensor:
        narrow = matrix.to(torch.bfloat16)
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, self._values, GROUP, self._scales)
        return result


class Int8Embedding(Embedding):
    """Rows of int8 with a scale each, mixed."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor) -> None:
        self._values = values
        self._scales = scales

    def row(self, token: int) -> torch.Tensor:
        """Of one token."""
        return self.rows(torch.tensor([token]))[0]

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of many, as a matrix."""
        return _mixed(self._values[tokens].float().mul_(self._scales[tokens].float()[:, None]))
