"""Random models in the shapes of large ones, written as fast as the disk takes them.

Speed does not depend on the values of weights, as long as all are ordinary numbers: every matrix is cut from one random
block, over and over, at places that do not line up. Every token of the vocabulary is some text, so that an answer comes
token by token whatever is drawn.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FILE_BYTES_MAX = 2 << 30
BLOCK_WEIGHTS = (48 << 20) + 4099
"""Neither a multiple of a page nor of a row."""

COMMON = {"max_position_embeddings": 8192, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
LLAMA_1B = transformers.LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
    **COMMON,
)
"""As Llama-3.2-1B."""


def mistral(layers: int) -> transformers.MistralConfig:
    """As Mistral-7B, which has 32 layers: 14.5 GB; with 8 it is 4 GB."""
    return transformers.MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        sliding_window=4096,
        tie_word_embeddings=False,
        **COMMON,
    )


def save_tokenizer(directory: Path, vocabulary: int) -> None:
    """One of single bytes; what is left of the vocabulary is text that no prompt comes to."""
    words = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"w{number}.": number for number in range(len(words), vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    fast.save_pretrained(directory)


def write(directory: Path, config: Any) -> Path:
    """A Hugging Face directory of bf16 weights in files of at most two GiB."""
    directory.mkdir(parents=True)
    config.architectures, config.dtype = [_model_class(config).__name__], "bfloat16"
    config.save_pretrained(directory)
    save_tokenizer(directory, config.vocab_size)
    block = _bytes(torch.randn(BLOCK_WEIGHTS) * 0.02)
    files = list(_files(_shapes(config)))
    place = 0
    index = {}
    for number, shapes in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        index.update(dict.fromkeys(shapes, name))
        with (directory / name).open("wb") as file:
            _write_header(file, shapes)
            for shape in shapes.values():
                size = 2 * prod(shape)
                if len(shape) == 1:
                    file.write(_bytes(torch.ones(shape)))
                    continue
                while size:
                    part = block[place : place + size]
                    file.write(part)
                    size -= len(part)
                    place = (place + len(part)) % len(block)
    total = {"total_size": sum(2 * prod(shape) for shapes in files for shape in shapes.values())}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    return directory


def step_bytes(config: Any) -> int:
    """Bytes of weights that one token of an answer is multiplied with: every matrix, but of an embedding that is not
    the head as well only a row is looked up."""
    shapes = _shapes(config)
    return sum(
        2 * prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and (config.tie_word_embeddings or "embed_tokens" not in name)
    )


def _bytes(weights: torch.Tensor) -> memoryview:
    numbers: Any = weights.bfloat16().view(torch.uint8).numpy()
    return memoryview(numbers)


def _model_class(config: Any) -> Any:
    return transformers.LlamaForCausalLM if config.model_type == "llama" else transformers.MistralForCausalLM


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of every tensor that is stored, in the order in which safetensors has them."""
    with torch.device("meta"):
        model = _model_class(config)._from_config(config, dtype=torch.bfloat16)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    return {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items()) if name not in tied}


def _files(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    part: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        if part and size + 2 * prod(shape) > FILE_BYTES_MAX:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += 2 * prod(shape)
    yield part


def _write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (offset, end)}
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    file.write(len(data).to_bytes(8, "little") + data)
