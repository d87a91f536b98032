"""What every architecture's decoder shares: attention, products with one row and with many.

transformers' own forward spends most of a step around the matrix products: it builds masks, concatenates the whole
key/value memory for each token, and its bf16 attention and norms run many small operations. The decoders here walk the
same modules with fewer: the residual stream, norms, rotary embedding and attention are fp32 (which torch runs faster on
a CPU than bf16, and which rounds less), only the products with the weights are in the precision the weights have, and
the key/value memory is written in place. Knows no sampling and no text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

import torch
from torch.nn import functional

from node.inference.memory import KeyValues, Shape

STEP_ROWS_MAX = 6
"""Up to this many prompt tokens, single steps are faster than widening every weight to fp32 once."""

ROWS_EACH_MAX = 4
"""Up to this many rows, a product with each is faster than widening the weight for all."""

PREFILL_ROWS_MAX = 512
"""Prompt tokens that go through a layer together; longer prompts take several rounds."""


class Product(ABC):
    """One weight matrix (with its bias, if any): `row` for a step, `rows` for a prompt. All go in and out in fp32."""

    def __init__(self, columns: int, precision: torch.dtype, bias: torch.Tensor | None) -> None:
        self._bias = None if bias is None else bias.float()
        self._narrow = torch.empty(columns, dtype=precision)

    def row(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector, in the precision the products are in."""
        self._narrow.copy_(vector)
        return self.row_of_narrow(self._narrow)

    def row_of_narrow(self, vector: torch.Tensor) -> torch.Tensor:
        """The same for a vector that already has that precision."""
        result = self._multiplied(vector)
        return result if self._bias is None else self._bias + result

    def few(self, matrix: torch.Tensor) -> torch.Tensor:
        """The product with one row of each answer under way, in fp32."""
        if self._narrow.dtype == torch.float32 or len(matrix) > ROWS_EACH_MAX:
            return self.rows(matrix)
        return torch.stack([self.row(vector) for vector in matrix]).float()

    @abstractmethod
    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """The product with many rows, in fp32: products of many rows in fewer bits are slow on most CPUs."""

    @abstractmethod
    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        """Without the bias."""


class StoredProduct(Product):
    """Of weights as they are stored."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, wide: "Wide") -> None:
        super().__init__(weight.shape[1], weight.dtype, bias)
        self._weight = weight
        self._wide = wide
        if weight.dtype != torch.float32:
            wide.fit(weight.numel())

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Widened to fp32, a layer at a time."""
        weight = self._weight if self._weight.dtype == torch.float32 else self._wide.of(self._weight)
        return functional.linear(matrix, weight, self._bias)

    def _multiplied(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.mv(self._weight, vector)


class Fan:
    """Several products with one input, by as few matrices as hold them."""

    def __init__(self, products: Sequence[Product], places: Sequence[tuple[int, int, int]]) -> None:
        """`places`: for each result, which product has it, from which row to which."""
        self._products = tuple(products)
        self._places = tuple(places)

    def row_of_narrow(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """As `Product` has it, for each."""
        results = [product.row_of_narrow(vector) for product in self._products]
        return [results[product][begin:end] for product, begin, end in self._places]

    def few(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """As `Product` has it, for each."""
        results = [product.few(matrix) for product in self._products]
        return [results[product][:, begin:end] for product, begin, end in self._places]

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


class Wide:
    """One fp32 buffer for all weights, one after the other: a layer at a time, not the model."""

    def __init__(self) -> None:
        self._size = 0
        self._buffer: torch.Tensor | None = None

    def fit(self, count: int) -> None:
        """Make sure that it will hold so many weights. Memory that is never touched is none."""
        self._size = max(self._size, count)

    def room(self, *shape: int) -> torch.Tensor:
        """A matrix to fill, good until the next call."""
        if self._buffer is None:
            self._buffer = torch.empty(self._size, dtype=torch.float32)
        return self._buffer[: math.prod(shape)].view(shape)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in fp32, until the next call."""
        return self.room(*weight.shape).copy_(weight)

    def release(self) -> None:
        """Give the buffer back until the next prompt."""
        self._buffer = None


class Decoder(ABC):
    """A model that is fed tokens and says the logits of the next one. One thread uses it."""

    def __init__(self, shape: Shape, precision: torch.dtype) -> None:
        self.shape = shape
        self._precision = precision
        self._wide = Wide()
        self._scale = 1.0 / math.sqrt(shape.head_size)

    def prefill(self, tokens: Sequence[int], memory: KeyValues) -> Generator[None, None, torch.Tensor]:
        """Feed a prompt; yields now and then so that others get their turn; returns the logits after the last token."""
        assert tokens
        # After what an earlier conversation left, too: the answer must be the same as without it, and steps round more.
        if self._precision == torch.float32 or len(tokens) > STEP_ROWS_MAX or memory.length:
            hidden = None
            for start in range(0, len(tokens), PREFILL_ROWS_MAX):
                hidden = yield from self._rows(tokens[start : start + PREFILL_ROWS_MAX], memory)
            self._wide.release()
            assert hidden is not None
            return self._logits(hidden[-1])
        for token in tokens[:-1]:
            self._row(token, memory)
            yield
        return self.step(tokens[-1], memory)

    def step(self, token: int, memory: KeyValues) -> torch.Tensor:
        """Feed one token; the logits after it."""
        return self._logits(self._row(token, memory))

    def steps(self, tokens: Sequence[int], memories: Sequence[KeyValues]) -> torch.Tensor:
        """Feed one token to each of several conversations; a row of logits for each."""
        if len(tokens) == 1:
            return self.step(tokens[0], memories[0])[None]
        return self._logits_each(self._each(tokens, memories))

    @abstractmethod
    def _each(self, tokens: Sequence[int], memories: Sequence[KeyValues]) -> torch.Tensor:
        """One token of each conversation through all layers together; a row of hidden numbers for each."""

    @abstractmethod
    def _logits_each(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same as `_logits` for a row of each conversation."""

    @abstractmethod
    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        """One token through all layers; the hidden vector, not yet normed."""

    @abstractmethod
    def _rows(self, tokens: Sequence[int], memory: KeyValues) -> Generator[None, None, torch.Tensor]:
        """Many tokens, yielding after each layer; the hidden vector of each, not yet normed."""

    @abstractmethod
    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the last hidden vector to one number for each token of the vocabulary."""

    def _attend_row(self, query: torch.Tensor, layer: int, memory: KeyValues) -> torch.Tensor:
        """Attention of one token (1, heads, 1, head_size), whose key and value are in place; a flat vector."""
        end = memory.length + 1
        start = max(0, end - self.shape.window) if self.shape.window else 0
        keys = memory.keys[layer][:, :, start:end]
        values = memory.values[layer][:, :, start:end]
        return functional.scaled_dot_product_attention(query, keys, values, scale=self._scale, enable_gqa=True).view(-1)

    def _attend_each(self, query: torch.Tensor, layer: int, memories: Sequence[KeyValues]) -> torch.Tensor:
        """Attention of one token of each conversation (conversations, heads, head_size); a row for each."""
        heads = zip(query, memories, strict=True)
        return torch.stack([self._attend_row(one[None, :, None], layer, memory) for one, memory in heads])

    def _attend_rows(self, query: torch.Tensor, layer: int, memory: KeyValues) -> torch.Tensor:
        """Attention of many tokens (1, heads, rows, head_size); a matrix of one row each."""
        rows = query.shape[2]
        end = memory.length + rows
        keys = memory.keys[layer][:, :, :end]
        values = memory.values[layer][:, :, :end]
        plain = memory.length == 0 and not 0 < self.shape.window < end
        mask = None if plain else self._mask(memory.length, rows)
        result = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=plain, scale=self._scale, enable_gqa=True
        )
        return result.transpose(1, 2).reshape(rows, -1)

    def _mask(self, before: int, rows: int) -> torch.Tensor:
        """Which tokens each row may look at: those before it and itself, no further back than the window."""
        row = torch.arange(before, before + rows)[:, None]
        column = torch.arange(before + rows)[None, :]
        mask = column <= row
        if self.shape.window:
            mask &= row - column < self.shape.window
        return mask
