"""Taking in a Hugging Face directory: what is taken, what is refused, and that refusing changes nothing."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_helpers import contents_of, model_directory, noise, safetensors

from contracts.errors import BadInput, Busy, NoSpace, NotFound, Refused
from contracts.types import PIECE_SIZE
from node.storage.artifact import Progress, extract
from node.storage.directory import Description, inspect_directory
from node.storage.importer import import_model
from node.storage.safetensors_header import read_header
from node.storage.store import ShardStore

SHARD = 2 * PIECE_SIZE


def add(name: str, data: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    change.__name__ = f"add {name}"
    return change


def drop(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return change


class Bomb:
    """What a hostile pickle does when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("a-pickle-was-read",)


INDEX = "model.safetensors.index.json"
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(**weight_map: str) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (drop("config.json"), "no config.json"),
        (add("config.json", b"{"), "config.json is malformed"),
        (add("config.json", b"[]"), "config.json is malformed"),
        (add("config.json", b"[" * 100_000), "config.json is malformed"),
        (add("config.json", b"\xff"), "config.json is malformed"),
        (add("config.json", b"{}"), "names no architecture"),
        (add("config.json", b'{"architectures": [], "model_type": "x"}'), "names no architecture"),
        (add("config.json", b'{"architectures": ["X"]}'), "names no model_type"),
        (add("config.json", b" " * (5 << 20)), "more than"),
        (drop("tokenizer.json"), "no tokenizer"),
        (add("pytorch_model.bin", b"anything"), "is a pickle"),
        (add("consolidated.00.pth", b"anything"), "is a pickle"),
        (add("weights", pickle.dumps(Bomb())), "is a pickle"),
        (add("model", b"PK\x03\x04" + bytes(26) + b"archive/data.pkl"), "is a pickle"),
        (link("tokenizer.json", "/etc/passwd"), "symbolic link"),
        (link("config.json", "tokenizer.json"), "symbolic link"),
        (link("other", "/nowhere"), "symbolic link"),
        (lambda root: os.mkfifo(root / "pipe"), "neither a file nor a directory"),
        (lambda root: (root / "README.md").mkdir(), "no regular file"),
        (drop(WEIGHTS[1]), "1 of 2 weight files are missing"),
        (drop(INDEX), "2 safetensors files and no"),
        (add("model.safetensors", b"x"), "two sets of weights"),
        (add(INDEX, b"{}"), "malformed"),
        (add(INDEX, index()), "names no weights"),
        (add(INDEX, index(w0="../secret.safetensors")), "only \\*.safetensors beside it"),
        (add(INDEX, index(w0="pytorch_model.bin")), "only \\*.safetensors beside it"),
        (add(INDEX, index(w0=WEIGHTS[0], w1=WEIGHTS[0])), "not where it says"),
        (add(INDEX, index(w0=WEIGHTS[0], w2=WEIGHTS[1])), "not where it says"),
        (add(WEIGHTS[0], b""), "too few for a header"),
        (add(WEIGHTS[0], safetensors({"w0": bytes(10)})[:-1]), "truncated"),
    ],
)
def test_what_is_no_model_is_refused_and_nothing_changes(
    change: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    source = model_directory(tmp_path / "model", (100, 200))
    change(source)
    store = ShardStore(tmp_path / "store")
    before = sorted(os.listdir(source))
    with pytest.raises(BadInput, match=why) as caught:
        import_model(source, store, SHARD, move=True)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(source)) == before
    assert contents_of(store.root) == {}
    assert not Path("a-pickle-was-read").exists()


def test_a_lone_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    for name, data, why in (
        ("notes.txt", b"hello", "is no model"),
        ("empty", b"", "is no model"),
        ("model.safetensors", safetensors({"w": b"1"}), "is no model"),
        ("model.pt", b"x", "is a pickle"),
        ("model", pickle.dumps(Bomb()), "is a pickle"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=why):
            import_model(tmp_path / name, store, SHARD)
    with pytest.raises(NotFound, match="does not exist"):
        import_model(tmp_path / "nothing", store, SHARD)
    with pytest.raises(BadInput, match="shard size"):
        import_model(tmp_path / "notes.txt", store, 5)
    assert contents_of(store.root) == {}


def test_only_the_model_s_own_files_are_taken(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (3 * PIECE_SIZE,))
    for name in ("generation_config.json", "LICENSE", "README.md", "chat_template.jinja", "vocab.json"):
        (source / name).write_text(name)
    for name in ("modeling_evil.py", ".gitattributes", "consolidated.safetensors", "picture.png", "onnx/model.onnx"):
        add(name, b"other")(source)
    store = ShardStore(tmp_path / "store")
    imported = import_model(source, store, SHARD, move=True)
    paths = [file.path for file in imported.manifest.files]
    assert paths == [
        "model.safetensors",
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "vocab.json",
    ]
    assert imported.skipped == (".gitattributes", "consolidated.safetensors", "modeling_evil.py", "onnx", "picture.png")
    # A move takes what it took, and nothing else.
    assert sorted(os.listdir(source)) == sorted(imported.skipped)
    assert imported.description == Description("LlamaForCausalLM", "llama", 3 * PIECE_SIZE, "U8", 128)
    assert store.manifests() == [imported.manifest_hash]


def test_importing_again_changes_nothing(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (3 * PIECE_SIZE, 500))
    store = ShardStore(tmp_path / "store", disk_budget_bytes=5 * PIECE_SIZE)
    first = import_model(source, store, SHARD)
    assert not first.already
    before = {path: path.stat().st_ino for path in store.root.rglob("*") if path.is_file()}
    again = import_model(source, store, SHARD)
    assert again.already
    assert (again.manifest, again.manifest_hash, again.description) == (
        first.manifest,
        first.manifest_hash,
        first.description,
    )
    assert {path: path.stat().st_ino for path in store.root.rglob("*") if path.is_file()} == before
    # Another shard size is another artifact on the ledger.
    with pytest.raises(NoSpace, match="disk budget"):
        import_model(source, store, PIECE_SIZE)


def test_importing_again_repairs_what_is_damaged(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (5 * PIECE_SIZE,))
    store = ShardStore(tmp_path / "store")
    first = import_model(source, store, SHARD)
    damaged, lost, _ = first.manifest.shard_hashes
    with open(store.path(damaged), "r+b") as file:
        file.write(b"????????????????????")
    store.remove(lost)
    again = import_model(source, store, SHARD)
    assert (again.already, again.manifest) == (False, first.manifest)
    for shard in first.manifest.shards:
        assert store.verify(shard.sha256, shard.pieces) == []


def test_a_manifest_whose_piece_hashes_are_false_is_not_taken_for_the_model(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (5 * PIECE_SIZE,))
    true = import_model(source, ShardStore(tmp_path / "other"), SHARD).manifest
    shards = tuple(msgspec.structs.replace(shard, pieces=bytes(len(shard.pieces))) for shard in true.shards)
    false = msgspec.structs.replace(true, shards=shards)
    store = ShardStore(tmp_path / "store")
    store.put_manifest(false.encode(), false.manifest_hash())
    assert import_model(source, store, SHARD).manifest == true
    again = import_model(source, store, SHARD)
    assert (again.already, again.manifest) == (True, true)


def test_a_move_of_a_known_model_deletes_only_after_checking(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (5 * PIECE_SIZE,))
    original = contents_of(source)
    store = ShardStore(tmp_path / "store")
    first = import_model(source, store, SHARD)
    with open(store.path(first.manifest.shard_hashes[0]), "r+b") as file:
        file.write(b"????????????????????")
    import_model(source, store, SHARD, move=True)
    assert contents_of(source) == {}
    extract(first.manifest, store, tmp_path / "out")
    assert contents_of(tmp_path / "out") == original
    assert import_model(tmp_path / "out", store, SHARD, move=True).already
    assert contents_of(tmp_path / "out") == {}


def test_one_changed_byte_is_another_model(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    first = import_model(model_directory(tmp_path / "one", (5 * PIECE_SIZE,), seed=1), store, SHARD)
    second = import_model(model_directory(tmp_path / "two", (5 * PIECE_SIZE,), seed=2), store, SHARD)
    assert not second.already
    assert first.manifest_hash != second.manifest_hash


def test_a_failing_import_takes_only_its_own_shards_back(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    import_model(model_directory(tmp_path / "one", (2 * PIECE_SIZE, 3 * PIECE_SIZE), seed=1), store, SHARD)
    before = contents_of(store.root)

    def stop(progress: Progress) -> None:
        if progress.stage == "cutting" and progress.done_bytes == progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(model_directory(tmp_path / "two", (2 * PIECE_SIZE, 9), seed=1), store, SHARD, stop)
    assert contents_of(store.root) == before


def test_a_damaged_manifest_of_another_model_does_not_stand_in_the_way(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    (store.root / "manifests" / ("0" * 64)).write_bytes(b"junk")
    assert not import_model(model_directory(tmp_path / "one"), store, SHARD).already


def test_an_index_decides_which_weights_are_taken(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (100, 200))
    (source / "extra.safetensors").write_bytes(safetensors({"w9": b"123"}))
    found = inspect_directory(source)
    assert found.paths == (*WEIGHTS, "config.json", INDEX, "tokenizer.json")
    assert found.skipped == ("extra.safetensors",)
    assert found.description.parameters == 300


# --- safetensors headers


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "claims"),
        ((3).to_bytes(8, "little") + b"{}", "claims"),
        ((2).to_bytes(8, "little") + b"[]", "not JSON"),
        ((2).to_bytes(8, "little") + b"{}", "0 tensors"),
        ((2).to_bytes(8, "little") + b"{]", "malformed"),
        ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "malformed"),
        (safetensors({"a": b"1234"}, dtype="PICKLE"), "unknown type"),
        (safetensors({"a": b"1234"}, dtype=7), "malformed"),
        (safetensors({"a": b"1234"}, shape=[5]), "shape and type say otherwise"),
        (safetensors({"a": b"1234"}, shape=[-2, -2]), "impossible shape"),
        (safetensors({"a": b"1234"}, shape=[1 << 60]), "impossible shape"),
        (safetensors({"a": b"1234"}, shape=[1] * 17 + [4]), "impossible shape"),
        (safetensors({"a": b"1234"}, shape=[2.5]), "malformed"),
        (safetensors({"a": b"1234"}, data_offsets=[0, 5], shape=[5]), "truncated"),
        (safetensors({"a": b"1234"}, data_offsets=[-4, 0]), "begins at byte -4|shape and type"),
        (safetensors({"a": b"1234"}, data_offsets=[4, 0]), "say otherwise"),
        (safetensors({"a": b"1234"}, data_offsets=[1, 5]), "begins at byte 1"),
        (safetensors({"a": b"1234", "b": b"5678"}, data_offsets=[4, 8]), "begins at byte"),
        (safetensors({"a": b"1234"}, code="x"), "malformed"),
        (safetensors({"a": b"1234"}) + b"x", "the file at 5"),
        (safetensors({"a": b"1234"})[:-1], "truncated"),
    ],
)
def test_a_wrong_header_is_refused(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=why) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


GOOD = safetensors({"a": noise(40, 1), "b": noise(60, 2)})


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.integers(0, 20))
def test_a_header_from_a_stranger_raises_nothing_else(position: int, change: int, cut_off: int) -> None:
    data = bytearray(GOOD)
    data[position] ^= change
    with NamedTemporaryFile() as file:
        file.write(data[: len(data) - cut_off])
        file.flush()
        try:
            header = read_header(Path(file.name))
        except Refused:
            return
    ends = sorted(tensor.data_offsets for tensor in header.tensors.values())
    assert ends[-1][1] + header.data_start == len(GOOD) - cut_off


def test_a_real_safetensors_file_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "s": torch.tensor(1.0), "e": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("BF16", (3, 5)),
        "s": ("F32", ()),
        "e": ("F32", (0, 4)),
    }


def test_imports_into_one_store_take_turns(tmp_path: Path) -> None:
    """One that fails takes back the shards it made; another must not count on them meanwhile."""
    store = ShardStore(tmp_path / "store")
    with store.importing(), pytest.raises(Busy, match="another process is importing"):
        import_model(tmp_path, store, PIECE_SIZE)
    with store.importing():
        pass
