"""Building a model over the mapping: the same logits as transformers' own loader, and clear refusals."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from contracts.errors import BadInput, Refused
from node.inference.files import ArtifactFiles
from node.inference.loading import MappedModel
from node.inference.mapping import ShardMapping
from node.inference.memory import KeyValues
from node.inference.weights import BuiltModel, build

from . import tiny
from .alone import stepped

TOKENS = torch.tensor([[5, 300, 17, 42, 99, 7, 260, 301, 8, 11, 400] * 4])


def built(directory: Path, shards: Path, shard_size: int = 16384) -> tuple[BuiltModel, ShardMapping]:
    spec = tiny.cut(directory, shards, shard_size)
    mapping = ShardMapping([Path(path) for path in spec.shards], spec.shard_size, spec.total_size)
    return build(spec.key, ArtifactFiles(spec, mapping), mapping), mapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_equal_transformers_own_loader(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    directory = tiny.save(tmp_path / "model", name, dtype)
    ours, mapping = built(directory, tmp_path / "shards")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    assert ours.precision == dtype == theirs.dtype
    assert ours.private_bytes == mapping.private_bytes == 0
    with torch.inference_mode():
        assert torch.equal(ours.model(TOKENS).logits, theirs(TOKENS).logits)


def test_weights_that_are_not_aligned_are_copied_and_counted(tmp_path: Path) -> None:
    directory = tiny.save(tmp_path / "model", "llama")
    before = sum(path.stat().st_size for path in directory.iterdir() if path.name < "model.safetensors")
    with (directory / "config.json").open("ab") as config:
        config.write(b" " * (5 - before % 4))
    spec = tiny.cut(directory, tmp_path / "shards", 16384, aligned=False)
    model = MappedModel(spec)
    assert model.about.private_bytes == model.about.parameters * 4
    decoder = model.runnable.decoder
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        logits = stepped(decoder, 5, KeyValues(decoder.shape, 1))
        torch.testing.assert_close(logits, theirs(torch.tensor([[5]])).logits[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tmp_path: Path, tied: bool) -> None:
    directory = tiny.save(tmp_path / "model", "llama", tie_word_embeddings=tied)
    ours, _ = built(directory, tmp_path / "shards")
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        assert torch.equal(ours.model(TOKENS).logits, theirs(TOKENS).logits)
    assert (ours.model.lm_head.weight is ours.model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 500000.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_kinds(tmp_path: Path, rope: dict[str, object]) -> None:
    directory = tiny.save(tmp_path / "model", "llama", rope_parameters=rope)
    ours, _ = built(directory, tmp_path / "shards")
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        assert torch.equal(ours.model(TOKENS).logits, theirs(TOKENS).logits)


def test_several_weight_files_with_an_index(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny.llama(torch.float32).save_pretrained(directory, max_shard_size="200KB")
    tiny.train_tokenizer().save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) > 1
    ours, _ = built(directory, tmp_path / "shards")
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        assert torch.equal(ours.model(TOKENS).logits, theirs(TOKENS).logits)


def test_a_tensor_in_another_precision_is_converted_and_counted(tmp_path: Path) -> None:
    directory = tiny.save(tmp_path / "model", "llama", torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    ours, _ = built(directory, tmp_path / "shards")
    assert ours.precision == torch.bfloat16
    assert ours.private_bytes == 64 * 2


def test_unloading_gives_every_byte_back(tmp_path: Path) -> None:
    spec = tiny.cut(tiny.save(tmp_path / "model", "llama"), tmp_path / "shards", 16384)
    model = MappedModel(spec)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert model.about.mapped_bytes == spec.total_size
    assert model.close() == 0
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


# What is refused. Each case changes a good directory; the message says what is wrong, and nothing stays mapped.


def _config(**changes: object):
    return lambda directory: tiny.edit_json(directory / "config.json", **changes)


def _weights(change):
    def apply(directory: Path) -> None:
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})

    return apply


def _bytes(name: str, change):
    def apply(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return apply


NORM = "model.norm.weight"
REFUSALS = {
    "custom code": (_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}), "auto_map"),
    "custom tokenizer": (
        lambda directory: tiny.edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T"]}),
        "auto_map",
    ),
    "unknown architecture": (_config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "two architectures": (_config(architectures=["LlamaForCausalLM"] * 2), "one architecture"),
    "no architecture": (_config(architectures=None), "one architecture"),
    "another model type": (_config(model_type="gpt2"), "model_type"),
    "quantised": (_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "a billion layers": (_config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "layers as text": (_config(num_hidden_layers="3"), "num_hidden_layers"),
    "negative size": (_config(hidden_size=-64), "hidden_size"),
    "heads that do not divide": (_config(num_attention_heads=7), "LlamaForCausalLM|shape"),
    "unknown activation": (_config(hidden_act="os.system"), "LlamaForCausalLM"),
    "odd rotary": (_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope|LlamaForCausalLM"),
    "more layers than weights": (_config(num_hidden_layers=4), "lacks 9 tensors, model.layers.3"),
    "fewer layers than weights": (_config(num_hidden_layers=2), "9 tensors its config.json knows nothing of"),
    "another vocabulary": (_config(vocab_size=512), r"is \[448, 64\] instead of \[512, 64\]"),
    "a vocabulary below the tokenizer": (_config(vocab_size=300), r"instead of \[300, 64\]"),
    "missing tensor": (_weights(lambda weights: weights.pop(NORM)), "lacks 1 tensors, model.norm.weight"),
    "extra tensor": (_weights(lambda weights: weights.update(extra=torch.ones(1))), "extra"),
    "wrong shape": (_weights(lambda weights: weights.update({NORM: torch.ones(65)})), r"\[65\] instead of \[64\]"),
    "integers": (_weights(lambda weights: weights.update({NORM: torch.ones(64, dtype=torch.int8)})), "is I8"),
    "truncated weights": (_bytes("model.safetensors", lambda content: content[:-7]), "truncated"),
    "empty weights": (_bytes("model.safetensors", lambda content: b""), "0 bytes"),
    "hostile header": (_bytes("model.safetensors", lambda content: b"\xff" * 8 + content[8:]), "truncated"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "no safetensors file"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "no config.json"),
    "config is a list": (_bytes("config.json", lambda content: b"[]"), "no JSON object"),
    "config nests": (_bytes("config.json", lambda content: b'{"a":' + b"[" * 100_000), "no JSON object"),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), "no tokenizer.json"),
    "broken tokenizer": (_bytes("tokenizer.json", lambda content: content[:-100]), "tokenizer of tiny@1"),
    "end token outside": (
        lambda directory: tiny.edit_json(directory / "generation_config.json", eos_token_id=[1, 4480]),
        "end token 4480",
    ),
    "an index that lies": (
        lambda directory: (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc"}}'),
        "lacks its weights",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("good"), "llama")


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_artifact_is_refused(tmp_path: Path, good: Path, case: str) -> None:
    change, line = REFUSALS[case]
    directory = tmp_path / "model"
    shutil.copytree(good, directory)
    change(directory)
    with pytest.raises(Refused, match=line) as refused:
        MappedModel(tiny.cut(directory, tmp_path / "shards", 16384))
    assert isinstance(refused.value, BadInput)
    del refused
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "something stayed mapped"


def test_a_spec_that_contradicts_itself_is_refused(tmp_path: Path, good: Path) -> None:
    import msgspec

    spec = tiny.cut(good, tmp_path / "shards", 16384)
    for change, line in (
        ({"total_size": spec.total_size + 1}, "total_size"),
        ({"shards": spec.shards[:-1]}, "shards of 16384"),
        ({"files": ()}, "0 files"),
        ({"files": (*spec.files[:-1], spec.files[0])}, "twice"),
        ({"shard_size": 0}, "size"),
    ):
        with pytest.raises(BadInput, match=line):
            MappedModel(msgspec.structs.replace(spec, **change))
