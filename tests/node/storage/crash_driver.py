"""Run a job of the store in a child process that kills itself with SIGKILL at its n-th write to the file system, for
every n, and check after each that the job can be taken up again and that no byte was lost.

A program of its own (`python crash_driver.py cut|move|partial|export DIRECTORY`), so that it forks a process without
threads.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from storage_helpers import contents_of, model_directory, noise, piece_hashes, pieces, stored

from contracts.types import PIECE_SIZE, ShardHash
from node.storage.artifact import extract
from node.storage.export import export
from node.storage.importer import import_model
from node.storage.store import ShardStore

SHARD = PIECE_SIZE
DATA = noise(3 * PIECE_SIZE + 9, 7)
NAME = ShardHash(sha256(DATA).digest())
WATCHED = ("pwrite", "fsync", "replace", "link", "unlink", "mkdir", "rmdir")


def die_at(number: int) -> None:
    """From now on the `number`-th change to the file system is the last thing this process does (or half does)."""
    calls = count(1)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == number:
                if name == "pwrite":
                    descriptor, data, offset = arguments
                    real(descriptor, memoryview(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in WATCHED:
        setattr(os, name, watched(name))


def killed_at(number: int, job: Callable[[], object]) -> bool:
    """Run the job in a child that dies at its n-th change; False when it was done before that."""
    child = os.fork()
    if child == 0:
        die_at(number)
        job()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the child ended with {status}"
    return status != 0


def every_held_shard_is_whole(store: ShardStore) -> None:
    for shard in store.held_shards():
        assert sha256(store.path(shard).read_bytes()).digest() == shard, f"{shard.hex()} is held and damaged"


def check_import(base: Path, move: bool) -> int:
    model_directory(base / "model", (PIECE_SIZE + 50, 300, PIECE_SIZE + 1))
    original = contents_of(base / "model")
    expected = import_model(base / "model", ShardStore(base / "expected"), SHARD)
    for number in count(1):
        source, root = base / "source", base / "store"
        shutil.copytree(base / "model", source)

        def job(source: Path = source, root: Path = root) -> None:
            if move and not contents_of(source):
                return  # it was killed when only the empty directory of the journal was left to tidy up
            import_model(source, ShardStore(root), SHARD, move=move)

        killed = killed_at(number, job)
        if killed:
            every_held_shard_is_whole(ShardStore(root))
            if not move:
                assert contents_of(source) == original
            # The second attempt dies as well, somewhere else.
            killed_at(number * 7 % 60 + 1, job)
            every_held_shard_is_whole(ShardStore(root))
            job()
        store = ShardStore(root)
        manifest = store.manifest(expected.manifest_hash)
        assert manifest == expected.manifest
        extract(manifest, store, base / "out")
        assert contents_of(base / "out") == original
        assert contents_of(source) == ({} if move else original), contents_of(source).keys()
        assert os.listdir(root / "scratch") == []
        for directory in (source, root, base / "out"):
            shutil.rmtree(directory)
        if not killed:
            return number - 1
    raise AssertionError


def check_partial(base: Path) -> int:
    for number in count(1):
        root = base / "store"

        def job(root: Path = root) -> None:
            store = ShardStore(root)
            with store.open_partial(NAME, len(DATA), piece_hashes(DATA)) as partial:
                for index in partial.missing():
                    partial.write(index, pieces(DATA)[index])
                partial.commit()

        killed = killed_at(number, job)
        store = ShardStore(root)
        every_held_shard_is_whole(store)
        if killed and not store.held(NAME):
            killed_at(number, job)
            every_held_shard_is_whole(store)
            if not store.held(NAME):
                job()
        assert store.path(NAME).read_bytes() == DATA
        assert os.listdir(root / "partial") == []
        shutil.rmtree(root)
        if not killed:
            return number - 1
    raise AssertionError


def check_export(base: Path) -> int:
    store = ShardStore(base / "store")
    manifest = stored(store, [DATA], SHARD)
    before = contents_of(store.root)
    whole = {f"{folder}/{name}": before[f"{folder}/{name}"] for folder, name in named(before)}
    tried = 0
    for copy in (False, True):
        for number in count(1):
            target = base / "target"

            def job(copy: bool = copy, target: Path = target) -> None:
                export(store, [manifest.manifest_hash()], target, copy)

            killed = killed_at(number, job)
            if killed:
                killed_at(number, job)
                visible = {name: data for name, data in contents_of(target).items() if "/." not in name}
                assert visible.items() <= whole.items()
                job()
            assert contents_of(target) == whole
            assert contents_of(store.root) == before
            shutil.rmtree(target)
            if not killed:
                break
            tried += 1
    return tried


def named(files: dict[str, bytes]) -> list[list[str]]:
    """The shards and manifests among the files of a store."""
    return [name.split("/") for name in files if name.startswith(("shards/", "manifests/"))]


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    match what:
        case "partial":
            tried = check_partial(where)
        case "export":
            tried = check_export(where)
        case _:
            tried = check_import(where, move=what == "move")
    print(tried)
