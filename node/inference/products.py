"""Products with a model's weight matrices, and what it takes to make them fast on this CPU.

A step has one row of numbers for each answer, a prompt one for each token. One row is multiplied as fast as memory
gives the weights. Many rows of bf16 are fast on CPUs that have instructions for it; on others it is faster to widen the
weights to fp32 first. Knows no architecture and no files.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@functools.cache
def multiplies_int8() -> bool:
    """Whether this CPU has instructions for products of int8, and torch takes them: on others oneDNN saturates sums of
    two products, without a word. It may have been told to take this CPU for another one."""
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return False
    most = torch.full((16, 64), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(most[:rows], most.t()) == 64 * 127 * 127).all()) for rows in (1, len(most)))


@contextmanager
def without_onednn() -> Iterator[None]:
    """For products with one row of bf16: torch's own kernel reads 25 to 33 GB/s where oneDNN's, which it takes by
    itself, reads 10 to 11."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class Wide:
    """Weights widened for products of many rows, in one buffer for all: a layer at a time, not the model."""

    def __init__(self, precision: torch.dtype) -> None:
        """`precision` is the one that products of one row are in, at the most."""
        is_fast = precision == torch.bfloat16 and multiplies_bf16()
        self.precision = torch.bfloat16 if is_fast else torch.float32
        self._size = 0
        self._buffer: torch.Tensor | None = None

    def fit(self, count: int) -> None:
        """Make sure that it will hold so many weights. Memory that is never touched is none."""
        self._size = max(self._size, count)

    def room(self, *shape: int) -> torch.Tensor:
        """A matrix to fill, good until the next call."""
        if self._buffer is None:
            self._buffer = torch.empty(self._size, dtype=self.precision)
        return self._buffer[: math.prod(shape)].view(shape)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight widened, until the next call."""
        return self.room(*weight.shape).copy_(weight)

    def release(self) -> None:
        """Give the buffer back until it is needed again."""
        self._buffer = None


class Product(ABC):
    """One weight matrix (with its bias, if any): `row` for one row, `rows` for many, in any precision. One row comes
    out in any, many in fp32."""

    def __init__(self, bias: torch.Tensor | None) -> None:
        self._bias = None if bias is None else bias.float()

    def row(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector."""
        result = self._multiplied(vector)
        return result if self._bias is None else self._bias + result

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """The product with each row."""
        result = self._multiplied_rows(matrix)
        return result if self._bias is None else result.add_(self._bias)

    @abstractmethod
    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        """Without the bias."""

    @abstractmethod
    def _multiplied_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Without the bias; the result is the caller's to change."""


class StoredProduct(Product):
    """Of weights as they are stored."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wide: Wide) -> None:
        super().__init__(bias)
        self._weight = weight
        self._narrow = torch.empty(weight.shape[1], dtype=weight.dtype)
        self._wide = wide
        self._is_wide = weight.dtype in (wide.precision, torch.float32)
        if not self._is_wide:
            wide.fit(weight.numel())

    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.mv(self._weight, vector if vector.dtype == self._weight.dtype else self._narrow.copy_(vector))

    def _multiplied_rows(self, matrix: torch.Tensor) -> torch.Tensor:
        weight = self._weight if self._is_wide else self._widened()
        return functional.linear(matrix.to(weight.dtype), weight).float()

    def _widened(self) -> torch.Tensor:
        # fp16 beside quantised matrices would lose bits in a buffer of bf16; it is there for odd shapes only.
        return self._wide.of(self._weight) if self._wide.precision == torch.float32 else self._weight.float()


class Fan:
    """Several products with one input, by as few matrices as hold them."""

    def __init__(self, products: Sequence[Product], places: Sequence[tuple[int, int, int]]) -> None:
        """`places`: for each result, which product has it, from which row to which."""
        self._products = tuple(products)
        self._places = tuple(places)

    def row(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """As `Product` has it, for each."""
        results = [product.row(vector) for product in self._products]
        return [results[product][begin:end] for product, begin, end in self._places]

    def rows(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """As `Product` has it, for each."""
        results = [product.rows(matrix) for product in self._products]
        return [results[product][:, begin:end] for product, begin, end in self._places]


class Embedding(ABC):
    """A row for each token, in fp32 and in memory of its own: sums go into it, and the weights are read-only."""

    @abstractmethod
    def row(self, token: int) -> torch.Tensor:
        """Of one token."""

    @abstractmethod
    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of many, as a matrix."""


class StoredEmbedding(Embedding):
    """Of weights as they are stored."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def row(self, token: int) -> torch.Tensor:
        """A copy also where it is fp32 already."""
        return self._weight[token].to(torch.float32, copy=True)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Indexing with a tensor copies."""
        return self._weight[tokens].float()
