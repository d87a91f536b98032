"""The decoder of CodeGen: attention and the two-layer network side by side, over the modules transformers built."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from contracts.errors import BadInput
from node.inference.decoder import Decoder, Product
from node.inference.memory import KeyValues, Shape
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
        super().__init__(shape, built.precision)
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
            return built.matrices.product(module, self._wide)

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
        position = memory.length
        hidden = self._embedding.row(token)
        for index, layer in enumerate(self._layers):
            vector = layer.norm(hidden)
            query = self._place(layer.projection.row(vector).float()[None], index, position, memory)
            attended = layer.output.row(self._attend_row(query, index, memory))
            hidden = hidden + attended + layer.outer.row(layer.activation(layer.inner.row(vector)))
        memory.length = position + 1
        return hidden

    def _each(self, tokens: Sequence[int], memories: Sequence[KeyValues]) -> torch.Tensor:
        hidden = self._embedding.rows(torch.tensor(tokens))
        for index, layer in enumerate(self._layers):
            matrix = layer.norm(hidden)
            projected = layer.projection.few(matrix)
            query = torch.cat(
                [
                    self._place(projected[place, None], index, memory.length, memory)[:, :, 0]
                    for place, memory in enumerate(memories)
                ]
            )
            attended = layer.output.few(self._attend_each(query, index, memories))
            hidden = hidden + attended + layer.outer.few(layer.activation(layer.inner.few(matrix)))
        for memory in memories:
            memory.length += 1
        return hidden

    def _rows(self, tokens: Sequence[int], memory: KeyValues) -> Generator[None, None, torch.Tensor]:
        start = memory.length
        hidden = self._embedding.rows(torch.tensor(tokens))
        for index, layer in enumerate(self._layers):
            matrix = layer.norm(hidden)
            query = self._place(layer.projection.rows(matrix), index, start, memory)
            attended = layer.output.rows(self._attend_rows(query, index, memory))
            hidden = hidden + attended + layer.outer.rows(layer.activation(layer.inner.rows(matrix)))
            yield
        memory.length = start + len(tokens)
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.row(self._norm(hidden)).float()

    def _logits_each(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.few(self._norm(hidden))

    def _place(self, projected: torch.Tensor, index: int, start: int, memory: KeyValues) -> torch.Tensor:
        """Split, turn, put key and value in place; the query as (1, heads, rows, head_size)."""
        rows = projected.shape[0]
        parts = projected.view(rows, BLOCKS, 3, -1)
        # In this order, unlike anybody else.
        query, value, key = (
            parts[:, :, part].reshape(rows, self.shape.heads, self.shape.head_size).transpose(0, 1) for part in range(3)
        )
        turns = self._turns[start : start + rows]
        memory.keys[index][0, :, start : start + rows] = self._turn(key, turns)
        memory.values[index][0, :, start : start + rows] = value
        return self._turn(query, turns)[None]

    def _turn(self, heads: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of neighbouring pairs: a product of complex numbers."""
        result = heads.contiguous().clone()
        pairs = result[..., : self._rotary].reshape(*result.shape[:2], -1, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        result[..., : self._rotary] = turned.flatten(2)
        return result
