"""The decoder of the Llama family: Llama and Mistral, over the modules transformers built."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from node.inference.decoder import Decoder, Fan, Product
from node.inference.matrices import Matrices
from node.inference.memory import KeyValues, Shape
from node.inference.weights import BuiltModel


class Norm:
    """Root mean square norm."""

    def __init__(self, module: Any, precision: torch.dtype) -> None:
        self.weight = module.weight.float()
        self._epsilon = float(module.variance_epsilon)
        self._size = self.weight.shape[0]
        self._narrow = torch.empty(self._size, dtype=precision)

    def row(self, vector: torch.Tensor) -> torch.Tensor:
        """One vector, straight into the precision of the weights; good until the next call."""
        scale = 1.0 / math.sqrt(torch.dot(vector, vector).item() / self._size + self._epsilon)
        return torch.mul(vector * scale, self.weight, out=self._narrow)

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
        super().__init__(shape, built.precision)
        self._embedding = built.matrices.embedding("model.embed_tokens")
        self._norm = Norm(model.model.norm, built.precision)
        self._head = built.matrices.product("lm_head", self._wide)
        self._frequencies = model.model.rotary_emb.inv_freq.float().repeat(2)
        self._rotary_scale = float(model.model.rotary_emb.attention_scaling)
        # Rotating halves is swapping them with the first one's sign turned: the sign goes into the sine instead.
        self._sign = torch.ones(head_size)
        self._sign[: head_size // 2] = -1.0
        self._layers = [
            self._layer(module, f"model.layers.{index}", built.matrices)
            for index, module in enumerate(model.model.layers)
        ]

    def _layer(self, layer: Any, name: str, matrices: Matrices) -> _Layer:
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        return _Layer(
            attention_norm=Norm(layer.input_layernorm, self._precision),
            projection=matrices.fan([f"{attention}.{one}_proj" for one in "qkv"], self._wide),
            output=matrices.product(f"{attention}.o_proj", self._wide),
            mlp_norm=Norm(layer.post_attention_layernorm, self._precision),
            gate_up=matrices.fan([f"{mlp}.gate_proj", f"{mlp}.up_proj"], self._wide),
            down=matrices.product(f"{mlp}.down_proj", self._wide),
            activation=layer.mlp.act_fn,
        )

    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        shape = self.shape
        heads, all_heads = shape.heads, shape.heads + shape.key_value_heads
        position = memory.length
        angles = self._frequencies * position
        cosine = angles.cos().mul_(self._rotary_scale)
        sine = angles.sin_().mul_(self._sign).mul_(self._rotary_scale)
        half = shape.head_size // 2
        turned = torch.empty((all_heads, shape.head_size))
        hidden = self._embedding.row(token)
        for index, layer in enumerate(self._layers):
            vector = layer.attention_norm.row(hidden)
            query, key, value = layer.projection.row_of_narrow(vector)
            turned[:heads] = query.view(heads, -1)
            turned[heads:] = key.view(shape.key_value_heads, -1)
            rotated = torch.addcmul(turned * cosine, turned.roll(half, 1), sine)
            memory.keys[index][0, :, position] = rotated[heads:]
            memory.values[index][0, :, position] = value.view(shape.key_value_heads, -1)
            attended = self._attend_row(rotated[:heads].view(1, heads, 1, -1), index, memory)
            hidden += layer.output.row(attended)
            vector = layer.mlp_norm.row(hidden)
            gate, up = layer.gate_up.row_of_narrow(vector)
            hidden += layer.down.row(layer.activation(gate) * up)
        memory.length = position + 1
        return hidden

    def _each(self, tokens: Sequence[int], memories: Sequence[KeyValues]) -> torch.Tensor:
        size, count = self.shape.head_size, len(tokens)
        positions = torch.tensor([memory.length for memory in memories], dtype=torch.float32)
        cosine, sine = (part[:, None] for part in self._angles(positions))
        hidden = self._embedding.rows(torch.tensor(tokens))
        for index, layer in enumerate(self._layers):
            parts = layer.projection.few(layer.attention_norm.rows(hidden))
            query, keys, values = (part.reshape(count, -1, size) for part in parts)
            query, keys = self._turned(query, cosine, sine), self._turned(keys, cosine, sine)
            for place, memory in enumerate(memories):
                memory.put(index, keys[place], values[place])
            hidden += layer.output.few(self._attend_each(query, index, memories))
            gate, up = layer.gate_up.few(layer.mlp_norm.rows(hidden))
            hidden += layer.down.few(layer.activation(gate) * up)
        for memory in memories:
            memory.length += 1
        return hidden

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and signed sine of each position, a row for each."""
        angles = positions[:, None] * self._frequencies
        return angles.cos() * self._rotary_scale, angles.sin() * self._sign * self._rotary_scale

    def _turned(self, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(heads * cosine, heads.roll(self.shape.head_size // 2, -1), sine)

    def _rows(self, tokens: Sequence[int], memory: KeyValues) -> Generator[None, None, torch.Tensor]:
        shape = self.shape
        rows, start = len(tokens), memory.length
        end = start + rows
        cosine, sine = self._angles(torch.arange(start, end, dtype=torch.float32))

        def turn(matrix: torch.Tensor) -> torch.Tensor:
            return self._turned(matrix.view(1, rows, -1, shape.head_size).transpose(1, 2), cosine, sine)

        hidden = self._embedding.rows(torch.tensor(tokens))
        for index, layer in enumerate(self._layers):
            matrix = layer.attention_norm.rows(hidden)
            query, key, value = layer.projection.rows(matrix)
            query = turn(query)
            memory.keys[index][:, :, start:end] = turn(key)
            memory.values[index][:, :, start:end] = value.view(1, rows, -1, shape.head_size).transpose(1, 2)
            hidden += layer.output.rows(self._attend_rows(query, index, memory))
            matrix = layer.mlp_norm.rows(hidden)
            gate, up = layer.gate_up.rows(matrix)
            hidden += layer.down.rows(layer.activation(gate) * up)
            yield
        memory.length = end
        return hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.row_of_narrow(self._norm.row(hidden)).float()

    def _logits_each(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.few(self._norm.rows(hidden))
