"""A GGUF file becomes an ordinary Hugging Face directory, value for value what transformers makes of it."""

import json
import os
import struct
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import tiny_gguf
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import contents_of
from tiny_gguf import write_tiny_gguf

from contracts.errors import BadInput, NoSpace, Refused
from contracts.types import PIECE_SIZE
from node.storage import gguf_header, importer
from node.storage.artifact import Progress, ProgressCallback, extract
from node.storage.convert import convert
from node.storage.directory import inspect_directory
from node.storage.gguf_header import read_gguf_header
from node.storage.gguf_llama import plan_llama
from node.storage.importer import import_model
from node.storage.store import ShardStore

SHARD = PIECE_SIZE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_gguf_file_is_taken_in_once(tiny: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    before = tiny.read_bytes()
    stages: list[str] = []
    first = import_model(tiny, store, SHARD, lambda progress: stages.append(progress.stage), move=True)
    assert {"checking", "converting", "cutting"} == set(stages)
    assert tiny.read_bytes() == before, "a GGUF file is never deleted: its bytes are not in the artifact"
    assert os.listdir(store.root / "scratch") == []
    assert first.architecture == "LlamaForCausalLM"
    assert (first.description.dtype, first.description.context_length) == ("BF16", tiny_gguf.CONTEXT)
    paths = [file.path for file in first.manifest.files]
    assert paths[0] == "model.safetensors"
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(paths)

    stages.clear()
    again = import_model(tiny, store, SHARD, lambda progress: stages.append(progress.stage))
    assert again.already
    assert "converting" not in stages
    assert (again.manifest_hash, again.description) == (first.manifest_hash, first.description)

    extract(first.manifest, store, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5


def test_a_damaged_conversion_is_made_again_to_the_same_bytes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    def run_here(path: Path, scratch: Path, on_progress: ProgressCallback) -> None:
        convert(path, scratch / "model", lambda done, total: on_progress(Progress("converting", done, total)))

    monkeypatch.setattr(importer, "_run_converter", run_here)
    store = ShardStore(tmp_path)
    first = import_model(tiny, store, SHARD)
    with open(store.path(first.manifest.shard_hashes[0]), "r+b") as file:
        file.write(b"????????????????")
    again = import_model(tiny, store, SHARD)
    assert (again.already, again.manifest) == (False, first.manifest)
    assert store.verify(first.manifest.shards[0].sha256, first.manifest.shards[0].pieces) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
def test_the_conversion_is_what_transformers_makes_of_it(tied: bool, tmp_path: Path, offline: None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path, tied)
    target = tmp_path / "out"
    target.mkdir()
    progress: list[tuple[int, int]] = []
    # Files so small that there are several of them, with their index.
    convert(path, target, lambda done, total: progress.append((done, total)), file_size=100_000)
    assert progress[-1][0] == progress[-1][1]
    assert len(list(target.glob("*.safetensors"))) > 1
    assert inspect_directory(target).skipped == ()

    ours = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert (ours.generation_config.bos_token_id, ours.generation_config.eos_token_id) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}], tokenize=False)
    assert text == "<|im_start|>user\nhello world<|im_end|>\n"
    numbers = tokenizer(text)["input_ids"]
    assert tokenizer.decode(numbers) == text
    assert [number for number in numbers if number < 3] == [1, 2]
    assert tiny_gguf.TOKENS.index("hello") in numbers
    assert tokenizer.model_max_length == tiny_gguf.CONTEXT


def test_files_beside_the_gguf_have_no_say(tmp_path: Path, offline: None) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    hostile = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "chat_template": "evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(hostile))
    (tmp_path / "evil.py").write_text("raise SystemExit('code beside the model was run')")
    target = tmp_path / "out"
    target.mkdir()
    convert(tmp_path / "tiny.gguf", target, lambda done, total: None)
    assert (target / "chat_template.jinja").read_text() == tiny_gguf.TEMPLATE


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"without": "blk.1.ffn_up.weight"}, "has no tensor blk.1.ffn_up.weight"),
        ({"without": "token_embd.weight"}, "has no tensor token_embd.weight"),
        ({"extra": "blk.0.attn_q.bias"}, "a plain Llama model has not"),
        ({"extra": "rope_freqs.weight"}, "a plain Llama model has not"),
        ({"reshape": "blk.0.attn_k.weight"}, "shape"),
        ({"split": 2}, "one part of a split"),
        ({"eot": 100_000}, "outside the vocabulary"),
    ],
)
def test_a_model_that_would_not_come_out_whole_is_refused(changes: dict[str, object], why: str, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", **changes)
    store = ShardStore(tmp_path / "store")
    with pytest.raises(BadInput, match=why) as caught:
        import_model(tmp_path / "tiny.gguf", store, SHARD)
    assert "\n" not in str(caught.value)
    assert contents_of(store.root) == {}


def test_the_end_of_a_turn_ends_the_generation(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", eot=0)
    plan = plan_llama(read_gguf_header(tmp_path / "tiny.gguf"), "tiny")
    assert plan.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}


def test_no_room_for_the_conversion_is_said_beforehand(tiny: Path, tmp_path: Path) -> None:
    store = ShardStore(tmp_path, disk_budget_bytes=1000)
    stages: list[Progress] = []
    with pytest.raises(NoSpace, match="disk budget"):
        import_model(tiny, store, SHARD, stages.append)
    assert {progress.stage for progress in stages} == {"checking"}
    assert contents_of(tmp_path) == {}


def test_a_converter_that_dies_is_a_refusal(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path / "store")
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(BadInput, match="converter failed with status 1"):
        import_model(tiny, store, SHARD)

    def stop(progress: Progress) -> None:
        if progress.stage == "converting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(tiny, store, SHARD, stop)
    assert contents_of(store.root) == {}


# --- headers of strangers


def test_the_block_sizes_are_those_of_the_format() -> None:
    for number, size in gguf_header._BLOCKS.items():
        assert GGML_QUANT_SIZES[number] == size


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(tensors: int = 1, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def tensor(shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return string("t") + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GGUF", "no GGUF"),
        (b"GGML" + bytes(40), "no GGUF"),
        (header(version=1, rest=bytes(50)), "version 1"),
        (header(version=0x03000000, rest=bytes(50)), "little endian"),
        (header(tensors=0, rest=bytes(50)), "claims 0 tensors"),
        (header(tensors=1 << 60, rest=bytes(50)), "claims"),
        (header(keys=1 << 60, rest=bytes(50)), "claims"),
        (header(keys=1, rest=struct.pack("<Q", 1 << 62)), "string of"),
        (header(keys=1, rest=struct.pack("<Q", 100) + b"short"), "runs over the end"),
        (header(keys=1, rest=struct.pack("<Q", 2) + b"\xff\xff" + bytes(20)), "not UTF-8"),
        (header(keys=1, rest=string("k") + struct.pack("<I", 99) + bytes(20)), "unknown type 99"),
        (header(keys=1, rest=string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20)), "array of"),
        (header(keys=1, rest=string("k") + struct.pack("<IIQ", 9, 0, 1 << 40) + bytes(20)), "array of"),
        (header(keys=1, rest=string("k") + struct.pack("<IIQ", 9, 4, 1 << 20) + bytes(20)), "runs over"),
        (header(keys=2, rest=(string("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(20)), "appears twice"),
        (header(rest=tensor((1,) * 5) + bytes(99)), "5 dimensions"),
        (header(rest=tensor(()) + bytes(99)), "0 dimensions"),
        (header(rest=tensor((0,)) + bytes(99)), "impossible shape"),
        (header(rest=tensor((1 << 62, 1 << 62)) + bytes(99)), "impossible shape"),
        (header(rest=tensor((33,), kind=2) + bytes(99)), "impossible shape"),
        (header(rest=tensor((4,), kind=4) + bytes(99)), "type 4, which is not converted"),
        (header(rest=tensor((4,), offset=1) + bytes(99)), "outside the file"),
        (header(rest=tensor((4,), offset=1 << 63) + bytes(99)), "outside the file"),
        (header(rest=tensor((400,)) + bytes(99)), "outside the file"),
        (header(tensors=2, rest=tensor() * 2 + bytes(199)), "appears twice"),
        (
            header(keys=1, rest=string("general.alignment") + struct.pack("<II", 4, 3) + tensor() + bytes(99)),
            "alignment 3",
        ),
    ],
)
def test_a_wrong_gguf_header_is_refused(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=why) as caught:
        read_gguf_header(path)
    assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_gguf_from_a_stranger_raises_nothing_else(tiny: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny.read_bytes())
    for position in data.draw(st.lists(st.integers(4, 7000), max_size=4)):
        raw[position] = data.draw(st.integers(0, 255))
    with NamedTemporaryFile() as file:
        file.write(raw[: data.draw(st.sampled_from([len(raw), 5000, 200, 24, 10]))])
        file.flush()
        try:
            plan_llama(read_gguf_header(Path(file.name)), "stranger")
        except Refused:
            return
