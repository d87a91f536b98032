"""No space left, at any point: NoSpace, what was there is still there, and it goes on when there is room again."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from storage_helpers import contents_of, memory_sources, model_directory, noise, piece_hashes, pieces, stored

from contracts.errors import NoSpace
from contracts.types import PIECE_SIZE, ShardHash
from node.storage.artifact import cut, extract
from node.storage.importer import import_model
from node.storage.store import ShardStore

SHARD = 2 * PIECE_SIZE
DATA = noise(4 * PIECE_SIZE, 3)
NAME = ShardHash(sha256(DATA).digest())


class Disk:
    """os.pwrite of a disk with so much room: it writes what still fits, then fails as the kernel does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, number: int = errno.ENOSPC) -> None:
        self.room = room
        real = os.pwrite

        def pwrite(descriptor: int, data: bytes, offset: int) -> int:
            fits = memoryview(data)[: self.room]
            if len(fits) == 0:
                raise OSError(number, os.strerror(number))
            self.room -= len(fits)
            return real(descriptor, fits, offset)

        monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_cut_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    store = ShardStore(tmp_path)
    stored(store, [noise(100, 9)])
    before = contents_of(tmp_path)
    disk = Disk(monkeypatch, 3 * PIECE_SIZE + 5, number)
    with pytest.raises(NoSpace, match="free some space"):
        cut(memory_sources([DATA]), store, SHARD)
    assert contents_of(tmp_path) == before
    disk.room = 1 << 40
    assert cut(memory_sources([DATA]), store, SHARD).total_size == len(DATA)


def test_a_fetch_keeps_what_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(tmp_path)
    disk = Disk(monkeypatch, 2 * PIECE_SIZE + 5)
    with store.open_partial(NAME, len(DATA), piece_hashes(DATA)) as partial:
        partial.write(0, pieces(DATA)[0])
        partial.write(1, pieces(DATA)[1])
        with pytest.raises(NoSpace):
            partial.write(2, pieces(DATA)[2])
        assert partial.missing() == [2, 3]
    disk.room = 1 << 40
    with store.open_partial(NAME, len(DATA), piece_hashes(DATA)) as partial:
        assert partial.missing() == [2, 3]
        partial.write(3, pieces(DATA)[3])
        partial.write(2, pieces(DATA)[2])
        partial.commit()
    assert store.path(NAME).read_bytes() == DATA


@pytest.mark.parametrize("room", [PIECE_SIZE, 5 * PIECE_SIZE, 9 * PIECE_SIZE])
def test_a_move_goes_on_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    source = model_directory(tmp_path / "model", (3 * PIECE_SIZE, 3 * PIECE_SIZE, 3 * PIECE_SIZE))
    original = contents_of(source)
    store = ShardStore(tmp_path / "store")
    disk = Disk(monkeypatch, room)
    with pytest.raises(NoSpace):
        import_model(source, store, SHARD, move=True)
    disk.room = 1 << 40
    imported = import_model(source, store, SHARD, move=True)
    extract(imported.manifest, store, tmp_path / "out")
    assert contents_of(tmp_path / "out") == original
    assert contents_of(source) == {}


def test_a_manifest_that_does_not_fit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = stored(ShardStore(tmp_path / "a"), [DATA])
    store = ShardStore(tmp_path / "b")
    Disk(monkeypatch, 10)
    with pytest.raises(NoSpace):
        store.put_manifest(manifest.encode(), manifest.manifest_hash())
    assert contents_of(tmp_path / "b") == {}


IMPORT_SCRIPT = """
import sys
from pathlib import Path
from contracts.errors import NoSpace
from node.storage.importer import import_model
from node.storage.store import ShardStore
try:
    import_model(Path(sys.argv[1]), ShardStore(Path(sys.argv[2]), reserve_bytes=0), 2 << 20)
except NoSpace as error:
    sys.exit(f"refused: {error}")
"""


def run_import(source: Path, store: Path, *prefix: str, file_size: int = -1) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if file_size >= 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    command = [*prefix, sys.executable, "-c", IMPORT_SCRIPT, str(source), str(store)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit)


def test_the_kernel_s_own_limit(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "model", (3 * PIECE_SIZE,))
    refused = run_import(source, tmp_path / "store", file_size=PIECE_SIZE + 77)
    assert refused.returncode == 1, refused.stderr
    assert refused.stderr.startswith("refused: writing ")
    assert "ulimit -f" in refused.stderr
    assert contents_of(tmp_path / "store") == {}
    assert run_import(source, tmp_path / "store").returncode == 0


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A small tmpfs in a mount namespace of its own, where this machine lets us make one."""
    source = model_directory(tmp_path / "model", (6 * PIECE_SIZE,))
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    # Room for the check beforehand (statvfs), but not for the data: something else takes it meanwhile.
    script = f'mount -t tmpfs -o size=8m none "{disk}" || exit 99; exec "$@"'
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    filler = IMPORT_SCRIPT.replace("try:\n", f"open({str(disk / 'filler')!r}, 'wb').write(bytes(3 << 20))\ntry:\n")
    early = subprocess.run(
        [*prefix, sys.executable, "-c", filler, str(source), str(disk / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if early.returncode == 99 or "unshare" in early.stderr:
        pytest.skip("mounting is not allowed here")
    assert early.returncode == 1
    assert "free for it are" in early.stderr
    late = filler.replace("bytes(3 << 20))\n", "bytes(3 << 20))\nShardStore.require_room = lambda *_: None\n")
    late += f"\nassert not any(p.is_file() for p in Path({str(disk / 'store')!r}).rglob('*'))\n"
    late = late.replace('sys.exit(f"refused: {error}")', 'print(f"refused: {error}")')
    full = subprocess.run(
        [*prefix, sys.executable, "-c", late, str(source), str(disk / "store")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert full.returncode == 0, full.stderr
    assert "the disk or its quota is exhausted" in full.stdout
