"""The file of quantised weights: the models that are mapped from it, what is made anew, and what making it takes."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.errors import BadInput, NoSpace
from node.inference import quantising
from node.inference.loading import MappedModel, measured, prepared
from node.inference.memory import KeyValues
from node.inference.precision import QUANTISED, Precision
from node.inference.quantised import HEADER, HEADER_BYTES
from node.inference.spec import ModelSpec

from . import tiny
from .alone import fed, stepped
from .quantised import MANIFEST, SIZES, load, multiplied_with, placed, prepare, rounded

PROMPT = [5, 300, 17, 42, 99, 7, 260, 301, 8, 11, 400] * 4


def model_of(root: Path, name: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> tuple[Path, ModelSpec]:
    directory = tiny.save(root / "model", name, dtype, **{**SIZES[name], **changes})
    return directory, placed(tiny.cut(directory, root / "shards", 1 << 20), root / "quantised")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return model_of(tmp_path, "llama")[1]


def file_of(spec: ModelSpec, precision: str) -> Path:
    assert spec.quantised is not None
    return Path(f"{spec.quantised.stem}.{precision}")


def reference(directory: Path, spec: ModelSpec, precision: str) -> torch.nn.Module:
    """transformers in fp32, each matrix replaced by what its quantised form stands for."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    coarse = ("gate_proj", "up_proj", "fc_in") if precision == "int4" else ()
    state = {
        name: rounded(tensor, "int4" if name.split(".")[-2] in coarse else "int8") if tensor.dim() == 2 else tensor
        for name, tensor in load_file(directory / "model.safetensors").items()
        if "causal_mask" not in name
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


@pytest.fixture
def only_weights_are_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without instructions for products of int8: what those round beside has a test of its own."""
    monkeypatch.setattr("node.inference.matrices.multiplies_int8", lambda: False)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_are_those_of_the_rounded_weights(
    tmp_path: Path, name: str, precision: Precision, dtype: torch.dtype, only_weights_are_int8: None
) -> None:
    directory, spec = model_of(tmp_path, name, dtype)
    model = load(spec, precision)
    assert model.about.precision == precision
    assert model.about.parameters == sum(tensor.numel() for tensor in reference(directory, spec, "int8").parameters())
    decoder, memory = model.runnable.decoder, KeyValues(model.runnable.decoder.shape, len(PROMPT))
    rounded_model = reference(directory, spec, precision)
    exact = rounded_model(torch.tensor([PROMPT])).logits[0]
    # What products in bf16 alone cost transformers, with the same weights.
    theirs = rounded_model.to(torch.bfloat16)(torch.tensor([PROMPT])).logits[0].float()
    bound = 1.1 * (theirs - exact)[1:].abs().mean()
    logits = torch.stack([stepped(decoder, token, memory) for token in PROMPT])
    assert (logits - exact)[1:].abs().mean() <= bound
    for count in (len(PROMPT), 10):
        prefilled = fed(decoder, PROMPT[:count], KeyValues(decoder.shape, len(PROMPT)))
        assert (prefilled - exact[count - 1]).abs().mean() <= bound, count


def rounding_error(model: torch.nn.Module, exact: torch.Tensor) -> torch.Tensor:
    """What it costs transformers, with the same weights, that what they are multiplied with is in int8, and that all is
    in bf16: both, for some products are so and some so."""
    logits = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: multiplied_with(inputs[0][0], "int8", True, True)[None])
    logits.append(model(torch.tensor([PROMPT])).logits[0])
    for module in model.modules():
        module._forward_pre_hooks.clear()
    logits.append(model.to(torch.bfloat16)(torch.tensor([PROMPT])).logits[0].float())
    return torch.stack([(one - exact)[1:].abs().mean() for one in logits]).norm()


@torch.inference_mode()
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_prompts_are_rounded_no_more_than_int8_rounds_them(tmp_path: Path, name: str, precision: Precision) -> None:
    directory, spec = model_of(tmp_path, name)
    decoder = load(spec, precision).runnable.decoder
    rounded_model = reference(directory, spec, precision)
    exact = rounded_model(torch.tensor([PROMPT])).logits[0]
    prefilled = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)))
    assert (prefilled - exact[-1]).abs().mean() <= 1.1 * rounding_error(rounded_model, exact)


BOUNDS = {"int8": 0.04, "int4": 0.2}
"""Of the mean difference to the logits in fp32, as a share of their spread: random weights are the worst to round."""


@torch.inference_mode()
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_are_near_those_in_fp32(tmp_path: Path, name: str, precision: Precision) -> None:
    directory, spec = model_of(tmp_path, name, torch.float32)
    exact = AutoModelForCausalLM.from_pretrained(directory).eval()(torch.tensor([PROMPT])).logits[0]
    decoder = load(spec, precision).runnable.decoder
    memory = KeyValues(decoder.shape, len(PROMPT))
    logits = torch.stack([stepped(decoder, token, memory) for token in PROMPT])
    assert (logits - exact).abs().mean() <= BOUNDS[precision] * exact.std()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "codegen"])
@torch.inference_mode()
def test_tied_embeddings(tmp_path: Path, name: str, tied: bool) -> None:
    directory, spec = model_of(tmp_path, name, torch.float32, tie_word_embeddings=tied)
    exact = reference(directory, spec, "int8")(torch.tensor([PROMPT])).logits[0, -1]
    decoder = load(spec, "int8").runnable.decoder
    logits = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)))
    assert (logits - exact).abs().mean() <= 0.02 * exact.std()


@torch.inference_mode()
def test_biases_of_matrices_that_stand_together(tmp_path: Path, only_weights_are_int8: None) -> None:
    directory, spec = model_of(tmp_path, "llama", torch.float32, attention_bias=True, mlp_bias=True)
    weights = load_file(directory / "model.safetensors")
    assert any(name.endswith("q_proj.bias") for name in weights)
    exact = reference(directory, spec, "int4")(torch.tensor([PROMPT])).logits[0, -1]
    decoder = load(spec, "int4").runnable.decoder
    logits = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)))
    assert (logits - exact).abs().mean() <= 0.02 * exact.std()


@torch.inference_mode()
def test_shapes_that_no_kernel_takes_stay_as_they_are(tmp_path: Path) -> None:
    directory, spec = model_of(tmp_path, "llama", torch.bfloat16, hidden_size=72, num_attention_heads=4, head_dim=16)
    exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    # Only what goes from the 192 of the network and from the 64 of attention is in columns that torch takes.
    for name, module in exact.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.weight = torch.nn.Parameter(rounded(module.weight.detach(), "int8"))
    logits = exact(torch.tensor([PROMPT])).logits[0, -1]
    decoder = load(spec, "int4").runnable.decoder
    found = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)))
    assert (found - logits).abs().mean() <= 0.03 * logits.std()


def test_what_is_said_before_is_what_it_takes(spec: ModelSpec) -> None:
    sizes = measured(spec)
    for precision in QUANTISED:
        model = load(spec, precision)
        assert model.about.mapped_bytes == sizes[precision] == file_of(spec, precision).stat().st_size
        assert model.about.private_bytes == 0
        del model
    assert sizes["int4"] < sizes["int8"] < spec.total_size


def test_unloading_gives_every_byte_back_and_the_shards_are_not_held(spec: ModelSpec) -> None:
    model = load(spec, "int4")
    maps = Path("/proc/self/maps").read_text()
    assert str(file_of(spec, "int4")) in maps
    assert spec.shards[0] not in maps
    assert model.close() == 0
    assert str(file_of(spec, "int4")) not in Path("/proc/self/maps").read_text()


def test_it_is_made_once_and_the_same_again(spec: ModelSpec, tmp_path: Path) -> None:
    first = prepare(spec, "int4")
    assert {step.action for step in first} == {"quantising"}
    assert [step.done_bytes for step in first] == sorted(step.done_bytes for step in first)
    assert first[-1].done_bytes == first[-1].total_bytes
    content = file_of(spec, "int4").read_bytes()
    assert {step.action for step in prepare(spec, "int4")} == {"checking"}
    other = placed(spec, tmp_path / "other")
    prepare(other, "int4")
    assert file_of(other, "int4").read_bytes() == content


def test_threads_and_the_cut_of_the_shards_do_not_change_a_byte(tmp_path: Path) -> None:
    directory, spec = model_of(tmp_path, "mistral")
    prepare(spec, "int4")
    again = placed(tiny.cut(directory, tmp_path / "again", 4096 * 3), tmp_path / "second")
    torch.set_num_threads(2)
    try:
        prepare(again, "int4")
    finally:
        torch.set_num_threads(1)
    assert file_of(again, "int4").read_bytes() == file_of(spec, "int4").read_bytes()


def _flipped(offset: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[offset] ^= 1

    return change


DAMAGE: dict[str, Callable[[bytearray], None]] = {
    "the magic": _flipped(0),
    "the layout": _flipped(len(b"AIGENQ1\n")),
    "the checksum": _flipped(HEADER.size - 9),
    "the size": _flipped(HEADER.size - 1),
    "the first number": _flipped(HEADER_BYTES),
    "the last byte": _flipped(-1),
    "the end": lambda content: content.__delitem__(slice(-1, None)),
    "one byte more": lambda content: content.append(0),
    "nothing": lambda content: content.clear(),
    "the header alone": lambda content: content.__delitem__(slice(HEADER_BYTES, None)),
    "zeros after the header": lambda content: content.__setitem__(
        slice(HEADER_BYTES, None), bytes(len(content) - HEADER_BYTES)
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_made_anew(spec: ModelSpec, case: str, caplog: pytest.LogCaptureFixture) -> None:
    prepare(spec, "int4")
    path = file_of(spec, "int4")
    good = path.read_bytes()
    content = bytearray(good)
    DAMAGE[case](content)
    path.write_bytes(content)
    assert prepare(spec, "int4")[-1].action == "quantising"
    assert path.read_bytes() == good
    assert "is made anew" in caplog.text


def test_a_file_of_another_model_or_kind_of_cpu_is_made_anew(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(spec, "int4")
    good = file_of(spec, "int4").read_bytes()
    assert spec.quantised is not None
    stem = spec.quantised.stem.replace(MANIFEST, "cd" * 32)
    other = msgspec.structs.replace(spec, quantised=msgspec.structs.replace(spec.quantised, stem=stem))
    file_of(other, "int4").write_bytes(good)
    assert prepare(other, "int4")[-1].action == "quantising"
    another = next(one for one in quantising.PACKINGS if one != quantising.machine_packing())
    monkeypatch.setattr("node.inference.loading.machine_packing", lambda: another)
    assert prepare(spec, "int4")[-1].action == "quantising"
    assert file_of(spec, "int4").read_bytes() != good
    # int8 is the same everywhere: nobody asks.
    monkeypatch.delattr("node.inference.loading.machine_packing")
    assert load(spec, "int8").close() == 0


def test_a_link_in_its_place_is_replaced_and_not_followed(spec: ModelSpec, tmp_path: Path) -> None:
    prepare(spec, "int4")
    path, target = file_of(spec, "int4"), tmp_path / "elsewhere"
    path.rename(target)
    for end in (target, tmp_path / "nowhere"):
        path.unlink(missing_ok=True)
        path.symlink_to(end)
        assert prepare(spec, "int4")[-1].action == "quantising"
        assert not path.is_symlink()
        assert path.read_bytes() == target.read_bytes()


def test_one_precision_of_a_model_at_a_time(spec: ModelSpec) -> None:
    prepare(spec, "int8")
    prepare(spec, "int4")
    assert file_of(spec, "int4").exists()
    assert not file_of(spec, "int8").exists()


def test_too_little_room_is_refused_with_the_numbers(spec: ModelSpec, tmp_path: Path) -> None:
    need = measured(spec)["int8"]
    short = placed(spec, tmp_path / "quantised", need - 1)
    with pytest.raises(NoSpace, match=rf"{need:,} bytes.*{need - 1:,} bytes.*storage\.disk_budget"):
        prepare(short, "int8")
    assert list((tmp_path / "quantised").iterdir()) == []
    prepare(placed(spec, tmp_path / "quantised", need), "int8")
    # What is replaced makes room.
    prepare(placed(spec, tmp_path / "quantised", 0), "int4")


def test_without_a_place_it_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(BadInput, match="no place"):
        prepare(msgspec.structs.replace(spec, quantised=None), "int8")


def test_leaving_half_way_leaves_nothing(spec: ModelSpec, tmp_path: Path) -> None:
    steps = prepared(spec, "int8")
    next(steps)
    assert len(list((tmp_path / "quantised").iterdir())) == 1
    steps.close()
    assert list((tmp_path / "quantised").iterdir()) == []
    gc.collect()
    assert spec.shards[0] not in Path("/proc/self/maps").read_text()


def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    spec = model_of(tmp_path, "llama")[1]
    path = Path(spec.shards[0])
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    content[8 + header : 10 + header] = b"\x80\x7f"  # infinity in bf16
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not finite"):
        prepare(spec, "int8")
    assert list((tmp_path / "quantised").iterdir()) == []


KILLED = """
import sys, msgspec
from node.inference.loading import prepared
from node.inference.spec import ModelSpec

steps = prepared(msgspec.json.decode(sys.argv[1], type=ModelSpec), "int4")
for _ in range(int(sys.argv[2])):
    next(steps)
print("half way", flush=True)
sys.stdin.read()
"""


def test_killed_half_way_nothing_is_used_and_nothing_stays(spec: ModelSpec, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, msgspec.json.encode(spec).decode(), "10"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half way\n"
        os.kill(process.pid, signal.SIGKILL)
    (left,) = (tmp_path / "quantised").iterdir()
    assert left.name != file_of(spec, "int4").name
    assert left.stat().st_size > 0
    assert prepare(spec, "int4")[-1].action == "quantising"
    assert list((tmp_path / "quantised").iterdir()) == [file_of(spec, "int4")]
    load(spec, "int4")


MEASURED = """
import sys, msgspec, psutil, torch
from node.inference.loading import prepared
from node.inference.spec import ModelSpec

torch.set_num_threads(1)
own = psutil.Process()
spec = msgspec.json.decode(sys.argv[1], type=ModelSpec)
peak = before = 0
for number, step in enumerate(prepared(spec, "int4")):
    rss = own.memory_info().rss
    before = before or rss
    peak = max(peak, rss)
print(peak - before)
"""


def test_making_it_takes_little_memory(tmp_path: Path) -> None:
    """Much less than the result and two layers: whatever the model's size, some portions of half a million weights."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 4096}
    spec = model_of(tmp_path, "llama", torch.bfloat16, **sizes)[1]
    assert spec.total_size > 90_000_000
    command = [sys.executable, "-c", MEASURED, msgspec.json.encode(spec).decode()]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    layer = (4 * 512 * 512 + 3 * 512 * 2048) * 2
    assert grown < 2 * layer + (16 << 20), f"{grown} bytes"
    assert MappedModel(spec, "int4").close() == 0
