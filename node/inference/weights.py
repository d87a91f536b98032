"""A transformers model over the mapped shards: the class from an allow list, every tensor a view of the mapping.

Owns the checks between what the configuration promises and what the files hold. Knows no tokens and no generation.
"""

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.codegen.modeling_codegen import create_sinusoidal_positions

from contracts.errors import BadInput
from node.inference.files import ArtifactFiles
from node.inference.headers import TensorEntry
from node.inference.mapping import ShardMapping
from node.inference.matrices import Matrices, QuantisedMatrices, StoredMatrices
from node.inference.quantised import QuantisedFile
from node.inference.quantising import PRECISIONS

ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM),
    "CodeGenForCausalLM": (CodeGenConfig, CodeGenForCausalLM),
}
"""What is run. Code that comes with a model never is."""

LIMITS = {
    "num_hidden_layers": 1024,
    "n_layer": 1024,
    "num_attention_heads": 1024,
    "n_head": 1024,
    "num_key_value_heads": 1024,
    "hidden_size": 1 << 17,
    "n_embd": 1 << 17,
    "intermediate_size": 1 << 20,
    "n_inner": 1 << 20,
    "head_dim": 1 << 14,
    "rotary_dim": 1 << 14,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 22,
    "n_positions": 1 << 20,
    "n_ctx": 1 << 20,
}
"""The largest value of each size in config.json: several times what any model has, and small enough to be harmless."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies are fixed when the model is built."""

IGNORED = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|attn\.causal_mask|attn\.bias)$")
"""Buffers that old checkpoints carry and today's classes compute."""

NAMES_SHOWN = 4
"""Tensor names in one error line."""


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files agree with one another: `model` without its bytes, `entries` where those are."""

    key: str
    model: nn.Module
    config: Any
    architecture: str
    precision: torch.dtype
    entries: dict[str, TensorEntry]
    tied: dict[str, str]
    """Names whose tensor is another one's; such are not in `entries`."""


@dataclass(frozen=True)
class BuiltModel:
    """The model with what was found out on the way. Its matrices are to be had from `matrices`."""

    model: nn.Module
    config: Any
    architecture: str
    precision: torch.dtype
    parameters: int
    context_length: int
    private_bytes: int
    matrices: Matrices


def check(key: str, files: ArtifactFiles) -> CheckedModel:
    """Everything about the artifact but its bytes; refuses what is no model of ours."""
    raw = files.read_object("config.json")
    architecture = _check_config(key, raw)
    config_class, model_class = ARCHITECTURES[architecture]
    entries = {name: entry for name, entry in files.tensors().items() if not IGNORED.search(name)}
    precision = _precision(key, entries)
    try:
        config = config_class.from_dict(raw)
        _check_rotary(key, config)
        with torch.device("meta"):
            model = model_class._from_config(config, dtype=precision)
    except _CONFIG_ERRORS as error:
        raise BadInput(f"config.json of {key} does not describe a {architecture}: {error}") from error
    _check_names_and_shapes(key, model, entries)
    tied = _tied(model)
    kept = {name: entry for name, entry in entries.items() if name not in tied}
    return CheckedModel(key, model, config, architecture, precision, kept, tied)


def build(key: str, files: ArtifactFiles, mapping: ShardMapping) -> BuiltModel:
    """The model of the artifact as it is stored, ready for inference."""
    checked = check(key, files)
    private_bytes = _assign(checked, mapping)
    return _built(checked, checked.precision, private_bytes, StoredMatrices(checked.model, mapping, checked.precision))


def build_quantised(checked: CheckedModel, file: QuantisedFile, mapping: ShardMapping) -> BuiltModel:
    """The same over the file of its quantised weights. The modules get norms and biases; no matrix is in them."""
    plain = [part for part in file.layout.parts if part.kind == "plain" and len(part.names) == 1]
    state = {part.names[0]: file.plain(mapping, part) for part in plain}
    checked.model.load_state_dict(state, strict=False, assign=True)
    return _built(checked, torch.float32, 0, QuantisedMatrices(checked.model, file, mapping, checked.tied))


def _built(checked: CheckedModel, precision: torch.dtype, private_bytes: int, matrices: Matrices) -> BuiltModel:
    model, config = checked.model, checked.config
    _place_rotary(model, config)
    model.eval().requires_grad_(False)
    left = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    assert not left or isinstance(matrices, QuantisedMatrices), f"tensors without bytes: {left[:NAMES_SHOWN]}"
    return BuiltModel(
        model=model,
        config=config,
        architecture=checked.architecture,
        precision=precision,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_length=int(config.max_position_embeddings),
        private_bytes=private_bytes,
        matrices=matrices,
    )


_CONFIG_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    NotImplementedError,
)


def _check_config(key: str, raw: dict[str, Any]) -> str:
    """Refuse custom code, unknown architectures, quantised files and sizes out of all proportion."""
    if "auto_map" in raw:
        raise BadInput(f"config.json of {key} names code of its own (auto_map); only built-in architectures are run")
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise BadInput(f"config.json of {key} must name one architecture, one of {', '.join(ARCHITECTURES)}")
    if names[0] not in ARCHITECTURES:
        raise BadInput(f"{key} has the architecture {names[0][:64]!r}; these are run: {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config") is not None:
        raise BadInput(f"config.json of {key} has a quantization_config; import the model in bf16, fp16 or fp32")
    expected = ARCHITECTURES[names[0]][0].model_type
    if raw.get("model_type", expected) != expected:
        raise BadInput(f"config.json of {key} says model_type {str(raw['model_type'])[:64]!r} beside {names[0]}")
    for name, limit in LIMITS.items():
        value = raw.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= limit):
            raise BadInput(f"config.json of {key} has {name} = {str(value)[:32]}; it is between 1 and {limit}")
    return names[0]


def _precision(key: str, entries: Mapping[str, TensorEntry]) -> torch.dtype:
    """The type most of the bytes are in: what the model computes in."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype not in PRECISIONS:
            raise BadInput(f"tensor {entry.name} of {key} is {entry.dtype}; these are run: {', '.join(PRECISIONS)}")
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size
    if not sizes:
        raise BadInput(f"the weight files of {key} hold no tensor; import the model again")
    return PRECISIONS[max(sizes, key=lambda name: sizes[name])]


def _check_rotary(key: str, config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None)
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else "default"
    if kind not in ROPE_TYPES:
        raise BadInput(f"{key} has the rotary embedding {str(kind)[:32]!r}; these are run: {', '.join(ROPE_TYPES)}")


def _check_names_and_shapes(key: str, model: nn.Module, entries: Mapping[str, TensorEntry]) -> None:
    """Every tensor the model has must be there in its shape, and nothing else."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = _tied(model)
    missing = sorted(name for name in wanted if name not in entries and name not in tied)
    if missing:
        raise BadInput(f"{key} lacks {len(missing)} tensors, {_shown(missing)}; import the model again")
    unexpected = sorted(name for name in entries if name not in wanted)
    if unexpected:
        raise BadInput(f"{key} has {len(unexpected)} tensors its config.json knows nothing of, {_shown(unexpected)}")
    wrong = [
        f"{name} is {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in sorted(wanted.items())
        if name in entries and entries[name].shape != shape
    ]
    if wrong:
        raise BadInput(f"{len(wrong)} tensors of {key} have another shape than its config.json says: {_shown(wrong)}")


def _assign(checked: CheckedModel, mapping: ShardMapping) -> int:
    """Put the views in place; returns the bytes that had to be copied.

    Copied is what is stored in another type, and what does not lie at a multiple of its element size: torch's kernels
    may crash on that. An artifact has its weights first in the stream, so this is rare.
    """
    private_bytes = 0
    state = {}
    for name, entry in checked.entries.items():
        tensor = mapping.tensor(PRECISIONS[entry.dtype], entry.shape, entry.offset)
        if tensor.dtype != checked.precision or tensor.data_ptr() % tensor.itemsize:
            tensor = _copied(tensor).to(checked.precision)
            private_bytes += tensor.nbytes
        state[name] = tensor
    checked.model.load_state_dict(state, strict=False, assign=True)
    checked.model.tie_weights()  # type: ignore[operator]
    return private_bytes


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory of our own, byte by byte: it may not be aligned."""
    copy = torch.empty_like(tensor)
    ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return copy


def _place_rotary(model: Any, config: Any) -> None:
    """Buffers that no file holds: computed here as the classes compute them, in fp32."""
    if isinstance(model, CodeGenForCausalLM):
        positions = create_sinusoidal_positions(config.max_position_embeddings, config.rotary_dim or config.n_embd)
        for block in model.transformer.h:
            block.attn.embed_positions = positions
    else:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)


def _tied(model: Any) -> dict[str, str]:
    """Names whose tensor is another one's: they need not be in the files, and are not read if they are."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    return dict(model._tied_weights_keys or {})


def _all_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _shown(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
