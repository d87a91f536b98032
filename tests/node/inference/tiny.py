"""Tiny random models with a real tokenizer, and the cutting of a directory into shards."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from node.inference.spec import FileEntry, ModelSpec

TEXT = [
    "The capital of France is Paris, and the capital of Norway is Oslo.",
    "A shard is one range of the stream; a piece is the unit of verification.",
    "Grüße aus Zürich, Γειά σου Κόσμε, 你好世界, здравствуй мир, 🦊🐻❄️.",
    "def main():\n    return [number ** 2 for number in range(10)]\n",
] * 20

TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)

CONTEXT = 512


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the text above, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def llama(dtype: torch.dtype, **changes: object) -> LlamaForCausalLM:
    sizes = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def mistral(dtype: torch.dtype, **changes: object) -> MistralForCausalLM:
    sizes = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "sliding_window": 24,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(2)
    return MistralForCausalLM(MistralConfig(**{**sizes, **changes})).to(dtype).eval()


def codegen(dtype: torch.dtype, **changes: object) -> CodeGenForCausalLM:
    sizes = {
        "vocab_size": 448,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "rotary_dim": 8,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    return CodeGenForCausalLM(CodeGenConfig(**{**sizes, **changes})).to(dtype).eval()


MODELS: dict[str, Callable[..., LlamaForCausalLM | MistralForCausalLM | CodeGenForCausalLM]] = {
    "llama": llama,
    "mistral": mistral,
    "codegen": codegen,
}


def save(directory: Path, name: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A model and its tokenizer in a directory, as transformers saves them."""
    MODELS[name](dtype, **changes).save_pretrained(directory)
    train_tokenizer().save_pretrained(directory)
    return directory


def cut(source: Path, target: Path, shard_size: int, key: str = "tiny@1", aligned: bool = True) -> ModelSpec:
    """The directory's files as one stream in shards."""
    files = [path for path in source.rglob("*") if path.is_file()]
    # Weights first, as the storage has it, unless a test wants them where they cannot be mapped.
    files.sort(key=lambda path: (path.suffix != ".safetensors" or not aligned, path.name))
    stream = b"".join(path.read_bytes() for path in files)
    target.mkdir(parents=True, exist_ok=True)
    shards = []
    for index, offset in enumerate(range(0, len(stream), shard_size)):
        shard = target / f"{index}"
        shard.write_bytes(stream[offset : offset + shard_size])
        shards.append(str(shard))
    entries = tuple(FileEntry(path.relative_to(source).as_posix(), path.stat().st_size) for path in files)
    return ModelSpec(key, len(stream), shard_size, entries, tuple(shards))


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_bytes())
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def llama_config() -> LlamaConfig:
    """Of the tiny Llama's vocabulary, for a tokenizer without a model."""
    return LlamaConfig(vocab_size=448, eos_token_id=1, bos_token_id=0)
