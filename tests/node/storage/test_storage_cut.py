"""Cutting and joining: the identity at every size, one pass, bounded memory, nothing half done."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import BOUNDARIES, MemorySource, contents_of, manifest_of, memory_sources, noise, stored

from contracts.errors import BadInput, Conflict, Corrupt
from contracts.types import PIECE_SIZE
from node.storage.artifact import FileSource, Progress, cut, extract, read_artifact_file, stream
from node.storage.store import ShardStore

SHARD = 2 * PIECE_SIZE


@given(
    st.lists(st.sampled_from(BOUNDARIES), min_size=1, max_size=4).filter(any),
    st.sampled_from([PIECE_SIZE, SHARD]),
    st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_cut_then_join_is_the_identity(sizes: list[int], shard_size: int, seed: int) -> None:
    contents = [noise(size, seed + index) for index, size in enumerate(sizes)]
    with TemporaryDirectory() as directory:
        store = ShardStore(Path(directory) / "store")
        manifest = cut(memory_sources(contents), store, shard_size)
        expected, blobs = manifest_of(contents, shard_size)
        assert manifest == expected
        assert [store.path(shard).read_bytes() for shard in manifest.shard_hashes] == blobs
        assert b"".join(bytes(block) for block in stream(manifest, store)) == b"".join(contents)
        extract(manifest, store, Path(directory) / "out")
        written = contents_of(Path(directory) / "out")
        assert written == {f"file-{index:04d}": data for index, data in enumerate(contents)}
        for index, data in enumerate(contents):
            assert read_artifact_file(manifest, store, f"file-{index:04d}", 1 << 30) == data


def test_progress_goes_up_to_the_total(tmp_path: Path) -> None:
    seen: list[Progress] = []
    contents = [noise(5 * PIECE_SIZE, 1)]
    cut(memory_sources(contents), ShardStore(tmp_path), SHARD, seen.append)
    done = [progress.done_bytes for progress in seen]
    assert done == sorted(done)
    assert seen[-1] == Progress("cutting", 5 * PIECE_SIZE, 5 * PIECE_SIZE)


def test_many_small_files_need_few_descriptors(tmp_path: Path) -> None:
    for index in range(1500):
        (tmp_path / f"f{index:05d}").write_bytes(b"" if index % 3 else b"x")
    sources = [FileSource(f"f{index:05d}", tmp_path / f"f{index:05d}") for index in range(1500)]
    manifest = cut(sources, ShardStore(tmp_path / "store"), SHARD)
    assert (manifest.total_size, len(manifest.files)) == (500, 1500)


def test_an_interruption_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    kept = stored(store, [noise(SHARD, 1)])
    before = contents_of(tmp_path)

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > 2 * SHARD:
            raise KeyboardInterrupt

    # Its first shard is held already, so it must survive the undoing.
    with pytest.raises(KeyboardInterrupt):
        cut(memory_sources([noise(SHARD, 1), noise(2 * SHARD, 2)]), store, SHARD, interrupt)
    assert contents_of(tmp_path) == before
    assert store.missing_shards(kept) == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(noise(3 * SHARD, 1))
    store = ShardStore(tmp_path / "store")
    before = contents_of(tmp_path / "store")

    def truncate(progress: Progress) -> None:
        os.truncate(file, SHARD)

    with pytest.raises(BadInput, match="changed while"):
        cut([FileSource("file", file)], store, SHARD, truncate)

    file.write_bytes(noise(3 * SHARD, 1))

    def overwrite(progress: Progress) -> None:
        with open(file, "r+b") as out:
            out.write(b"other")

    with pytest.raises(BadInput, match="changed while"):
        cut([FileSource("file", file)], store, SHARD, overwrite)
    assert contents_of(tmp_path / "store") == before


def test_the_shard_size_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    for shard_size in (0, -PIECE_SIZE, PIECE_SIZE + 1, 1 << 60):
        with pytest.raises(BadInput, match="shard size"):
            cut(memory_sources([b"x"]), store, shard_size)
    huge = MemorySource("file", b"")
    huge.size_bytes = 1025 * PIECE_SIZE
    with pytest.raises(BadInput, match="use a larger shard size"):
        cut([huge], store, PIECE_SIZE)
    with pytest.raises(BadInput, match="empty"):
        cut(memory_sources([b"", b""]), store, PIECE_SIZE)
    assert contents_of(tmp_path) == {}


def test_extract_writes_all_or_nothing(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "store")
    manifest = stored(store, [noise(SHARD + 5, 1), noise(9, 2)])
    (tmp_path / "there").mkdir()
    with pytest.raises(Conflict, match="exists already"):
        extract(manifest, store, tmp_path / "there")
    with open(store.path(manifest.shard_hashes[1]), "r+b") as shard:
        shard.write(b"?")
    with pytest.raises(Corrupt, match="file-0000 is damaged"):
        extract(manifest, store, tmp_path / "out")
    with pytest.raises(Corrupt, match="file-0000 is damaged"):
        read_artifact_file(manifest, store, "file-0000", 1 << 30)
    with pytest.raises(BadInput, match="more than"):
        read_artifact_file(manifest, store, "file-0000", 10)
    assert sorted(os.listdir(tmp_path)) == ["store", "there"]


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from node.storage.artifact import FileSource, cut
from node.storage.store import ShardStore
store = ShardStore(Path(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
manifest = cut([FileSource("model.safetensors", Path(sys.argv[1]))], store, 64 << 20)
assert len(manifest.shards) == 3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate(160 << 20)
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path / "file"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 24 * 1024, "kilobytes more than before the cut"
