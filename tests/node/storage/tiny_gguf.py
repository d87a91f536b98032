"""A tiny random Llama as a GGUF file with a working tokenizer, written by the `gguf` package."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

from node.storage.directory import Description

HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE, CONTEXT = 64, 4, 2, 2, 96, 256
HEAD = HIDDEN // HEADS
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
DESCRIPTION = Description("LlamaForCausalLM", "llama", 0, "BF16", CONTEXT)


def byte_characters() -> list[str]:
    """How byte-level BPE writes each byte as a printable character."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(extra)) for byte in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r"]
TOKENS = SPECIAL + byte_characters() + [merge.replace(" ", "") for merge in MERGES]


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    narrow = KV_HEADS * HEAD
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        found["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        names = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (narrow, HIDDEN),
            "attn_v": (narrow, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INTERMEDIATE, HIDDEN),
            "ffn_up": (INTERMEDIATE, HIDDEN),
            "ffn_down": (HIDDEN, INTERMEDIATE),
        }
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
    return found


def write_tiny_gguf(path: Path, tied: bool = True, architecture: str = "llama", **changes: object) -> None:
    """`changes`: metadata added as is (`eot=2`), or tensors left out (`without="blk.0.attn_q.weight"`)."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])
    if "eot" in changes:
        writer.add_eot_token_id(changes["eot"])
    if "split" in changes:
        writer.add_uint16("split.count", changes["split"])
    random = np.random.default_rng(1)
    kinds = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.Q4_1, GGMLQuantizationType.F32)
    for number, (name, shape) in enumerate(shapes(tied).items()):
        values = random.standard_normal(shape, dtype=np.float32) / 8
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else kinds[number % len(kinds)]
        if name == changes.get("reshape"):
            values = values[: len(values) // 2]
        if name != changes.get("without"):
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    if "extra" in changes:
        writer.add_tensor(changes["extra"], np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
