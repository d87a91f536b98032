"""kill -9 in the middle of anything loses nothing."""

import errno
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from storage_helpers import contents_of, model_directory, noise, piece_hashes, pieces

from contracts.errors import BadInput, Busy, Conflict, Corrupt
from contracts.types import PIECE_SIZE, ShardHash
from node.storage.artifact import Progress, ProgressCallback, extract
from node.storage.directory import JOURNAL
from node.storage.importer import import_model
from node.storage.moving import exclusive, peak_bytes
from node.storage.store import ShardStore

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SHARD = 2 * PIECE_SIZE
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""SIGKILL does not ask what the disk is made of, and syncing a real one hundreds of times takes long."""


def python(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HERE), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.mark.parametrize(("job", "at_least"), [("partial", 9), ("cut", 20), ("move", 40), ("export", 40)])
def test_killed_at_every_change_to_the_disk(job: str, at_least: int) -> None:
    with TemporaryDirectory(dir=MEMORY) as directory, python(HERE / "crash_driver.py", job, directory) as driver:
        out, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    assert int(out) >= at_least


# Import in a process that stops and waits (for its killer) when so many bytes are through.
STOPPING_IMPORT = """
import sys
from pathlib import Path
from node.storage.importer import import_model
from node.storage.store import ShardStore
source, root, stop_at, move = sys.argv[1:]
def watch(progress):
    if progress.stage == "cutting" and progress.done_bytes >= int(stop_at):
        print("there", flush=True)
        sys.stdin.read()
import_model(Path(source), ShardStore(Path(root)), 2 << 20, watch, move=move == "move")
"""


@pytest.mark.parametrize("move", ["move", "copy"])
@pytest.mark.parametrize("stop_at", [PIECE_SIZE, 7 * PIECE_SIZE, 11 * PIECE_SIZE])
def test_a_real_import_killed_from_outside_goes_on(stop_at: int, move: str, tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (4 * PIECE_SIZE, 3 * PIECE_SIZE, 4 * PIECE_SIZE))
    original = contents_of(source)
    with python("-c", STOPPING_IMPORT, source, tmp_path / "store", stop_at, move) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        # Alive, it keeps others away from what it works on.
        with pytest.raises(Busy, match="another process"):
            import_model(source, ShardStore(tmp_path / "store"), SHARD)
        process.send_signal(signal.SIGKILL)
    store = ShardStore(tmp_path / "store")
    assert list((tmp_path / "store" / "scratch").iterdir()) == []
    assert ((source / JOURNAL).exists()) == (move == "move" and stop_at > 4 * PIECE_SIZE)
    imported = import_model(source, store, SHARD, move=move == "move")
    extract(imported.manifest, store, tmp_path / "out")
    assert contents_of(tmp_path / "out") == original
    assert contents_of(source) == ({} if move == "move" else original)


STOPPING_FETCH = """
import os, sys
from pathlib import Path
from storage_helpers import noise, piece_hashes, pieces
from contracts.types import PIECE_SIZE, ShardHash
from hashlib import sha256
from node.storage.store import ShardStore
data = noise(6 * PIECE_SIZE, 3)
real = os.pwrite
def half_of_the_fourth(descriptor, piece, offset):
    if offset == 3 * PIECE_SIZE:
        real(descriptor, piece[: PIECE_SIZE // 2], offset)
        print("there", flush=True)
        sys.stdin.read()
    return real(descriptor, piece, offset)
os.pwrite = half_of_the_fourth
store, name = ShardStore(Path(sys.argv[1])), ShardHash(sha256(data).digest())
with store.open_partial(name, len(data), piece_hashes(data)) as partial:
    for index in partial.missing():
        partial.write(index, pieces(data)[index])
"""


def test_a_fetch_killed_inside_a_piece_keeps_the_pieces_before_it(tmp_path: Path) -> None:
    data = noise(6 * PIECE_SIZE, 3)
    name = ShardHash(sha256(data).digest())
    with python("-c", STOPPING_FETCH, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.kill()
    store = ShardStore(tmp_path)
    assert not store.held(name)
    with store.open_partial(name, len(data), piece_hashes(data)) as partial:
        assert partial.missing() == [3, 4, 5]
        for index in partial.missing():
            partial.write(index, pieces(data)[index])
        partial.commit()
    assert store.path(name).read_bytes() == data


# --- an interrupted move is finished, and only as it was begun


class Stopped(Exception):
    """What the tests raise out of the progress callback."""


def stop_after(bytes_done: int) -> ProgressCallback:
    def watch(progress: Progress) -> None:
        if progress.stage == "cutting" and progress.done_bytes > bytes_done:
            raise Stopped

    return watch


def begun_move(tmp_path: Path) -> tuple[Path, ShardStore, dict[str, bytes]]:
    source = model_directory(tmp_path / "model", (4 * PIECE_SIZE, 4 * PIECE_SIZE))
    original = contents_of(source)
    store = ShardStore(tmp_path / "store")
    with pytest.raises(Stopped):
        import_model(source, store, SHARD, stop_after(7 * PIECE_SIZE), move=True)
    assert not (source / "model-00001-of-00002.safetensors").exists()
    return source, store, original


def test_an_interrupted_move_is_finished_even_without_asking_to_move(tmp_path: Path) -> None:
    source, store, original = begun_move(tmp_path)
    imported = import_model(source, store, SHARD)
    extract(imported.manifest, store, tmp_path / "out")
    assert contents_of(tmp_path / "out") == original
    assert contents_of(source) == {}
    assert imported.architecture == "LlamaForCausalLM"


def test_an_interrupted_move_needs_its_own_store_and_shard_size(tmp_path: Path) -> None:
    source, store, _ = begun_move(tmp_path)
    before = contents_of(source)
    with pytest.raises(Conflict, match="finish there first"):
        import_model(source, ShardStore(tmp_path / "other"), SHARD, move=True)
    with pytest.raises(Conflict, match="finish with that shard size"):
        import_model(source, store, PIECE_SIZE, move=True)
    assert contents_of(source) == before


def test_an_interrupted_move_says_when_its_files_were_touched(tmp_path: Path) -> None:
    source, store, _ = begun_move(tmp_path)
    second = source / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.write_bytes(kept + b"x")
    with pytest.raises(BadInput, match="changed since"):
        import_model(source, store, SHARD)
    second.unlink()
    with pytest.raises(BadInput, match="gone since"):
        import_model(source, store, SHARD)
    second.write_bytes(kept)
    assert import_model(source, store, SHARD).manifest.total_size > 8 * PIECE_SIZE


def test_an_interrupted_move_notices_damage_in_its_shards(tmp_path: Path) -> None:
    source, store, _ = begun_move(tmp_path)
    for shard in store.held_shards():
        with open(store.path(shard), "r+b") as file:
            file.seek(PIECE_SIZE)
            file.write(b"????????")
    with pytest.raises(Corrupt, match=r"are damaged.*run the same import again"):
        import_model(source, store, SHARD)
    (source / JOURNAL / "journal").write_bytes(b"junk")
    with pytest.raises(Corrupt, match="malformed"):
        import_model(source, store, SHARD)


def test_one_import_of_a_directory_at_a_time(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model")
    with exclusive(source, move=False), pytest.raises(Busy, match="another process"):
        import_model(source, ShardStore(tmp_path / "store"), SHARD)


def test_a_directory_that_cannot_be_locked_can_be_copied_but_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_directory(tmp_path / "model")
    store = ShardStore(tmp_path / "store")

    def refuse(descriptor: int) -> bool:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr("node.storage.moving.try_lock", refuse)
    with pytest.raises(BadInput, match="import it without moving"):
        import_model(source, store, SHARD, move=True)
    assert not import_model(source, store, SHARD).already


def test_a_move_never_holds_the_model_twice(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (2 * PIECE_SIZE,) * 6)
    store = ShardStore(tmp_path / "store")
    start = sum(map(len, contents_of(source).values()))
    highest = 0

    def watch(_: Progress) -> None:
        nonlocal highest
        now = sum(len(data) for root in (source, store.root) for data in contents_of(root).values())
        highest = max(highest, now)

    import_model(source, store, SHARD, watch, move=True)
    assert highest <= start + 2 * SHARD + 4096
    assert peak_bytes([2 * PIECE_SIZE] * 6, SHARD) == SHARD
    assert peak_bytes([5], SHARD) == 5
