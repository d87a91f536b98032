"""The decoder of CodeGen: attention and the two-layer network side by side, over the modules transformers built."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from contracts.errors import BadInput
from node.inference.decoder import Decoder, Part, View, positions_of, tokens_of
from node.inference.memory import KeyValues, Shape
from node.inference.products import Product
from node.inference.weights import BuiltModel

BLOCKS = 4
"""The fused projection lies in this many blocks, each with query, value and key of its share of the heads."""


class Norm:
    """Layer norm with weight and bias."""

    def __init__(self, module: Any) -> None:
        self._weight = module.weight.float()
        self._bias = module.bias.float()
        self._epsilon = float(module.eps)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """One vector or many."""
        return functional.layer_norm(tensor, self._weight.shape, self._weight, self._bias, self._epsilon)


@dataclass(frozen=True)
class _Layer:
    norm: Norm
    projection: Product
    output: Product
    inner: Product
    outer: Product
    activation: Any


class CodeGenDecoder(Decoder):
    """CodeGen."""

    def __init__(self, built: BuiltModel) -> None:
        model: Any = built.model
        config = built.config
        head_size = config.n_embd // config.n_head
        shape = Shape(
            layers=config.n_layer,
            heads=config.n_head,
            key_value_heads=config.n_head,
            head_size=head_size,
            context_length=built.context_length,
        )
        super().__init__(shape, built.matrices)
        if config.n_head % BLOCKS:
            raise BadInput(f"config.json has n_head = {config.n_head}; CodeGen has a multiple of {BLOCKS}")
        self._rotary = config.rotary_dim or head_size
        if self._rotary > head_size or self._rotary % 2:
            raise BadInput(f"config.json has rotary_dim = {self._rotary}; it is even and at most {head_size}")
        positions = model.transformer.h[0].attn.embed_positions
        sine, cosine = positions[:, : positions.shape[1] // 2], positions[:, positions.shape[1] // 2 :]
        self._turns = torch.complex(cosine.contiguous(), sine.contiguous())
        self._embedding = built.matrices.embedding("transformer.wte")
        self._norm = Norm(model.transformer.ln_f)

        def product(module: str) -> Product:
            return built.matrices.product(module)

        self._head = product("lm_head")
        self._layers = [
            _Layer(
                norm=Norm(block.ln_1),
                projection=product(f"transformer.h.{index}.attn.qkv_proj"),
                output=product(f"transformer.h.{index}.attn.out_proj"),
                inner=product(f"transformer.h.{index}.mlp.fc_in"),
                outer=product(f"transformer.h.{index}.mlp.fc_out"),
                activation=block.mlp.act,
            )
            for index, block in enumerate(model.transformer.h)
        ]

    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        turns = self._turns[memory.length, None]
        hidden = self._embedding.row(token)
        views = [View(memory, 1, self.shape.window)]
        for index, layer in enumerate(self._layers):
            vector = layer.norm(hidden)
            query, keys, values = self._heads(layer.projection.row(vector).float()[None], turns)
            attended = layer.output.row(self._attend(query, keys, values, index, views)[0])
            hidden = hidden + attended + layer.outer.row(layer.activation(layer.inner.row(vector)))
        return hidden

    def _rows(self, parts: Sequence[Part]) -> Generator[None, None, torch.Tensor]:
        turns = self._turns[positions_of(parts)]
        views = [self._view(part) for part in parts]
        hidden = self._embedding.rows(tokens_of(parts))
        for index, layer in enumerate(self._layers):
            matrix = layer.norm(hidden)
            query, keys, values = self._heads(layer.projection.rows(matrix), turns)
            attended = layer.output.rows(self._attend(query, keys, values, index, views))
            hidden = hidden + attended + layer.outer.rows(layer.activation(layer.inner.rows(matrix)))
            yield
        return hidden

    def _logits_row(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.row(self._norm(hidden)).float()

    def _logits_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.rows(self._norm(hidden))

    def _heads(self, projected: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, keys and values, each (rows, heads, head_size), the first two turned."""
        rows = len(projected)
        parts = projected.view(rows, BLOCKS, 3, -1)
        # In this order, unlike anybody else.
        query, values, keys = (
            parts[:, :, part].reshape(rows, self.shape.heads, self.shape.head_size) for part in range(3)
        )
        return self._turned(query, turns[:, None]), self._turned(keys, turns[:, None]), values

    def _turned(self, heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of neighbouring pairs: a product of complex numbers."""
        result = heads.contiguous().clone()
        pairs = result[..., : self._rotary].reshape(*result.shape[:2], -1, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        result[..., : self._rotary] = turned.flatten(2)
        return result
