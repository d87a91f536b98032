"""The store: a shard is held only when it is proved, whatever comes, in whatever order, from however many threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_helpers import contents_of, noise, piece_hashes, pieces, stored

from contracts.errors import BadInput, BadPeer, Busy, Conflict, Corrupt, NoSpace, NotFound
from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage import files
from node.storage.hashing import ShardHasher
from node.storage.partial import PartialShard
from node.storage.scrub import scrub, scrub_shard
from node.storage.store import ShardStore

DATA = noise(3 * PIECE_SIZE + 17, seed=5)
PIECES = pieces(DATA)
HASHES = piece_hashes(DATA)
NAME = ShardHash(sha256(DATA).digest())
ABSENT = ShardHash(sha256(b"absent").digest())


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    return ShardStore(tmp_path / "store")


def opened(store: ShardStore) -> PartialShard:
    return store.open_partial(NAME, len(DATA), HASHES)


def fill(store: ShardStore) -> None:
    with opened(store) as partial:
        for index in partial.missing():
            partial.write(index, PIECES[index])
        partial.commit()


# --- writing a shard


@given(st.permutations(range(len(PIECES))))
@settings(max_examples=12, deadline=None)
def test_pieces_may_come_in_any_order(order: list[int]) -> None:
    with TemporaryDirectory() as directory:
        store = ShardStore(Path(directory))
        with opened(store) as partial:
            for position, index in enumerate(order):
                assert partial.missing() == sorted(order[position:])
                assert not store.held(NAME)
                partial.write(index, PIECES[index])
                assert partial.has(index)
                assert store.read_piece(NAME, index, sha256(PIECES[index]).digest()) == PIECES[index]
            partial.commit()
        assert store.path(NAME).read_bytes() == DATA
        assert store.held_shards() == [NAME]
        assert os.listdir(store.root / "partial") == []


def test_pieces_may_come_from_many_threads_and_twice(store: ShardStore) -> None:
    order = list(range(len(PIECES))) * 4
    Random(1).shuffle(order)
    with opened(store) as partial, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda index: partial.write(index, PIECES[index]), order))
        partial.commit()
    assert store.path(NAME).read_bytes() == DATA


def test_a_wrong_piece_does_not_count(store: ShardStore) -> None:
    with opened(store) as partial:
        for wrong in (PIECES[1], PIECES[0][:-1], PIECES[0] + b"x", b"", bytes(PIECE_SIZE)):
            with pytest.raises(BadPeer, match="piece 0"):
                partial.write(0, wrong)
        assert partial.missing() == [0, 1, 2, 3]
        with pytest.raises(Conflict, match="misses 4 of 4"):
            partial.commit()
    # Nothing arrived, so nothing is left.
    assert os.listdir(store.root / "partial") == []


def test_resume_believes_the_bytes_only(store: ShardStore) -> None:
    path = store.root / "partial" / NAME.hex()
    damaged = bytearray(DATA[: 2 * PIECE_SIZE + 100])
    damaged[PIECE_SIZE] ^= 1
    path.write_bytes(damaged)
    with opened(store) as partial:
        assert partial.missing() == [1, 2, 3]
        partial.write(3, PIECES[3])
    with opened(store) as partial:
        assert partial.missing() == [1, 2]
        assert partial.missing_bytes == 2 * PIECE_SIZE
        partial.write(1, PIECES[1])
        partial.write(2, PIECES[2])
        partial.commit()
    assert store.path(NAME).read_bytes() == DATA


def test_a_partial_file_that_is_too_long_is_cut(store: ShardStore) -> None:
    (store.root / "partial" / NAME.hex()).write_bytes(DATA + b"more" * PIECE_SIZE)
    with opened(store) as partial:
        assert partial.missing() == []
        partial.commit()
    assert store.path(NAME).read_bytes() == DATA


def test_pieces_that_make_another_shard_never_become_held(store: ShardStore) -> None:
    with store.open_partial(ABSENT, len(DATA), HASHES) as partial:
        for index, piece in enumerate(PIECES):
            partial.write(index, piece)
        with pytest.raises(BadInput, match="wrong manifest"):
            partial.commit()
    assert contents_of(store.root) == {}


def test_one_writer_at_a_time(store: ShardStore) -> None:
    with opened(store), pytest.raises(Busy, match="another task"):
        opened(ShardStore(store.root))
    fill(store)
    with pytest.raises(Conflict, match="held already"):
        opened(store)


def test_piece_hashes_must_fit_the_size(store: ShardStore) -> None:
    for size in (0, -1, PIECE_SIZE, 5 * PIECE_SIZE):
        with pytest.raises(BadInput, match="do not describe"):
            store.open_partial(NAME, size, HASHES)
    assert contents_of(store.root) == {}


def test_a_planted_link_is_not_followed(store: ShardStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(DATA)
    (store.root / "partial" / NAME.hex()).symlink_to(secret)
    with pytest.raises(BadInput, match="symbolic link"):
        opened(store)
    (store.root / "shards" / NAME.hex()).symlink_to(secret)
    assert not store.held(NAME)
    with pytest.raises(NotFound):
        store.path(NAME)


# --- damage and repair


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=25, deadline=None)
def test_any_flipped_byte_is_found_and_repaired(position: int, change: int) -> None:
    with TemporaryDirectory() as directory:
        store = ShardStore(Path(directory))
        fill(store)
        with open(store.path(NAME), "r+b") as file:
            file.seek(position)
            file.write(bytes([DATA[position] ^ change]))
        bad = position // PIECE_SIZE
        with pytest.raises(Corrupt, match=f"piece {bad} "):
            store.read_piece(NAME, bad, sha256(PIECES[bad]).digest())
        assert store.verify(NAME, HASHES) == [bad]
        store.demote(NAME)
        assert not store.held(NAME)
        with pytest.raises(NotFound):
            store.read_piece(NAME, bad)
        with opened(store) as partial:
            assert partial.missing() == [bad]
            partial.write(bad, PIECES[bad])
            partial.commit()
        assert store.verify(NAME, HASHES) == []
        assert store.path(NAME).read_bytes() == DATA


@pytest.mark.parametrize(
    ("data", "bad"),
    [
        (b"", [0, 1, 2, 3]),
        (DATA[:-1], [3]),
        (DATA[:PIECE_SIZE], [1, 2, 3]),
        (DATA + b"x", [3]),
        (DATA + bytes(9 * PIECE_SIZE), [3]),
    ],
)
def test_a_shard_of_the_wrong_length_is_damaged(store: ShardStore, data: bytes, bad: list[int]) -> None:
    fill(store)
    store.path(NAME).write_bytes(data)
    assert store.verify(NAME, HASHES) == bad
    store.demote(NAME)
    fill(store)
    assert store.verify(NAME, HASHES) == []


def test_whole_pieces_after_the_end_are_damage(store: ShardStore) -> None:
    data = DATA[: 2 * PIECE_SIZE]
    name = ShardHash(sha256(data).digest())
    (store.root / "shards" / name.hex()).write_bytes(data + bytes(PIECE_SIZE))
    assert store.verify(name, piece_hashes(data)) == [1]


def test_verify_refuses_the_hashes_of_another_shard(store: ShardStore) -> None:
    (store.root / "shards" / ABSENT.hex()).write_bytes(DATA)
    with pytest.raises(BadInput, match="belong to another shard"):
        store.verify(ABSENT, HASHES)


def test_verify_copies_the_piece_hashes_once(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each piece of 4 GiB, that kept the other threads of a node waiting for tenths of a second."""
    asked = []
    pieces_of = ShardHasher.pieces
    monkeypatch.setattr(ShardHasher, "pieces", lambda hasher: asked.append(hasher) or pieces_of(hasher))
    fill(store)
    store.path(NAME).write_bytes(DATA[:-1])
    asked.clear()
    assert store.verify(NAME, HASHES) == [3]
    assert len(asked) == 1


def test_scrub_takes_damaged_shards_out_of_service(store: ShardStore) -> None:
    manifest = stored(store, [noise(2 * PIECE_SIZE, 1), noise(2 * PIECE_SIZE, 2), noise(9, 3)])
    first, second, third = manifest.shard_hashes
    with open(store.path(first), "r+b") as file:
        file.seek(PIECE_SIZE)
        file.write(b"\0\0\0\0\0\0\0\0")
    store.remove(third)
    report = scrub(store, manifest)
    assert (report.whole, report.damaged, report.missing) == ((second,), {first: (1,)}, (third,))
    assert store.held_shards() == [second]
    assert store.missing_shards(manifest) == [0, 2]
    assert scrub_shard(store, manifest.shards[1]) == ()


# --- reading


def test_reading_pieces(store: ShardStore) -> None:
    fill(store)
    assert [store.read_piece(NAME, index) for index in range(4)] == PIECES
    for index in (-1, 4, 1 << 70):
        with pytest.raises(NotFound, match="4 pieces"):
            store.read_piece(NAME, index)
    with pytest.raises(NotFound, match="not held"):
        store.read_piece(ABSENT, 0)
    store.remove(NAME)
    assert store.held_shards() == []


# --- manifests


def test_only_the_manifest_that_was_asked_for_is_kept(store: ShardStore, tmp_path: Path) -> None:
    manifest = stored(ShardStore(tmp_path / "other"), [noise(100, 1)])
    data, name = manifest.encode(), manifest.manifest_hash()
    with pytest.raises(BadInput, match="asked for"):
        store.put_manifest(data, ManifestHash(bytes(32)))
    junk = b"\x95junk"
    with pytest.raises(BadInput, match="malformed"):
        store.put_manifest(junk, ManifestHash(sha256(junk).digest()))
    assert contents_of(store.root) == {}
    assert not store.has_manifest(name)
    with pytest.raises(NotFound, match="not here"):
        store.manifest(name)
    assert store.put_manifest(data, name) == manifest
    assert store.put_manifest(data, name) == store.manifest(name) == manifest
    assert store.manifests() == [name]
    (store.root / "manifests" / name.hex()).write_bytes(data[:-1] + b"?")
    with pytest.raises(Corrupt, match="damaged"):
        store.manifest_bytes(name)


# --- space


def test_the_disk_budget_counts_what_is_on_its_way_in_full(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, disk_budget_bytes=2 * len(DATA))
    with opened(store) as partial:
        partial.write(0, PIECES[0])
        with pytest.raises(NoSpace, match=r"disk budget of .* has .* left"):
            store.open_partial(ABSENT, len(DATA) + 1, HASHES)
        with pytest.raises(NoSpace, match="a model needs"):
            store.require_room("a model", len(DATA) + 1, 0)
        with store.open_partial(ABSENT, len(DATA), HASHES):
            assert store.statistics().partial_shards == 2
    assert store.statistics().partial_bytes == PIECE_SIZE
    fill(store)
    statistics = store.statistics()
    assert (statistics.shards_held, statistics.shard_bytes, statistics.partial_bytes) == (1, len(DATA), 0)
    assert store.used_bytes() == len(DATA)


def test_quantised_weights_count_and_go_with_their_model(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, disk_budget_bytes=2 * len(DATA))
    one, other = ManifestHash(bytes(32)), ManifestHash(bytes([1]) * 32)
    room_bytes = store.room_bytes()
    for manifest_hash, precision in ((one, "int8"), (one, "int4"), (other, "int8")):
        Path(f"{store.quantised_stem(manifest_hash)}.{precision}").write_bytes(b"12345")
    assert store.used_bytes() == store.statistics().quantised_bytes == 15
    assert store.room_bytes() == room_bytes - 15
    with pytest.raises(NoSpace, match="disk budget"):
        store.require_room("a model", 2 * len(DATA) - 14, 0)
    store.open_partial(ABSENT, len(DATA), HASHES).close()
    full = ShardStore(tmp_path, disk_budget_bytes=len(DATA) + 14)
    with pytest.raises(NoSpace, match="disk budget"):
        full.open_partial(ABSENT, len(DATA), HASHES)
    store.remove_quantised(one)
    assert store.used_bytes() == 5
    store.remove_quantised(one)


def test_half_made_quantised_weights_are_swept(tmp_path: Path) -> None:
    stem = ShardStore(tmp_path).quantised_stem(ManifestHash(bytes(32)))
    whole, half = Path(f"{stem}.int8"), stem.with_name("ab" * 16)
    for path in (whole, half):
        path.write_bytes(b"12345")
    ShardStore(tmp_path)
    assert (whole.exists(), half.exists()) == (True, False)


def test_the_disk_is_asked_before_the_first_byte(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, reserve_bytes=1 << 62)
    with pytest.raises(NoSpace, match="kept free for the ledger"):
        opened(store)
    with pytest.raises(NoSpace, match="free for it are 0 bytes"):
        store.require_room("a model", 1, 1)
    assert contents_of(tmp_path) == {}


# --- scratch and locks


def test_scratch_of_the_dead_is_swept_and_of_the_living_is_not(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    scratch = tmp_path / "scratch"
    dead = scratch / ("0" * 32)
    dead.write_bytes(b"left behind")
    (scratch / f"{dead.name}.d").mkdir()
    (scratch / f"{dead.name}.d" / "model").write_bytes(b"left behind")
    (scratch / f"{'1' * 32}.d").mkdir()
    (scratch / "notes").write_text("not ours")
    with store.scratch_directory() as living, store.scratch_file() as file:
        ShardStore(tmp_path)
        assert living.is_dir()
        assert file.path.exists()
        assert not dead.exists()
    assert os.listdir(scratch) == ["notes"]


LOCK_SCRIPT = """
import sys
from pathlib import Path
from contracts.errors import Conflict
from node.storage.files import DirectoryLock
try:
    DirectoryLock(Path(sys.argv[1])).acquire()
except Conflict as error:
    sys.exit(f"refused: {error}")
"""


def test_the_second_node_on_a_data_directory_is_refused(tmp_path: Path) -> None:
    def second() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOCK_SCRIPT, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    with files.DirectoryLock(tmp_path):
        refused = second()
    assert refused.returncode == 1
    assert f"in use by process {os.getpid()}" in refused.stderr
    assert second().returncode == 0


def test_sizes_read_well() -> None:
    assert files.size_text(0) == "0 bytes"
    assert files.size_text(999) == "999 bytes"
    assert files.size_text(1 << 30) == "1.1 GB (1,073,741,824 bytes)"
