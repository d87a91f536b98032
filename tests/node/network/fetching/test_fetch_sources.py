"""Honest sources of all three kinds, several at once; swarms of nodes that fetch the same; limits; addresses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from contracts.errors import BadInput, Busy
from contracts.types import PIECE_SIZE, ManifestHash, NodeId
from node.network.addresses import DataAddress
from node.network.client import connected
from node.network.fetching.fetcher import Fetcher
from node.network.fetching.progress import FetchProgress
from node.network.fetching.statistics import SourceInfo
from node.network.identity import NodeIdentity
from node.network.pace import BURST_S, Pace, Share
from node.network.server import DataServer
from node.network.sources import GatewaySource, MirrorSource, PeerSource, web_source
from node.network.wire import Channel, DataLimits, GetPieces, NotThere
from node.storage.store import ShardStore
from node.storage.unixfs import cid_text, raw_cid
from tests.node.network.artifacts import make, put
from tests.node.network.fakes import until
from tests.node.network.fetching import webs
from tests.node.network.fetching.webs import Request
from tests.node.network.test_data_plane import World

DEADLINE_S = 30.0
LIMITS = DataLimits(connect_s=5.0, handshake_s=5.0, piece_s=10.0)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def infos(fetcher: Fetcher) -> dict[str, SourceInfo]:
    return {one.source: one for one in fetcher.statistics().sources}


def meeting(barrier: threading.Barrier, answer: Callable[[Request], None]) -> Callable[[Request], None]:
    """The first answer waits until the other sources were asked too."""
    met = threading.Event()

    def answered(request: Request) -> None:
        if not met.is_set():
            met.set()
            barrier.wait(DEADLINE_S)
        answer(request)

    return answered


class MeetingServer(DataServer):
    barrier: threading.Barrier
    met = False

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        if not self.met:
            self.met = True
            self.barrier.wait(DEADLINE_S)
        super()._send_pieces(channel, share, request)


async def test_a_peer_a_mirror_and_a_gateway_bring_one_shard_together(world: World, stack: ExitStack) -> None:
    barrier = threading.Barrier(3)
    shards = list(zip(world.manifest.shards, world.shards, strict=True))
    mirror = stack.enter_context(webs.serving(meeting(barrier, webs.static), webs.mirror_files(shards)))
    gateway = stack.enter_context(webs.serving(meeting(barrier, webs.gateway), webs.blocks(shards)))
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(MeetingServer)
            assert isinstance(server, MeetingServer)
            server.barrier = barrier
            sources = [
                world.source(await nursery.start(server.run)),
                MirrorSource(mirror.url),
                GatewaySource(gateway.url),
            ]
            fetcher = world.fetcher(LIMITS)
            await fetcher.fetch_shard(world.manifest.shards[0], sources)
            nursery.cancel_scope.cancel()
    assert world.fetched(0) == world.shards[0]
    assert all(infos(fetcher)[str(source)].pieces > 0 for source in sources)
    assert sum(one.pieces for one in infos(fetcher).values()) == 8


@pytest.mark.parametrize("kind", ["mirror", "gateway"])
async def test_the_last_short_shard_from_a_web_server_alone(world: World, stack: ExitStack, kind: str) -> None:
    shard = (world.manifest.shards[1], world.shards[1])
    if kind == "mirror":
        web = stack.enter_context(webs.serving(webs.static, webs.mirror_files([shard])))
        source: MirrorSource | GatewaySource = MirrorSource(web.url)
    else:
        web = stack.enter_context(webs.serving(webs.gateway, webs.blocks([shard])))
        source = GatewaySource(web.url)
    with trio.fail_after(DEADLINE_S):
        await world.fetcher(LIMITS).fetch_shard(world.manifest.shards[1], [source])
    assert world.fetched(1) == world.shards[1]
    assert len(web.requests) <= 4


async def test_neighbouring_pieces_are_one_request_to_a_mirror(tmp_path: Path, stack: ExitStack) -> None:
    size = 64 * PIECE_SIZE
    world = World(tmp_path, size, size)
    web = stack.enter_context(
        webs.serving(webs.static, webs.mirror_files([(world.manifest.shards[0], world.shards[0])]))
    )
    with trio.fail_after(DEADLINE_S):
        await world.fetcher(LIMITS).fetch_shard(world.manifest.shards[0], [MirrorSource(web.url)])
    assert world.fetched(0) == world.shards[0]
    assert len(web.requests) < 40


async def test_a_mirror_may_redirect_within_bounds(world: World, stack: ExitStack) -> None:
    shard = (world.manifest.shards[0], world.shards[0])
    files = webs.mirror_files([shard])
    files |= {f"/elsewhere{path}": data for path, data in files.items()}
    target = stack.enter_context(webs.serving(webs.static, files))
    web = stack.enter_context(webs.serving(webs.redirecting(f"{target.url}/elsewhere"), {}))
    with trio.fail_after(DEADLINE_S):
        await world.fetcher(LIMITS).fetch_shard(world.manifest.shards[0], [MirrorSource(web.url)])
    assert world.fetched(0) == world.shards[0]
    assert {path.split("/")[1] for path, _ in target.requests} == {"elsewhere"}


async def test_a_mirror_over_which_the_connection_ends_after_each_answer(world: World, stack: ExitStack) -> None:
    def closing(request: Request) -> None:
        request.say_range({"Connection": "close"})

    web = stack.enter_context(webs.serving(closing, webs.mirror_files([(world.manifest.shards[0], world.shards[0])])))
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        await fetcher.fetch_shard(world.manifest.shards[0], [MirrorSource(web.url)])
    assert world.fetched(0) == world.shards[0]
    assert fetcher.statistics().source_failures == 0


@pytest.mark.parametrize("kind", ["mirror", "gateway"])
async def test_a_manifest_from_a_web_server(world: World, stack: ExitStack, kind: str) -> None:
    data = world.manifest.encode()
    block = f"/ipfs/{cid_text(raw_cid(world.manifest_hash))}?format=raw"
    files = {f"/manifests/{world.manifest_hash.hex()}": data, block: data}
    web = stack.enter_context(webs.serving(webs.gateway if kind == "gateway" else webs.static, files))
    liar = stack.enter_context(webs.serving(webs.error_page, {}))
    make_source = GatewaySource if kind == "gateway" else MirrorSource
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(Busy, match="are not the manifest"):
            await fetcher.fetch_manifest(world.manifest_hash, [make_source(liar.url)])
        with pytest.raises(Busy, match="answers 404"):
            await fetcher.fetch_manifest(ManifestHash(bytes(32)), [make_source(web.url)])
        assert await fetcher.fetch_manifest(world.manifest_hash, [make_source(web.url)]) == world.manifest


async def test_a_store_is_a_mirrors_directory(world: World, stack: ExitStack) -> None:
    """Its layout is the one mirrors have, so that any static server over it is one."""
    root = world.holder.store.root
    files = {f"/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}
    source = MirrorSource(stack.enter_context(webs.serving(webs.static, files)).url)
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        manifest = await fetcher.fetch_manifest(world.manifest_hash, [source])
        for shard in manifest.shards:
            await fetcher.fetch_shard(shard, [source])
    assert [world.fetched(0), world.fetched(1)] == world.shards


# A swarm


async def test_what_has_come_of_a_shard_in_flight_is_served_and_told(world: World) -> None:
    shard, data = world.manifest.shards[0], world.shards[0]
    wanter = world.wanter
    wanter.store.put_manifest(world.manifest.encode(), world.manifest_hash)
    server = DataServer(
        wanter.identity, wanter.store, is_member=lambda _: True, listen_host="127.0.0.1", listen_port=0, limits=LIMITS
    )
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(server.run), wanter.identity)
            async with connected(source, world.holder.identity, LIMITS) as peer:

                def have() -> bytes:
                    return peer.have(shard.sha256, shard.piece_count).bits

                def piece(index: int) -> bytes:
                    return bytes(next(peer.pieces(shard.sha256, shard.size, index, 1)))

                with pytest.raises(NotThere, match="nothing of shard"):
                    await peer.run(have)
                with wanter.store.open_partial(shard.sha256, shard.size, shard.pieces) as partial:
                    for index in (1, 5, 6):
                        partial.write(index, data[index * PIECE_SIZE : (index + 1) * PIECE_SIZE])
                    assert await peer.run(have) == bytes([0b01100010])
                    assert await peer.run(lambda: piece(5)) == data[5 * PIECE_SIZE : 6 * PIECE_SIZE]
                    with pytest.raises(NotThere):
                        await peer.run(lambda: piece(4))
                    for index in partial.missing():
                        partial.write(index, data[index * PIECE_SIZE : (index + 1) * PIECE_SIZE])
                    partial.commit()
                assert await peer.run(have) == b"", "all of it"

                def given() -> bytes:
                    return peer.have(shard.sha256, shard.piece_count).given

                assert await peer.run(given) == bytes([0b00110000]), "what it was asked for"
                assert await peer.run(lambda: piece(4)) == data[4 * PIECE_SIZE : 5 * PIECE_SIZE]
            nursery.cancel_scope.cancel()


class SwarmNode:
    """A node that fetches and serves what it has."""

    def __init__(self, path: Path, swarm: dict[NodeId, PeerSource]) -> None:
        self.identity = NodeIdentity.generate()
        self.store = ShardStore(path, reserve_bytes=0)
        self.fetcher = Fetcher(
            self.store,
            self.identity,
            limits=LIMITS,
            locate=lambda node_id: [swarm[node_id]] if node_id in swarm else [],
        )

    def server(self, pace: Pace | None = None) -> DataServer:
        token = trio.lowlevel.current_trio_token()
        return DataServer(
            self.identity,
            self.store,
            is_member=lambda _: True,
            listen_host="127.0.0.1",
            listen_port=0,
            on_asked=lambda shard_hash, node_id: token.run_sync_soon(self.fetcher.hear_of, shard_hash, node_id),
            coming=self.fetcher.coming,
            limits=LIMITS,
            pace=pace,
        )


async def test_a_swarm_lives_on_what_its_nodes_have(tmp_path: Path) -> None:
    """The seeder's link is narrow, and its bytes go round: it gives little more than each piece once."""
    count, nodes = 48, 4
    manifest, shards = make(count * PIECE_SIZE, count * PIECE_SIZE)
    swarm: dict[NodeId, PeerSource] = {}
    seeder = SwarmNode(tmp_path / "seeder", swarm)
    put(seeder.store, manifest, shards)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            seeding = seeder.server(Pace(24 * PIECE_SIZE))
            servers = []
            source = PeerSource(seeder.identity.node_id, DataAddress("127.0.0.1", await nursery.start(seeding.run)))
            others = [SwarmNode(tmp_path / str(number), swarm) for number in range(nodes)]
            for node in others:
                node.store.put_manifest(manifest.encode(), manifest.manifest_hash())
                servers.append(node.server())
                port = await nursery.start(servers[-1].run)
                swarm[node.identity.node_id] = PeerSource(node.identity.node_id, DataAddress("127.0.0.1", port))
            async with trio.open_nursery() as fetching:
                for node in others:
                    fetching.start_soon(node.fetcher.fetch_shard, manifest.shards[0], [source])
            nursery.cancel_scope.cancel()
    for node in others:
        assert node.store.path(manifest.shards[0].sha256).read_bytes() == shards[0]
        assert node.fetcher.statistics().source_failures == 0, node.fetcher.statistics().sources
    from_seeder = seeding.statistics().pieces_served
    from_others = sum(server.statistics().pieces_served for server in servers)
    assert from_seeder + from_others >= nodes * count
    assert from_seeder <= 2 * count, f"{from_seeder} of {nodes * count} pieces came from the seeder"


# Limits


async def test_an_upload_limit_is_kept_and_shared_fairly(tmp_path: Path) -> None:
    """One peer on many connections gets no more than one on a single one."""
    rate, size = 16 * PIECE_SIZE, 16 * PIECE_SIZE
    world = World(tmp_path, size, size)
    greedy, modest = NodeIdentity.generate(), NodeIdentity.generate()
    got = {greedy.node_id: 0, modest.node_id: 0}
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            pace = Pace(rate)
            server = DataServer(
                world.holder.identity,
                world.holder.store,
                is_member=lambda _: True,
                listen_host="127.0.0.1",
                listen_port=0,
                pace=pace,
            )
            source = world.source(await nursery.start(server.run))
            began, ended = time.monotonic(), trio.Event()

            async def draw(identity: NodeIdentity) -> None:
                async with connected(source, identity, LIMITS) as peer:
                    while sum(got.values()) < 32:
                        await peer.run(lambda: list(peer.pieces(shard.sha256, shard.size, 0, 1)))
                        got[identity.node_id] += 1
                ended.set()

            async with trio.open_nursery() as drawing:
                for identity in (greedy, greedy, greedy, modest):
                    drawing.start_soon(draw, identity)
                await ended.wait()
                drawing.cancel_scope.cancel()
            seconds = time.monotonic() - began
            nursery.cancel_scope.cancel()
    assert seconds > 32 * PIECE_SIZE / rate - BURST_S - 0.3
    assert got[modest.node_id] >= 12, got


async def test_a_download_limit_is_kept(world: World, stack: ExitStack) -> None:
    web = stack.enter_context(
        webs.serving(webs.static, webs.mirror_files([(world.manifest.shards[0], world.shards[0])]))
    )
    fetcher = Fetcher(world.wanter.store, world.wanter.identity, limits=LIMITS, pace=Pace(8 * PIECE_SIZE))
    began = time.monotonic()
    with trio.fail_after(DEADLINE_S):
        await fetcher.fetch_shard(world.manifest.shards[0], [MirrorSource(web.url)])
    assert time.monotonic() - began > 1.0 - BURST_S - 0.2
    assert world.fetched(0) == world.shards[0]


async def test_a_fetch_that_waits_for_its_limit_can_be_cancelled(world: World, stack: ExitStack) -> None:
    web = stack.enter_context(
        webs.serving(webs.static, webs.mirror_files([(world.manifest.shards[0], world.shards[0])]))
    )
    fetcher = Fetcher(world.wanter.store, world.wanter.identity, limits=LIMITS, pace=Pace(1000))
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.fetch_shard, world.manifest.shards[0], [MirrorSource(web.url)])
            await until(lambda: fetcher.statistics().pieces_fetched)
            began = trio.current_time()
            nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 5
    assert fetcher.statistics().flights == ()


async def test_with_a_narrow_link_few_are_served_at_once(world: World) -> None:
    """A crowd on a narrow link would have each wait longer for a piece than it waits."""
    pace = Pace(PIECE_SIZE // 5)
    server = DataServer(
        world.holder.identity,
        world.holder.store,
        is_member=lambda _: True,
        listen_host="127.0.0.1",
        listen_port=0,
        limits=LIMITS,
        pace=pace,
    )
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(server.run))
            async with connected(source, world.wanter.identity, LIMITS):
                with pytest.raises(Busy, match="1 connections are open, the most this node serves"):
                    async with connected(source, NodeIdentity.generate(), LIMITS):
                        pass
            nursery.cancel_scope.cancel()


# Progress


async def test_progress_has_a_rate_and_never_goes_back(
    world: World, stack: ExitStack, autojump_clock: trio.testing.MockClock
) -> None:
    progress = FetchProgress(0, 300)
    progress.report(0, 50)
    assert (progress.bytes_done, progress.rate()) == (50, 0.0), "it lay here already"
    for here in (60, 70, 80):
        await trio.sleep(1)
        progress.report(0, here)
    assert progress.rate() == pytest.approx(15.0)
    progress.report(1, 0)
    progress.report(0, 10)
    assert progress.bytes_done == 80, "a damaged piece is no step back to whoever waits"
    progress.report(1, 100)
    assert progress.bytes_done == 110


async def test_all_who_wait_for_a_shard_see_it_come(world: World, stack: ExitStack) -> None:
    web = stack.enter_context(
        webs.serving(webs.static, webs.mirror_files([(world.manifest.shards[0], world.shards[0])]))
    )
    fetcher = world.fetcher(LIMITS)
    seen: list[list[int]] = [[], []]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for reports in seen:
                nursery.start_soon(
                    fetcher.fetch_shard, world.manifest.shards[0], [MirrorSource(web.url)], reports.append
                )
    first, second = seen
    assert first[:9] == second[:9] == [index * PIECE_SIZE for index in range(9)]


# Addresses


def test_mirrors_as_the_ledger_has_them() -> None:
    assert web_source("http", "https://example.org/models/") == MirrorSource("https://example.org/models")
    assert web_source("ipfs", "http://[::1]:8080") == GatewaySource("http://[::1]:8080")
    shard = bytes(31) + b"\1"
    assert MirrorSource("http://m/x").shard_url(shard) == f"http://m/x/shards/{shard.hex()}"


@pytest.mark.parametrize(
    ("uri", "match"),
    [
        ("ftp://example.org/", "expected http"),
        ("file:///etc/passwd", "expected http"),
        ("bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi", "expected http"),
        ("http://", "expected http"),
        ("http://example.org:0/", "expected http"),
        ("http://example.org:99999/", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://a b/", "expected http"),
        ("http://a\n/", "expected http"),
        ("http://me:secret@example.org/", "carries a user name or password"),
        ("http://example.org/?x=1", "has a query"),
        ("http://example.org/#x", "has a fragment"),
        ("http://example.org/" + "x" * 3000, "at most 2,048"),
    ],
)
def test_addresses_that_are_none(uri: str, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        web_source("http", uri)
    assert "secret" not in str(caught.value)
