"""A real web server as a mirror: nginx over a store, as it comes, without a line of configuration for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from contracts.errors import Busy
from node.network.fetching.fetcher import Fetcher
from node.network.sources import MirrorSource
from node.network.wire import DataLimits
from node.storage.export import export
from tests import tools
from tests.node.network.test_data_plane import World

DEADLINE_S = 30.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def nginx(world: World, tmp_path: Path) -> Iterator[str]:
    """Its URL; its files are the holder's store."""
    with tools.nginx(world.holder.store.root, tmp_path / "nginx") as url:
        yield url


async def take_all(world: World, prefix: str) -> Fetcher:
    fetcher = world.fetcher(DataLimits())
    with trio.fail_after(DEADLINE_S):
        manifest = await fetcher.fetch_manifest(world.manifest_hash, [MirrorSource(prefix)])
        for shard in manifest.shards:
            await fetcher.fetch_shard(shard, [MirrorSource(prefix)])
    return fetcher


@pytest.mark.parametrize("path", ["", "/compressed", "/moved"])
async def test_nginx_is_a_mirror(world: World, nginx: str, path: str) -> None:
    fetcher = await take_all(world, nginx + path)
    assert [world.fetched(0), world.fetched(1)] == world.shards
    assert fetcher.statistics().source_failures == 0


async def test_what_nginx_refuses_is_said(world: World, nginx: str) -> None:
    with pytest.raises(Busy, match="answers 403 Forbidden"):
        await take_all(world, f"{nginx}/closed")


async def test_an_exported_model_is_a_mirror(world: World, tmp_path: Path) -> None:
    export(world.holder.store, [world.manifest_hash], tmp_path / "www")
    with tools.nginx(tmp_path / "www", tmp_path / "nginx") as url:
        fetcher = await take_all(world, url)
    assert [world.fetched(0), world.fetched(1)] == world.shards
    assert fetcher.statistics().source_failures == 0
