"""What every architecture's decoder shares: feeding tokens of several conversations, and attention.

transformers' own forward spends most of a step around the matrix products: it builds masks, concatenates the whole
key/value memory for each token, and its bf16 attention and norms run many small operations. The decoders here walk the
same modules with fewer: the residual stream, norms, rotary embedding and attention are fp32 (which torch runs faster on
a CPU than bf16, and which rounds less), only the products with the weights are in fewer bits, and the key/value memory
is written in place. Knows no sampling and no text.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from node.inference.matrices import Matrices
from node.inference.memory import KeyValues, Shape

ROWS_MAX = 512
"""Tokens of prompts that go through a layer together; longer ones take several rounds."""


@dataclass(frozen=True)
class Part:
    """The next tokens of one conversation."""

    tokens: Sequence[int]
    memory: KeyValues


class View:
    """What each layer writes to a conversation's memory for its next tokens, and what they look at, their own too."""

    def __init__(self, memory: KeyValues, count: int, window: int) -> None:
        begin, end = memory.length, memory.length + count
        start = max(0, end - window) if window and count == 1 else 0
        self.begin = begin
        self.count = count
        # All layers at once: an operation for each layer and conversation would take as long as attention does.
        self.new_keys = memory.keys[:, :, begin:end].unbind()
        self.new_values = memory.values[:, :, begin:end].unbind()
        self.keys = memory.keys[:, None, :, start:end].unbind()
        self.values = memory.values[:, None, :, start:end].unbind()


class Decoder(ABC):
    """A model that is fed tokens and says the logits of the next one. One thread uses it."""

    def __init__(self, shape: Shape, matrices: Matrices) -> None:
        self.shape = shape
        self.matrices = matrices
        self._scale = 1.0 / math.sqrt(shape.head_size)
        # Heads that share a key are worked on together and its bytes read once, unless that leaves a thread idle.
        together = shape.key_value_heads % torch.get_num_threads() == 0
        self._query_heads = (shape.key_value_heads, -1) if together else (shape.heads, 1)

    def feed(self, parts: Sequence[Part]) -> Generator[None, None, torch.Tensor]:
        """Feed several conversations together. Yields after each layer so that others get their turn; returns a row of
        logits for each: those after its last token."""
        hidden = yield from self._rows(parts)
        ends = torch.tensor([len(part.tokens) for part in parts]).cumsum(0) - 1
        for part in parts:
            part.memory.length += len(part.tokens)
        return self._logits_rows(hidden[ends])

    def step(self, parts: Sequence[Part]) -> torch.Tensor:
        """Feed one token to each of several conversations, all layers at once; a row of logits for each."""
        if len(parts) > self.matrices.steps_each_max:
            return finished(self.feed(parts))
        logits = []
        with self.matrices.one_row():
            for part in parts:
                logits.append(self._logits_row(self._row(part.tokens[0], part.memory)))
                part.memory.length += 1
        return torch.stack(logits)

    def rest(self) -> None:
        """Give back the memory that only work takes."""
        self.matrices.wide.release()

    @abstractmethod
    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        """One token through all layers, in as few operations as can be; the hidden vector, not yet normed."""

    @abstractmethod
    def _rows(self, parts: Sequence[Part]) -> Generator[None, None, torch.Tensor]:
        """All tokens through all layers, yielding after each; the hidden vector of each, not yet normed."""

    @abstractmethod
    def _logits_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the last hidden vector to one number for each token of the vocabulary, in fp32."""

    @abstractmethod
    def _logits_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same for many."""

    def _view(self, part: Part) -> View:
        return View(part.memory, len(part.tokens), self.shape.window)

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, views: Sequence[View]
    ) -> torch.Tensor:
        """Put keys and values (rows, heads, head_size) in place, and attend to all of each conversation; a row each."""
        counts = [view.count for view in views]
        attended = []
        for view, *mine in zip(views, *(torch.split(one, counts) for one in (query, keys, values)), strict=True):
            view.new_keys[layer].copy_(mine[1].transpose(0, 1))
            view.new_values[layer].copy_(mine[2].transpose(0, 1))
            attend = self._attend_row if view.count == 1 else self._attend_rows
            attended.append(attend(mine[0], layer, view).view(view.count, -1))
        return torch.cat(attended)

    def _attend_row(self, query: torch.Tensor, layer: int, view: View) -> torch.Tensor:
        """Attention of one token's heads, whose key and value are in place; a flat vector."""
        query = query.view(1, *self._query_heads, self.shape.head_size)
        return functional.scaled_dot_product_attention(
            query, view.keys[layer], view.values[layer], scale=self._scale, enable_gqa=True
        ).view(-1)

    def _attend_rows(self, query: torch.Tensor, layer: int, view: View) -> torch.Tensor:
        """The same of many tokens (rows, heads, head_size)."""
        plain = view.begin == 0 and not 0 < self.shape.window < view.count
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            view.keys[layer],
            view.values[layer],
            attn_mask=None if plain else self._mask(view.begin, view.count),
            is_causal=plain,
            scale=self._scale,
            enable_gqa=True,
        )
        return result.transpose(1, 2).reshape(view.count, -1)

    def _mask(self, before: int, rows: int) -> torch.Tensor:
        """Which tokens each row may look at: those before it and itself, no further back than the window."""
        row = torch.arange(before, before + rows)[:, None]
        column = torch.arange(before + rows)[None, :]
        mask = column <= row
        if self.shape.window:
            mask &= row - column < self.shape.window
        return mask


def positions_of(parts: Sequence[Part]) -> torch.Tensor:
    """The place of each token in its conversation."""
    return torch.cat([torch.arange(len(part.tokens)) + part.memory.length for part in parts])


def tokens_of(parts: Sequence[Part]) -> torch.Tensor:
    """All tokens, one after the other."""
    return torch.tensor([token for part in parts for token in part.tokens])


def finished(turns: Generator[None, None, torch.Tensor]) -> torch.Tensor:
    """What it returns, without a turn for anybody else."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits
