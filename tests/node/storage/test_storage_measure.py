"""Hashing a model directory where it lies: the manifest is an import's, and nothing else than the registered passes."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from storage_helpers import BOUNDARIES, contents_of, manifest_of, memory_sources, model_directory, noise

from contracts.errors import BadInput
from contracts.types import PIECE_SIZE
from node.storage import measure
from node.storage.artifact import Progress
from node.storage.hashing import BLOCK_SIZE
from node.storage.importer import import_model
from node.storage.manifest import Manifest
from node.storage.store import ShardStore

SHARD = 2 * PIECE_SIZE
WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return model_directory(tmp_path / "model", (3 * PIECE_SIZE, 2 * PIECE_SIZE + 5))


def registered(root: Path) -> Manifest:
    return import_model(root, ShardStore(root.parent / "store"), SHARD).manifest


def check(root: Path, manifest: Manifest) -> Manifest:
    return measure.check_directory(
        root, manifest.total_size, manifest.shard_size, manifest.shard_hashes, manifest.manifest_hash()
    )


@pytest.mark.parametrize("size", [size for size in BOUNDARIES if size])
@pytest.mark.parametrize("shard_size", [PIECE_SIZE, SHARD])
def test_manifest_is_the_one_of_cutting(size: int, shard_size: int) -> None:
    contents = [b"", noise(size, 1), b"", noise(7, 2), b""]
    seen: dict[int, bytes] = {}
    found = measure.measure(memory_sources(contents), shard_size, seen.__setitem__)
    expected, _ = manifest_of(contents, shard_size)
    assert found == expected
    assert list(seen.values()) == list(expected.shard_hashes)
    assert list(seen) == list(range(len(expected.shards)))


def test_imported_directory_passes_and_stays_as_it_is(root: Path) -> None:
    manifest, before = registered(root), contents_of(root)
    assert check(root, manifest) == manifest
    assert contents_of(root) == before


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("name", "change", "shard"),
    [
        (WEIGHTS[0], flip(1000), 0),
        (WEIGHTS[0], flip(3 * PIECE_SIZE), 1),
        (WEIGHTS[1], flip(2 * PIECE_SIZE), 2),
        ("config.json", lambda data: data.replace(b"128", b"129"), 2),
    ],
)
def test_one_changed_byte_is_found_and_placed(
    root: Path, name: str, change: Callable[[bytes], bytes], shard: int
) -> None:
    manifest, data = registered(root), (root / name).read_bytes()
    (root / name).write_bytes(change(data))
    with pytest.raises(BadInput, match=f"shard {shard} of .* a byte differs in .*{name}"):
        check(root, manifest)


def test_hashing_ends_with_the_first_wrong_shard(root: Path) -> None:
    manifest = registered(root)
    wrong = (manifest.shard_hashes[0], bytes(32), *manifest.shard_hashes[2:])
    seen: list[Progress] = []
    with pytest.raises(BadInput, match="shard 1 of"):
        measure.check_directory(
            root, manifest.total_size, SHARD, wrong, manifest.manifest_hash(), on_progress=seen.append
        )
    assert seen[-1].done_bytes == 2 * SHARD < manifest.total_size


def move_a_border(root: Path) -> None:
    """The same stream: the last byte of README.md becomes the first one of config.json."""
    first, second = root / "README.md", root / "config.json"
    second.write_bytes(first.read_bytes()[-1:] + second.read_bytes())
    first.write_bytes(first.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda root: (root / "LICENSE").write_text("x"), "were added"),
        (lambda root: (root / "README.md").unlink(), "are missing"),
        (lambda root: (root / "README.md").rename(root / "LICENSE"), "files have other names"),
        (move_a_border, "begin and end elsewhere"),
        (lambda root: (root / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda root: (root / WEIGHTS[1]).unlink(), "weight files are missing"),
    ],
)
def test_other_files_than_those_registered(root: Path, change: Callable[[Path], None], why: str) -> None:
    (root / "README.md").write_text("   ")
    manifest = registered(root)
    change(root)
    with pytest.raises(BadInput, match=why) as caught:
        check(root, manifest)
    assert len(str(caught.value).splitlines()) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    root = model_directory(tmp_path / "model", (3 * BLOCK_SIZE,))
    size = (root / "model.safetensors").stat().st_size
    manifest = import_model(root, ShardStore(tmp_path / "store"), 32 * PIECE_SIZE).manifest
    tracemalloc.start()
    try:
        check(root, manifest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * BLOCK_SIZE + 2 * PIECE_SIZE < size
