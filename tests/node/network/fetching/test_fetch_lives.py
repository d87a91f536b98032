"""A fetch that is killed, or whose disk is full or fails, at many places: nothing that had come is fetched again,
nothing wrong counts, and the next life ends it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage.manifest import Manifest
from node.storage.store import ShardStore
from tests.ledger.zygote import Zygote, zygote
from tests.node.network.artifacts import make
from tests.node.network.fetching import lives, webs
from tests.node.network.fetching.webs import Web

PIECES = 100
FAULTS = Path(__file__).parents[3] / "ledger" / "faults.c"


@pytest.fixture(scope="module")
def artifact() -> tuple[Manifest, list[bytes]]:
    return make(PIECES * PIECE_SIZE - 77, PIECES * PIECE_SIZE)


@pytest.fixture
def web(artifact: tuple[Manifest, list[bytes]]) -> Iterator[Web]:
    manifest, shards = artifact
    with webs.serving(webs.static, webs.mirror_files([(manifest.shards[0], shards[0])])) as web:
        yield web


class Wanter:
    """A store that has the manifest and wants the shard."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.store = ShardStore(root, reserve_bytes=0)
        self.manifest_hash: ManifestHash = manifest.manifest_hash()
        self.store.put_manifest(manifest.encode(), self.manifest_hash)
        self.shard: ShardHash = manifest.shards[0].sha256

    def arguments(self, web: Web) -> tuple[str, str, str]:
        return str(self.root), self.manifest_hash.hex(), web.url

    @property
    def partial(self) -> Path:
        return self.root / "partial" / self.shard.hex()


def requested(web: Web) -> int:
    """Pieces that were asked for."""
    total = 0
    for _, asked in web.requests:
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        total += (last - first) // PIECE_SIZE + 1
    return total


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.soak)], ids=["every 12 %", "every 1 %"])
def test_killed_again_and_again(artifact: tuple[Manifest, list[bytes]], web: Web, tmp_path: Path, step: int) -> None:
    manifest, shards = artifact
    wanter, rng = Wanter(tmp_path / "store", manifest), random.Random(step)
    here, kills = 0, 0
    with zygote() as lifes:
        while True:
            ended = lifes.run(
                lives.fetch,
                *wanter.arguments(web),
                kill_after=step + 1,
                kill_delay_s=rng.uniform(0, 0.004),
            )
            assert ended.told[0] >= here, "what had come is fetched again"
            here = ended.told[-1]
            if not ended.killed:
                break
            kills += 1
            # The kill may come after the last piece, but then the next life has nothing to fetch.
            assert kills <= PIECES + 2
    assert ended.status == 0, ended.stderr
    assert here == len(shards[0])
    assert kills >= PIECES // (step + 12)
    assert wanter.store.path(wanter.shard).read_bytes() == shards[0]
    assert not wanter.partial.exists()


def test_nothing_but_the_bytes_is_trusted_after_a_kill(
    artifact: tuple[Manifest, list[bytes]], web: Web, tmp_path: Path
) -> None:
    manifest, shards = artifact
    wanter = Wanter(tmp_path / "store", manifest)
    with zygote() as lifes:
        killed = lifes.run(lives.fetch, *wanter.arguments(web), kill_after=20)
        assert killed.killed
        data = bytearray(wanter.partial.read_bytes())
        data[3 * PIECE_SIZE + 5] ^= 1
        wanter.partial.write_bytes(data + bytes(3 * PIECE_SIZE))
        web.requests.clear()
        ended = lifes.run(lives.fetch, *wanter.arguments(web))
    assert ended.status == 0, ended.stderr
    kept = ended.told[0] // PIECE_SIZE
    assert killed.told[-1] // PIECE_SIZE - 1 <= kept <= len(data) // PIECE_SIZE
    assert any("bytes=3145728-" in asked for _, asked in web.requests), "the damaged piece is fetched"
    assert requested(web) == PIECES - kept
    assert wanter.store.path(wanter.shard).read_bytes() == shards[0]


# Failing disks


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Where the disk can be made to fail."""
    if shutil.which("gcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no gcc: CI has to run this")
        pytest.skip("no gcc to compile tests/ledger/faults.c with")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(FAULTS), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    with zygote({"LD_PRELOAD": str(library)}) as made:
        yield made


ERRORS = {errno.ENOSPC: ("NoSpace", "free some space"), errno.EIO: ("Corrupt", "check the disk")}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_disk_that_fails_at_any_change(failing: Zygote, tmp_path: Path, number: int) -> None:
    """A short write, a full disk, a failing sync or rename: it is said in one line, and the next life ends it."""
    manifest, shards = make(6 * PIECE_SIZE - 5, 6 * PIECE_SIZE)
    kind, advice = ERRORS[number]
    with webs.serving(webs.static, webs.mirror_files([(manifest.shards[0], shards[0])])) as web:
        unharmed = Wanter(tmp_path / "unharmed", manifest)
        told = failing.run(lives.starve, *unharmed.arguments(web), 0, 0).result()
        assert told["refused"] is None
        assert told["changes"] >= 6 + 2, "pieces, a sync and a rename"
        for nth in range(1, told["changes"] + 1):
            wanter = Wanter(tmp_path / str(nth), manifest)
            refused = failing.run(lives.starve, *wanter.arguments(web), nth, number).result()["refused"]
            assert refused is not None, f"change {nth} of {told['changes']}"
            assert refused[0] == kind, refused
            assert advice in refused[1]
            again = failing.run(lives.starve, *wanter.arguments(web), 0, 0).result()
            assert again["refused"] is None
            assert wanter.store.path(wanter.shard).read_bytes() == shards[0]
            shutil.rmtree(wanter.root)
