"""The decoder of the Llama family: Llama and Mistral, over the modules transformers built."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from node.inference.decoder import Decoder, Product
from node.inference.mapping import ShardMapping
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
    """Products over back-to-back weights are done as one: `query_value` and `gate_up` when the file allows."""

    attention_norm: Norm
    query: Product
    key: Product
    value: Product
    query_value: Product | None
    output: Product
    mlp_norm: Norm
    gate: Product
    up: Product
    gate_up: Product | None
    down: Product
    activation: Any


class LlamaDecoder(Decoder):
    """Llama and Mistral."""

    def __init__(self, built: BuiltModel, mapping: ShardMapping) -> None:
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
        self._embedding = model.model.embed_tokens.weight
        self._norm = Norm(model.model.norm, built.precision)
        self._head = Product(model.lm_head.weight, None, self._wide)
        self._frequencies = model.model.rotary_emb.inv_freq.float().repeat(2)
        self._rotary_scale = float(model.model.rotary_emb.attention_scaling)
        # Rotating halves is swapping them with the first one's sign turned: the sign goes into the sine instead.
        self._sign = torch.ones(head_size)
        self._sign[: head_size // 2] = -1.0
        self._layers = [self._layer(layer, mapping) for layer in model.model.layers]

    def _layer(self, layer: Any, mapping: ShardMapping) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def product(module: Any) -> Product:
            return Product(module.weight, module.bias, self._wide)

        def joined(first: Any, second: Any) -> Product | None:
            if first.bias is not None or second.bias is not None:
                return None
            weight = mapping.join(first.weight, second.weight)
            return None if weight is None else Product(weight, None, self._wide)

        return _Layer(
            attention_norm=Norm(layer.input_layernorm, self._precision),
            query=product(attention.q_proj),
            key=product(attention.k_proj),
            value=product(attention.v_proj),
            query_value=joined(attention.q_proj, attention.v_proj),
            output=product(attention.o_proj),
            mlp_norm=Norm(layer.post_attention_layernorm, self._precision),
            gate=product(mlp.gate_proj),
            up=product(mlp.up_proj),
            gate_up=joined(mlp.gate_proj, mlp.up_proj),
            down=product(mlp.down_proj),
            activation=mlp.act_fn,
        )

    def _row(self, token: int, memory: KeyValues) -> torch.Tensor:
        shape = self.shape
        heads, all_heads = shape.heads, shape.heads + shape.key_value_heads
        width = shape.heads * shape.head_size
        position = memory.length
        angles = self._frequencies * position
        cosine = angles.cos().mul_(self._rotary_scale)
        sine = angles.sin_().mul_(self._sign).mul_(self._rotary_scale)
        half = shape.head_size // 2
        turned = torch.empty((all_heads, shape.head_size))
        # A copy also in fp32: the sums below go into it, and the weights are read-only memory.
        hidden = self._embedding[token].to(torch.float32, copy=True)
        for index, layer in enumerate(self._layers):
            vector = layer.attention_norm.row(hidden)
            if layer.query_value is not None:
                query_value = layer.query_value.row_of_narrow(vector)
                query, value = query_value[:width], query_value[width:]
            else:
                query, value = layer.query.row_of_narrow(vector), layer.value.row_of_narrow(vector)
            turned[:heads] = query.view(heads, -1)
            turned[heads:] = layer.key.row_of_narrow(vector).view(shape.key_value_heads, -1)
            rotated = torch.addcmul(turned * cosine, turned.roll(half, 1), sine)
            memory.keys[index][0, :, position] = rotated[heads:]
            memory.values[index][0, :, position] = value.view(shape.key_value_heads, -1)
            attended = self._attend_row(rotated[:heads].view(1, heads, 1, -1), index, memory)
            hidden += layer.output.row(attended)
            vector = layer.mlp_norm.row(hidden)
            if layer.gate_up is not None:
                gate, up = layer.gate_up.row_of_narrow(vector).chunk(2)
            else:
                gate, up = layer.gate.row_of_narrow(vector), layer.up.row_of_narrow(vector)
            hidden += layer.down.row(layer.activation(gate) * up)
        memory.length = position + 1
        return hidden

    def _each(self, tokens: Sequence[int], memories: Sequence[KeyValues]) -> torch.Tensor:
        shape, count = self.shape, len(tokens)
        width = shape.heads * shape.head_size
        positions = torch.tensor([memory.length for memory in memories], dtype=torch.float32)
        cosine, sine = (part[:, None] for part in self._angles(positions))
        hidden = self._embedding[torch.tensor(tokens)].float()
        for index, layer in enumerate(self._layers):
            matrix = layer.attention_norm.rows(hidden)
            if layer.query_value is not None:
                query_value = layer.query_value.few(matrix)
                query, values = query_value[:, :width], query_value[:, width:]
            else:
                query, values = layer.query.few(matrix), layer.value.few(matrix)
            query = self._turned(query.reshape(count, -1, shape.head_size), cosine, sine)
            keys = self._turned(layer.key.few(matrix).view(count, -1, shape.head_size), cosine, sine)
            values = values.reshape(count, -1, shape.head_size)
            for place, memory in enumerate(memories):
                memory.put(index, keys[place], values[place])
            hidden += layer.output.few(self._attend_each(query, index, memories))
            matrix = layer.mlp_norm.rows(hidden)
            if layer.gate_up is not None:
                gate, up = layer.gate_up.few(matrix).chunk(2, 1)
            else:
                gate, up = layer.gate.few(matrix), layer.up.few(matrix)
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

        hidden = self._embedding[torch.tensor(tokens)].float()
        for index, layer in enumerate(self._layers):
            matrix = layer.attention_norm.rows(hidden)
            query = turn(layer.query.rows(matrix))
            memory.keys[index][:, :, start:end] = turn(layer.key.rows(matrix))
            values = layer.value.rows(matrix).view(1, rows, -1, shape.head_size).transpose(1, 2)
            memory.values[index][:, :, start:end] = values
            hidden += layer.output.rows(self._attend_rows(query, index, memory))
            matrix = layer.mlp_norm.rows(hidden)
            hidden += layer.down.rows(layer.activation(layer.gate.rows(matrix)) * layer.up.rows(matrix))
            yield
        memory.length = end
        return hidden[-1].clone()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.row_of_narrow(self._norm.row(hidden)).float()

    def _logits_each(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head.few(self._norm.rows(hidden))
