"""A model laid out for a web server: whole or not there, done once, and nothing written where a link leads."""

import errno
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from storage_helpers import contents_of, noise, stored
from test_storage_full_disk import Disk

from contracts.errors import BadInput, Busy, Corrupt, NoSpace, NotFound
from contracts.types import PIECE_SIZE, ManifestHash
from node.network.sources import MirrorSource
from node.storage.export import Exported, _exclusive, export
from node.storage.manifest import Manifest
from node.storage.store import ShardStore

SHARD = 2 * PIECE_SIZE
SIZE = 5 * PIECE_SIZE + 9


class Kept:
    """A store with one artifact of three shards, and where it is exported to."""

    def __init__(self, path: Path) -> None:
        self.store = ShardStore(path / "store")
        self.manifest: Manifest = stored(self.store, [noise(SIZE, 1)], SHARD)
        self.hash: ManifestHash = self.manifest.manifest_hash()
        self.target = path / "target"

    def export(self, copy: bool = False) -> Exported:
        return export(self.store, [self.hash], self.target, copy)

    @property
    def names(self) -> list[str]:
        return [shard.hex() for shard in self.manifest.shard_hashes]

    def exported(self, index: int) -> Path:
        return self.target / "shards" / self.names[index]

    def held(self, index: int) -> Path:
        return self.store.path(self.manifest.shard_hashes[index])

    @property
    def whole(self) -> dict[str, bytes]:
        """What a mirror has to have."""
        source = MirrorSource("")
        shards = {source.shard_url(bytes.fromhex(name)): self.held(n).read_bytes() for n, name in enumerate(self.names)}
        return {
            name.lstrip("/"): d
            for name, d in ({source.manifest_url(self.hash): self.manifest.encode()} | shards).items()
        }


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def damage(path: Path) -> None:
    """One byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(PIECE_SIZE)
        byte = file.read(1)[0]
        file.seek(PIECE_SIZE)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("copy", [False, True])
def test_an_export_is_what_a_mirror_serves(kept: Kept, copy: bool) -> None:
    before = contents_of(kept.store.root)
    assert kept.export(copy) == Exported(0 if copy else 3, 3 if copy else 0, 0, SIZE)
    assert contents_of(kept.target) == kept.whole
    assert [kept.exported(n).samefile(kept.held(n)) for n in range(3)] == [not copy] * 3
    assert contents_of(kept.store.root) == before


@pytest.mark.parametrize("copy", [False, True])
def test_a_second_export_writes_nothing(kept: Kept, copy: bool) -> None:
    kept.export(copy)
    before = {path: path.stat() for path in kept.target.rglob("*")}
    assert kept.export() == Exported(0, 0, 3, SIZE)
    assert {path: path.stat().st_mtime_ns for path in before} == {path: f.st_mtime_ns for path, f in before.items()}


def test_models_with_a_shard_in_common_have_it_once(kept: Kept) -> None:
    longer = stored(kept.store, [noise(SIZE, 1) + bytes(SHARD)], SHARD)
    done = export(kept.store, [kept.hash, longer.manifest_hash()], kept.target)
    assert done.linked == len(set(kept.manifest.shard_hashes) | set(longer.shard_hashes)) == 5
    assert len(list((kept.target / "manifests").iterdir())) == 2


def test_damage_in_the_export_is_replaced(kept: Kept) -> None:
    kept.export(copy=True)
    damage(kept.exported(1))
    os.truncate(kept.exported(2), 5)
    (kept.target / "manifests" / kept.hash.hex()).write_bytes(b"junk")
    assert kept.export(copy=True) == Exported(0, 2, 1, SIZE)
    assert contents_of(kept.target) == kept.whole


@pytest.mark.parametrize("copy", [False, True])
def test_damage_in_the_store_is_not_exported(kept: Kept, copy: bool) -> None:
    damage(kept.held(1))
    with pytest.raises(Corrupt, match=r"damaged on disk; `aigen shard verify`"):
        kept.export(copy)
    assert contents_of(kept.target).keys() == {f"shards/{kept.names[0]}"}


def test_damage_in_a_shard_that_is_linked_is_noticed(kept: Kept) -> None:
    kept.export()
    damage(kept.held(1))
    with pytest.raises(Corrupt, match=kept.names[1]):
        kept.export()
    damage(kept.held(1))  # as a repair in place
    assert kept.export() == Exported(0, 0, 3, SIZE)


def test_what_is_not_all_held_is_not_begun(kept: Kept) -> None:
    kept.held(2).unlink()
    with pytest.raises(NotFound, match=r"1 of the 3 shards .* the first is number 2"):
        kept.export()
    assert not kept.target.exists()
    with pytest.raises(NotFound, match="is not here"):
        export(kept.store, [ManifestHash(bytes(32))], kept.target)
    assert not kept.target.exists()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_no_link_can_be_made_it_is_copied(kept: Kept, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert kept.export() == Exported(0, 3, 0, SIZE)
    assert contents_of(kept.target) == kept.whole


def test_one_export_at_a_time(kept: Kept) -> None:
    with _exclusive(kept.target), pytest.raises(Busy, match="another export"):
        kept.export()
    assert kept.export().linked == 3


# A disk that is full


def test_a_full_disk_leaves_whole_shards_only(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, SHARD + PIECE_SIZE + 5)
    with pytest.raises(NoSpace, match="free some space"):
        kept.export(copy=True)
    assert contents_of(kept.target).keys() == {f"shards/{kept.names[0]}"}
    disk.room = 1 << 40
    assert kept.export(copy=True) == Exported(0, 2, 1, SIZE)
    assert contents_of(kept.target) == kept.whole


def test_what_will_not_fit_is_not_begun(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.storage.export.DISK_RESERVE_BYTES", 1 << 60)
    with pytest.raises(NoSpace, match=r"needs 2.1 MB .* free for it are 0 bytes"):
        kept.export(copy=True)
    assert contents_of(kept.target) == {}
    assert kept.export().linked == 3


# What was put in the way


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("folder", ["shards", "manifests"])
def test_a_link_for_a_folder_is_not_followed(kept: Kept, tmp_path: Path, folder: str, copy: bool) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    kept.target.mkdir()
    (kept.target / folder).symlink_to(victim)
    with pytest.raises(BadInput, match=folder):
        kept.export(copy)
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("folder", ["shards", "manifests"])
def test_a_link_for_a_file_is_not_followed(kept: Kept, tmp_path: Path, folder: str, copy: bool) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (kept.target / folder).mkdir(parents=True)
    name = kept.names[0] if folder == "shards" else kept.hash.hex()
    (kept.target / folder / name).symlink_to(victim)
    (kept.target / folder / f".{name}.part").symlink_to(victim)
    with pytest.raises(BadInput, match="symbolic link, which is not followed"):
        kept.export(copy)
    assert victim.read_bytes() == b"precious"
    (kept.target / folder / name).unlink()
    kept.export(copy)
    assert victim.read_bytes() == b"precious"
    assert contents_of(kept.target) == kept.whole


def test_what_is_no_file_is_in_the_way(kept: Kept) -> None:
    kept.exported(0).mkdir(parents=True)
    with pytest.raises(BadInput, match="in the way"):
        kept.export()
    kept.exported(0).rmdir()
    os.mkfifo(kept.exported(0))
    with pytest.raises(BadInput, match="in the way"):
        kept.export()
    (kept.target / "file").write_bytes(b"")
    with pytest.raises(BadInput, match="creating"):
        export(kept.store, [kept.hash], kept.target / "file")


def test_what_comes_up_meanwhile_is_left_to_its_owner(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.listdir

    def seen_too_late(folder: int) -> list[str]:
        found = real(folder)
        os.close(os.open(f".{kept.names[0]}.part", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        return found

    monkeypatch.setattr(os, "listdir", seen_too_late)
    for copy in (False, True):
        with pytest.raises(Busy, match="came from elsewhere"):
            kept.export(copy)
    monkeypatch.undo()
    (kept.target / "shards" / f".{kept.names[0]}.part").mkdir()
    with pytest.raises(BadInput, match="sweeping"):
        kept.export()


def test_an_export_into_the_store_itself_changes_nothing(kept: Kept) -> None:
    """A store has a mirror's layout already."""
    before = contents_of(kept.store.root)
    assert export(kept.store, [kept.hash], kept.store.root) == Exported(0, 0, 3, SIZE)
    assert contents_of(kept.store.root) == before


# Export in a process that stops and waits (for its killer) inside the second shard.
STOPPING_EXPORT = """
import os, sys
from pathlib import Path
from node.storage.export import export
from node.storage.store import ShardStore
real = os.pwrite
written = 0
def pwrite(descriptor, data, offset):
    global written
    written += len(data)
    if written > (2 << 20):
        print("there", flush=True)
        sys.stdin.read()
    return real(descriptor, data, offset)
os.pwrite = pwrite
export(ShardStore(Path(sys.argv[1])), [bytes.fromhex(sys.argv[2])], Path(sys.argv[3]), copy=True)
"""


def test_an_export_killed_inside_a_shard_goes_on(kept: Kept) -> None:
    command = [sys.executable, "-c", STOPPING_EXPORT, str(kept.store.root), kept.hash.hex(), str(kept.target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        with pytest.raises(Busy):
            kept.export()
        process.send_signal(signal.SIGKILL)
    left = contents_of(kept.target)
    assert left.keys() == {f"shards/{kept.names[0]}", f"shards/.{kept.names[1]}.part"}
    assert sha256(left[f"shards/{kept.names[0]}"]).hexdigest() == kept.names[0]
    assert kept.export(copy=True) == Exported(0, 2, 1, SIZE)
    assert contents_of(kept.target) == kept.whole
