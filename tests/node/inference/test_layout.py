"""What is quantised to what, and that the models this network is for fit where they are meant to."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import pytest
import torch
from transformers import CodeGenConfig, CodeGenForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from node.inference.headers import TensorEntry
from node.inference.layout import ALIGNMENT, INT8_COLUMNS_MAX, Layout, Part, lay_out

GB = 1_000_000_000


def entries_of(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorEntry]:
    found, offset = {}, 0
    for name, shape in shapes.items():
        size = prod(shape) * (4 if dtype == "F32" else 2)
        found[name] = TensorEntry(name, dtype, shape, offset, size)
        offset += size
    return found


def shapes_of(model_class: type, config: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if "causal_mask" not in name}


def mistral_7b() -> dict[str, tuple[int, ...]]:
    from transformers import MistralForCausalLM

    sizes = {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "hidden_size": 4096}
    return shapes_of(MistralForCausalLM, MistralConfig(num_hidden_layers=32, num_attention_heads=32, **sizes))


def llama2_13b() -> dict[str, tuple[int, ...]]:
    sizes = {"num_attention_heads": 40, "intermediate_size": 13824, "vocab_size": 32000, "hidden_size": 5120}
    return shapes_of(LlamaForCausalLM, LlamaConfig(num_hidden_layers=40, **sizes))


def codegen_16b() -> dict[str, tuple[int, ...]]:
    config = CodeGenConfig(vocab_size=51200, n_embd=6144, n_layer=34, n_head=24, rotary_dim=64, n_positions=2048)
    return shapes_of(CodeGenForCausalLM, config)


@pytest.mark.parametrize(
    ("model", "stored", "int8", "int4"),
    [(mistral_7b, 14.48, 7.25, 5.84), (llama2_13b, 26.03, 13.03, 10.9), (codegen_16b, 32.06, 16.04, 14.15)],
    ids=["mistral-7b", "llama2-13b", "codegen-16b"],
)
def test_the_catalogues_models(model, stored: float, int8: float, int4: float) -> None:
    """A 7B serves from the 8 GB of a basic cache, a 13B and a 16B from the 16 GB of a pro one."""
    entries = entries_of(model())
    sizes = (
        sum(entry.size for entry in entries.values()),
        lay_out(entries, "int8").size_bytes,
        lay_out(entries, "int4").size_bytes,
    )
    assert [size / GB for size in sizes] == pytest.approx([stored, int8, int4], abs=0.05)


LAYER = {
    "model.embed_tokens.weight": (448, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (128, 64),
    "model.layers.0.mlp.up_proj.weight": (128, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 128),
    "lm_head.weight": (448, 64),
}


def kinds(layout: Layout) -> dict[tuple[str, ...], str]:
    return {tuple(name.rpartition("layers.0.")[2] for name in part.names): part.kind for part in layout.parts}


def test_what_is_int4_and_what_is_not() -> None:
    assert kinds(lay_out(entries_of(LAYER), "int4")) == {
        ("model.embed_tokens.weight",): "int8",
        ("input_layernorm.weight",): "plain",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"): "int8",
        ("self_attn.q_proj.bias",): "plain",
        ("self_attn.o_proj.weight",): "int8",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"): "int4",
        ("mlp.down_proj.weight",): "int8",
        ("lm_head.weight",): "int8",
    }
    assert set(kinds(lay_out(entries_of(LAYER), "int8")).values()) == {"plain", "int8"}


def test_shapes_that_the_kernels_do_not_take() -> None:
    def kind_of_gate(rows: int, columns: int) -> str:
        changed = {name: (rows, columns) for name in LAYER if "gate_proj" in name or "up_proj" in name}
        return next(p.kind for p in lay_out(entries_of(LAYER | changed), "int4").parts if "gate_proj" in p.names[0])

    assert kind_of_gate(128, 64) == "int4"
    assert kind_of_gate(160, 64) == "int8"
    assert kind_of_gate(128, 72) == "plain"
    assert kind_of_gate(160, INT8_COLUMNS_MAX) == "int8"
    assert kind_of_gate(160, INT8_COLUMNS_MAX + 32) == "plain"
    assert 127 * 127 * INT8_COLUMNS_MAX < 2**31, "what a product of int8 adds up in"


def spans(layout: Layout) -> Iterator[tuple[int, int]]:
    for part in layout.parts:
        yield part.offset, part.offset + part.values_bytes
        if part.kind != "plain":
            yield part.scales_offset, part.end


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_parts_lie_one_after_the_other_and_aligned(precision) -> None:
    for dtype in ("BF16", "F32"):
        layout = lay_out(entries_of(LAYER, dtype), precision)
        before = 0
        for begin, end in spans(layout):
            assert begin % ALIGNMENT == 0
            assert before <= begin < before + ALIGNMENT
            before = end
        assert layout.size_bytes == before


def test_the_digest_names_everything_that_the_bytes_depend_on() -> None:
    layout = lay_out(entries_of(LAYER), "int4")
    again = lay_out(dict(reversed(entries_of(LAYER).items())), "int4")
    assert layout.digest("a", "b") == again.digest("a", "b"), "the order of the tensors in the file is of no matter"
    first: Part = layout.parts[0]
    others = [
        layout.digest("a", "c"),
        layout.digest("ab"),
        lay_out(entries_of(LAYER), "int8").digest("a", "b"),
        lay_out(entries_of(LAYER | {"lm_head.weight": (449, 64)}), "int4").digest("a", "b"),
        replace(layout, parts=(replace(first, kind="plain"), *layout.parts[1:])).digest("a", "b"),
    ]
    assert len({layout.digest("a", "b"), *others}) == 6
