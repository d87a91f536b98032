"""What a GGUF file of the Llama family becomes: config.json, generation_config.json and the tensors by their new names.

Owns the names, the shapes and the order of rows (llama.cpp interleaves the rotary halves of q and k, Hugging Face does
not). Pure: reads no tensor and writes nothing. Mistral models are this family too; other families are refused.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from contracts.errors import BadInput
from node.storage.directory import Description
from node.storage.gguf_header import GgufHeader, GgufTensor, Value

LAYERS_MAX = 512
_ROW_COUNT_MAX = 1 << 24


@dataclass(frozen=True)
class Conversion:
    """One tensor to write: its new name, where its values are, and the heads its rows are interleaved over (or 0)."""

    name: str
    tensor: GgufTensor
    interleaved_heads: int

    @property
    def size_bytes(self) -> int:
        """In bfloat16."""
        size = 2
        for length in self.tensor.shape:
            size *= length
        return size


@dataclass(frozen=True)
class LlamaPlan:
    """Everything the converter needs, checked."""

    config: dict[str, object]
    generation_config: dict[str, object]
    conversions: tuple[Conversion, ...]
    description: Description

    @property
    def size_bytes(self) -> int:
        return sum(conversion.size_bytes for conversion in self.conversions)


@dataclass(frozen=True)
class _Shape:
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int


def plan_llama(header: GgufHeader, where: str) -> LlamaPlan:
    """The plan for a file, or BadInput naming `where` and what about it is not taken in."""
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise BadInput(f"{where} has the architecture {str(architecture)[:40]!r}; from GGUF only 'llama' is taken in")
    if header.metadata.get("split.count", 1) != 1:
        raise BadInput(f"{where} is one part of a split GGUF; merge the parts first (llama-gguf-split --merge)")
    keys = _Keys(header.metadata, where)
    shape = _shape(keys)
    tied = "output.weight" not in header.tensors
    expected = {gguf: (name, size, heads) for gguf, name, size, heads in _tensors(shape, tied)}
    for name, tensor in header.tensors.items():
        if name not in expected:
            raise BadInput(f"{where} has the tensor {name[:80]!r}, which a plain Llama model has not; it is not taken")
        if tensor.shape != expected[name][1]:
            raise BadInput(f"{where}: tensor {name} has shape {tensor.shape}, {expected[name][1]} was expected")
    for name in expected:
        if name not in header.tensors:
            raise BadInput(f"{where} has no tensor {name}; the file is incomplete")
    conversions = tuple(
        Conversion(name, header.tensors[gguf], heads) for gguf, (name, _, heads) in sorted(expected.items())
    )
    description = Description(
        architecture="LlamaForCausalLM",
        model_type="llama",
        parameters=sum(conversion.size_bytes for conversion in conversions) // 2,
        dtype="BF16",
        context_length=keys.count("llama.context_length"),
    )
    return LlamaPlan(_config(keys, shape, tied), _generation_config(keys), conversions, description)


class _Keys:
    """Typed look-ups in the metadata."""

    def __init__(self, metadata: dict[str, Value], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def count(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _ROW_COUNT_MAX:
            raise BadInput(f"{self._where}: {key} is {str(value)[:40]}, a count was expected")
        return value

    def real(self, key: str, default: float) -> float:
        value = self._metadata.get(key, default)
        if not isinstance(value, float | int) or not 0 < value < 1e30:
            raise BadInput(f"{self._where}: {key} is {str(value)[:40]}, a positive number was expected")
        return _shortest(float(value))

    def token(self, name: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < self.vocabulary():
            raise BadInput(f"{self._where}: the {name} token is {str(value)[:40]}, outside the vocabulary")
        return value

    def vocabulary(self) -> int:
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise BadInput(f"{self._where} has no tokenizer; a GGUF with its vocabulary is needed")
        return self.count("llama.vocab_size", len(tokens))

    def refuse(self, key: str, harmless: tuple[Value, ...]) -> None:
        value = self._metadata.get(key)
        if value is not None and value not in harmless:
            raise BadInput(f"{self._where} has {key} = {str(value)[:40]}, which the conversion would lose")


def _shape(keys: _Keys) -> _Shape:
    hidden, heads = keys.count("llama.embedding_length"), keys.count("llama.attention.head_count")
    layers = keys.count("llama.block_count")
    head_size = keys.count("llama.attention.key_length", max(1, hidden // heads))
    keys.refuse("llama.rope.scaling.type", ("none",))
    keys.refuse("llama.rope.dimension_count", (head_size,))
    keys.refuse("llama.attention.value_length", (head_size,))
    keys.refuse("llama.expert_count", (0,))
    kv_heads = keys.count("llama.attention.head_count_kv", heads)
    if layers > LAYERS_MAX or heads % kv_heads or head_size % 2:
        raise BadInput(f"{layers} layers, {heads} heads, {kv_heads} key heads of {head_size} make no Llama model")
    return _Shape(
        keys.vocabulary(), hidden, keys.count("llama.feed_forward_length"), layers, heads, kv_heads, head_size
    )


def _tensors(shape: _Shape, tied: bool) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name in the file, new name, shape, heads its rows are interleaved over)."""
    hidden, wide, narrow = shape.hidden, shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    yield "token_embd.weight", "model.embed_tokens.weight", (shape.vocabulary, hidden), 0
    yield "output_norm.weight", "model.norm.weight", (hidden,), 0
    if not tied:
        yield "output.weight", "lm_head.weight", (shape.vocabulary, hidden), 0
    for layer in range(shape.layers):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        yield f"{old}attn_norm.weight", f"{new}input_layernorm.weight", (hidden,), 0
        yield f"{old}attn_q.weight", f"{new}self_attn.q_proj.weight", (wide, hidden), shape.heads
        yield f"{old}attn_k.weight", f"{new}self_attn.k_proj.weight", (narrow, hidden), shape.kv_heads
        yield f"{old}attn_v.weight", f"{new}self_attn.v_proj.weight", (narrow, hidden), 0
        yield f"{old}attn_output.weight", f"{new}self_attn.o_proj.weight", (hidden, wide), 0
        yield f"{old}ffn_norm.weight", f"{new}post_attention_layernorm.weight", (hidden,), 0
        yield f"{old}ffn_gate.weight", f"{new}mlp.gate_proj.weight", (shape.intermediate, hidden), 0
        yield f"{old}ffn_up.weight", f"{new}mlp.up_proj.weight", (shape.intermediate, hidden), 0
        yield f"{old}ffn_down.weight", f"{new}mlp.down_proj.weight", (hidden, shape.intermediate), 0


def _config(keys: _Keys, shape: _Shape, tied: bool) -> dict[str, object]:
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": keys.token("bos"),
        "dtype": "bfloat16",
        "eos_token_id": keys.token("eos"),
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": keys.count("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": keys.token("padding"),
        "rms_norm_eps": keys.real("llama.attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": {"rope_theta": keys.real("llama.rope.freq_base", 10000.0), "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    return config


def _generation_config(keys: _Keys) -> dict[str, object]:
    """Generation ends at the end of the text and, where the model has one, at the end of the turn."""
    ends = [end for end in (keys.token("eos"), keys.token("eot")) if end is not None]
    ends = list(dict.fromkeys(ends))
    found: dict[str, object] = {
        "bos_token_id": keys.token("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": keys.token("padding"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _shortest(value: float) -> float:
    """GGUF keeps reals in 32 bits: 1e-5 comes out as 9.999999747378752e-06. The shortest number that means the same."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def to_json(value: dict[str, object]) -> bytes:
    """The same bytes for the same content: an artifact's hash must not depend on when it was made."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
