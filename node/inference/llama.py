"""The decoder of the Llama family: Llama and Mistral, over the modules transformers built."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from node.inference.decoder import Decoder, Part, View, positions_of, tokens_of
from node.inference.memory import KeyValues, Shape
from node.inference.products import Fan, Product
from node.inference.weights import BuiltModel


class Norm:
    """Root mean square norm."""

    def __init__(self, module: Any, precision: torch.dtype) -> None:
        self.weight = module.weight.float()
        self._epsilon = float(module.variance_epsilon)
        self._size = self.weight.shape[0]
        self._narrow = torch.empty(self._size, dtype=precision)
        self._nothing = torch.zeros(self._size)

    def row(self, vector: torch.Tensor) -> torch.Tensor:
        """One vector, straight into the precision that products take; good until the next call."""
        scale = 1.0 / math.sqrt(torch.dot(vector, vector).item() / self._size + self._epsilon)
        return torch.addcmul(self._nothing, vector, self.weight, value=scale, out=self._narrow)

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Many vectors, fp32."""
        return functional.rms_norm(matrix, (self._size,), self.weight, self._epsilon)


@dataclass(frozen=True)
class _Layer:
    attention_norm: Norm
    projection: Fan
    """Query, key and value."""
    output: Product
    mlp_norm: Norm
    gate_up: Fan
    down: Product
    activation: Any


class LlamaDecoder(Decoder):
    """Llama and Mistral."""

    def __init__(self, built: BuiltModel) -> None:
        model: Any = built.model
        config = built.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = Shape(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            head_size=head_size,
            context_length=built.context_length,
            window=getattr(config, "sliding_window", None) or 0,
        )
        super().__init__(shape, built.matrices)
        self._embedding = built.matrices.embedding("model.embed_tokens")
        self._norm = Norm(model.model.norm, built.precision)
        self._head = built.matrices.product("lm_head")
        self._frequencies = model.model.rotary_emb.inv_freq.float().repeat(2)
        self._rotary_scale = float(model.model.rotary_emb.attention_scaling)
        # Rotating halves is swapping them with the first one's sign turned: the sign goes into the sine instead.
        self._sign = torch.ones(head_size)
        self._sign[: head_size // 2] = -1.0
        self._layers = [
            self._layer(module, f"model.layers.{index}", built) for index, module in enumerate(model.model.layers)
        ]

    def _layer(self, layer: Any, name: str, built: BuiltModel) -> _Layer:
        matrices, attention, mlp = built.matrices, f"{name}.self_attn", f"{name}.mlp"
        return _Layer(
            attention_norm=Norm(layer.input_layernorm, built.precision),
            projection=matrices.fan([f"{attention}.{one}_proj" for one in "qkv"]),
            output=matrices.product(f"{attention}.o_proj"),
            mlp_norm=Norm(layer.post_attention_layernorm, built.precision),
            gate_up=matrices.fan([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=matrices.product(f"{mlp}.down_proj"),
            activation=layer.mlp.act_fn,
        )

    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        shape, position = self.shape, memory.length
        heads, half = shape.heads, shape.head_size // 2
        (cosine,), (sine,) = self._angles(torch.tensor([float(position)]))
        # Each head of query and key, and its first half again: from its middle on, it has its halves swapped.
        turning = torch.empty((heads + shape.key_value_heads, shape.head_size + half))
        straight, swapped = turning[:, : shape.head_size], turning[:, half:]
        query_place, key_place = straight[:heads], straight[heads:]
        first, again = turning[:, :half], turning[:, shape.head_size :]
        hidden = self._embedding.row(token)
        view = View(memory, 1, shape.window)
        for index, layer in enumerate(self._layers):
            query, key, value = layer.projection.row(layer.attention_norm.row(hidden))
            query_place.copy_(query.view(heads, -1))
            key_place.copy_(key.view(shape.key_value_heads, -1))
            again.copy_(first)
            turned = torch.addcmul(straight * cosine, swapped, sine)
            view.new_keys[index].copy_(turned[heads:, None])
            view.new_values[index].copy_(value.view(shape.key_value_heads, 1, -1))
            hidden += layer.output.row(self._attend_row(turned[:heads], index, view))
            gate, up = layer.gate_up.row(layer.mlp_norm.row(hidden))
            hidden += layer.down.row(layer.activation(gate) * up)
        return hidden

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine of each position, a row for each."""
        angles = positions[:, None] * self._frequencies
        return angles.cos() * self._rotary_scale, angles.sin() * self._sign * self._rotary_scale

    def _turned(self, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(heads * cosine, heads.roll(self.shape.head_size // 2, -1), sine)

    def _rows(self, parts: Sequence[Part]) -> Generator[None, None, torch.Tensor]:
        size = self.shape.head_size
        cosine, sine = (part[:, None] for part in self._angles(positions_of(parts).float()))
        hidden = self._embedding.rows(tokens_of(parts))
        views = [self._view(part) for part in parts]
        rows = len(hidden)
        for index, layer in enumerate(self._layers):
            results = layer.projection.rows(layer.attention_norm.rows(hidden))
            query, keys, values = (result.reshape(rows, -1, size) for result in results)
            query, keys = self._turned(query, cosine, sine), self._turned(keys, cosine, sine)
            hidden += layer.output.rows(self._attend(query, keys, values, index, views))
            gate, up = layer.gate_up.rows(layer.mlp_norm.rows(hidden))
            hidden += layer.down.rows(layer.activation(gate) * up)
            yield
        return hidden

    def _logits_row(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.row(self._norm.row(hidden)).float()

    def _logits_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.rows(self._norm.rows(hidden))
