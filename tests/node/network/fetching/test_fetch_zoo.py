"""Every kind of bad source beside one honest one, on real sockets: the right bytes come in the end, the bad one costs
at most a piece and some seconds, and is named."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import trio

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, ShardHash
from node.network.addresses import DataAddress
from node.network.fetching import queue as queues
from node.network.fetching.fetcher import Fetcher
from node.network.fetching.statistics import SourceInfo
from node.network.identity import NodeIdentity
from node.network.pace import Share
from node.network.server import DataServer
from node.network.sources import GatewaySource, MirrorSource, PeerSource, Source
from node.network.web import HEAD_BYTES_MAX, REDIRECTS_MAX, WebClient
from node.network.wire import Channel, DataLimits, GetPieces, Have
from tests.node.network.fetching import webs
from tests.node.network.fetching.webs import Request, Web
from tests.node.network.test_data_plane import (
    DrippingServer,
    LyingServer,
    StallingServer,
    TruncatingServer,
    World,
    WrongSizeServer,
)

LIMITS = DataLimits(connect_s=1.0, handshake_s=1.0, idle_s=5.0, piece_s=1.5)
DEADLINE_S = 20.0


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Silence is noticed sooner than in the field."""
    monkeypatch.setattr(queues, "SILENT_S", 0.3)
    caplog.set_level(logging.INFO)


class Named(logging.Handler):
    """Set once the log names a source."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.event = threading.Event()
        self._source = str(source)

    def emit(self, record: logging.LogRecord) -> None:
        if self._source in record.getMessage():
            self.event.set()


def mirror(stack: ExitStack, answer: Callable[[Request], None], world: World) -> Web:
    return stack.enter_context(
        webs.serving(answer, webs.mirror_files(list(zip(world.manifest.shards, world.shards, strict=True))))
    )


def gateway(stack: ExitStack, answer: Callable[[Request], None], world: World) -> Web:
    return stack.enter_context(
        webs.serving(answer, webs.blocks(list(zip(world.manifest.shards, world.shards, strict=True))))
    )


def info(fetcher: Fetcher, source: Source) -> SourceInfo:
    return next(one for one in fetcher.statistics().sources if one.source == str(source))


async def fetch_beside_an_honest_one(world: World, bad: Source, stack: ExitStack, at_once: bool) -> SourceInfo:
    """The shard comes whole from an honest mirror; unless `at_once`, that one answers only after the log named the bad
    one, so that it is not done before the bad one is even asked."""
    named = Named(bad)
    logging.getLogger("node.network.fetching").addHandler(named)
    stack.callback(logging.getLogger("node.network.fetching").removeHandler, named)

    def honest(request: Request) -> None:
        assert at_once or named.event.wait(DEADLINE_S)
        webs.static(request)

    web = mirror(stack, honest, world)
    shard = world.manifest.shards[0]
    fetcher = world.fetcher(LIMITS)
    await fetcher.fetch_shard(shard, [bad, MirrorSource(web.url)])
    assert world.fetched(0) == world.shards[0]
    assert named.event.is_set(), "the log does not name it"
    found = info(fetcher, bad)
    assert found.trouble
    assert fetcher.statistics().bytes_fetched == shard.size
    ranges = [request for _, request in web.requests]
    assert len(ranges) == len(set(ranges)), "something was asked for twice"
    return found


MIRRORS: list[tuple[Callable[[Request], None], str, str]] = [
    (webs.error_page, "answers 200 OK (text/html) where 206 is due", "dropped"),
    (webs.whole_file, "answers 200 OK (no type) where 206 is due", "dropped"),
    (webs.beyond_its_end, "answers 416", "dropped"),
    (webs.too_short, "has 10 bytes where", "dropped"),
    (webs.compressed, "'gzip' encoding, which was not asked for", "dropped"),
    (webs.of_no_length, "does not say its length", "dropped"),
    (webs.another_range, "/8388608 is due", "dropped"),
    (webs.wrong_bytes, "came with wrong bytes", "dropped"),
    (webs.redirect_loop, f"redirects more than {REDIRECTS_MAX} times", "dropped"),
    (webs.redirect_to_itself, "redirects to nowhere else", "dropped"),
    (webs.redirect_nowhere, "redirects to nowhere else", "dropped"),
    (webs.redirect_to_a_file, "redirects to what is no address", "dropped"),
    (webs.redirect_to_metadata, "169.254.169.254, an address that nothing from outside may lead to", "dropped"),
    (webs.redirect_with_a_password, "carries a user name or password", "dropped"),
    (webs.endless_head, "", "dropped"),
    (webs.endless_continue, f"longer than {HEAD_BYTES_MAX:,} bytes", "dropped"),
    (webs.garbage, "is not HTTP", "dropped"),
    (webs.not_there, "answers 404", "failed"),
    (webs.broken, "answers 500", "failed"),
    (webs.hangs_up, "closed after 1,000 of 1,048,576 bytes", "failed"),
]


@pytest.mark.parametrize(("answer", "trouble", "state"), MIRRORS, ids=[answer.__name__ for answer, _, _ in MIRRORS])
async def test_a_bad_mirror(
    world: World, stack: ExitStack, answer: Callable[[Request], None], trouble: str, state: str
) -> None:
    bad = mirror(stack, answer, world)
    with trio.fail_after(DEADLINE_S):
        found = await fetch_beside_an_honest_one(world, MirrorSource(bad.url), stack, at_once=False)
    assert trouble in found.trouble
    assert (found.state, found.pieces) == (state, 0)


SLOW = [webs.silent, webs.stalls, webs.drips, webs.drips_its_head]


@pytest.mark.parametrize("answer", SLOW, ids=[answer.__name__ for answer in SLOW])
async def test_a_slow_mirror_is_taken_over_from(
    world: World, stack: ExitStack, answer: Callable[[Request], None]
) -> None:
    bad = mirror(stack, answer, world)
    with trio.fail_after(DEADLINE_S):
        began = trio.current_time()
        found = await fetch_beside_an_honest_one(world, MirrorSource(bad.url), stack, at_once=True)
    assert found.trouble.startswith("slow: piece ")
    assert found.pieces == 0
    assert trio.current_time() - began < LIMITS.piece_s, "it was waited for"
    assert len(bad.requests) == 1


@pytest.mark.parametrize("answer", SLOW, ids=[answer.__name__ for answer in SLOW])
async def test_a_slow_mirror_alone_is_given_up(
    world: World, stack: ExitStack, answer: Callable[[Request], None]
) -> None:
    bad = mirror(stack, answer, world)
    with trio.fail_after(DEADLINE_S), pytest.raises(Busy, match=r"stalled for 1\.5 s|too slow|closed"):
        await world.fetcher(LIMITS).fetch_shard(world.manifest.shards[0], [MirrorSource(bad.url)])


GATEWAYS: list[tuple[Callable[[Request], None], str, str]] = [
    (webs.error_page, "has 22 bytes where 1,048,576 are due", "dropped"),
    (webs.another_block, "came with wrong bytes", "dropped"),
    (webs.longer_block, "has 1,048,577 bytes where 1,048,576 are due", "dropped"),
    (webs.not_there, "answers 404", "failed"),
    (webs.broken, "answers 500", "failed"),
]


@pytest.mark.parametrize(("answer", "trouble", "state"), GATEWAYS, ids=[answer.__name__ for answer, _, _ in GATEWAYS])
async def test_a_bad_gateway(
    world: World, stack: ExitStack, answer: Callable[[Request], None], trouble: str, state: str
) -> None:
    bad = gateway(stack, answer, world)
    with trio.fail_after(DEADLINE_S):
        found = await fetch_beside_an_honest_one(world, GatewaySource(bad.url), stack, at_once=False)
    assert trouble in found.trouble
    assert (found.state, found.pieces) == (state, 0)


class BoastingServer(DataServer):
    """Claims to have all of a shard and gives nothing."""

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        super()._send_pieces(channel, share, msgspec.structs.replace(request, shard_hash=bytes(32)))


class ExaggeratingServer(DataServer):
    """Claims pieces that the shard does not have."""

    def _send_have(self, channel: Channel, node_id: object, shard_hash: ShardHash) -> None:
        channel.send_part(msgspec.msgpack.encode(Have(b"\xff" * 8, b"", ())))


class VerboseServer(DataServer):
    """Takes a gigabyte to say what it has."""

    def _send_have(self, channel: Channel, node_id: object, shard_hash: ShardHash) -> None:
        channel.send(b"\0\x40\x00\x00\x00")


class RamblingServer(DataServer):
    """Says what it has in no known words."""

    def _send_have(self, channel: Channel, node_id: object, shard_hash: ShardHash) -> None:
        channel.send_part(b"\x93\x01\x02")


class SilentServer(DataServer):
    """Never says what it has."""

    def _send_have(self, channel: Channel, node_id: object, shard_hash: ShardHash) -> None:
        channel.receive_frame(GetPieces)


PEERS = [
    (LyingServer, "came with wrong bytes", "dropped"),
    (TruncatingServer, "closed after", "failed"),
    (WrongSizeServer, "offers 4,294,967,295 bytes", "dropped"),
    (BoastingServer, "it refuses: shard 0000", "failed"),
    (ExaggeratingServer, "claims pieces beyond the 8 of the shard", "dropped"),
    (VerboseServer, "takes 1,073,741,824 bytes to say", "dropped"),
    (RamblingServer, "do not say what it has", "dropped"),
]


@pytest.mark.parametrize(("kind", "trouble", "state"), PEERS)
async def test_a_bad_peer(world: World, stack: ExitStack, kind: type[DataServer], trouble: str, state: str) -> None:
    liar = NodeIdentity.generate()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = world.source(await nursery.start(world.server(kind, identity=liar).run), liar)
            found = await fetch_beside_an_honest_one(world, bad, stack, at_once=False)
            nursery.cancel_scope.cancel()
    assert trouble in found.trouble
    assert found.state == state


@pytest.mark.parametrize("kind", [StallingServer, DrippingServer])
async def test_a_slow_peer_is_taken_over_from(world: World, stack: ExitStack, kind: type[DataServer]) -> None:
    slow = NodeIdentity.generate()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = world.source(await nursery.start(world.server(kind, identity=slow).run), slow)
            found = await fetch_beside_an_honest_one(world, bad, stack, at_once=True)
            nursery.cancel_scope.cancel()
    assert found.trouble.startswith("slow: piece ")


async def test_a_dead_source(world: World, stack: ExitStack) -> None:
    with webs.serving(webs.static, {}) as web:
        dead = MirrorSource(web.url)
    with trio.fail_after(DEADLINE_S):
        found = await fetch_beside_an_honest_one(world, dead, stack, at_once=False)
    assert "Connection refused" in found.trouble


async def test_all_of_them_at_once_beside_one_honest_one(world: World, stack: ExitStack) -> None:
    """More bad sources than connections: their places are taken by others as they fail."""
    bad = [MirrorSource(mirror(stack, answer, world).url) for answer, _, _ in MIRRORS]
    bad += [MirrorSource(mirror(stack, answer, world).url) for answer in SLOW]
    honest = MirrorSource(mirror(stack, webs.static, world).url)
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        for shard in world.manifest.shards:
            await fetcher.fetch_shard(shard, [*bad, honest])
    assert [world.fetched(0), world.fetched(1)] == world.shards
    assert info(fetcher, honest).pieces == fetcher.statistics().pieces_fetched == 12


async def test_silent_sources_do_not_keep_others_out(world: World, stack: ExitStack) -> None:
    """As many of them as there are connections, and an honest one that comes last."""
    silent = [MirrorSource(mirror(stack, webs.silent, world).url) for _ in range(3)]
    honest = MirrorSource(mirror(stack, webs.static, world).url)
    patient = DataLimits(piece_s=2 * DEADLINE_S)
    fetcher = Fetcher(world.wanter.store, world.wanter.identity, limits=patient, lanes_max=3, rng=Unshuffled())
    with trio.fail_after(DEADLINE_S):
        await fetcher.fetch_shard(world.manifest.shards[0], [*silent, honest])
    assert world.fetched(0) == world.shards[0]


class Unshuffled(random.Random):
    def shuffle(self, x: object) -> None:
        """As they come."""


async def test_a_dropped_source_is_not_asked_again(world: World, stack: ExitStack) -> None:
    bad = mirror(stack, webs.error_page, world)
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(Busy, match="answers 200"):
            await fetcher.fetch_shard(world.manifest.shards[0], [MirrorSource(bad.url)])
        with pytest.raises(Busy, match="is not asked for now: answers 200"):
            await fetcher.fetch_shard(world.manifest.shards[1], [MirrorSource(bad.url)])
    assert len(bad.requests) == 1


async def test_a_source_that_lies_once_it_is_trusted_costs_the_piece_it_lied_about(
    world: World, stack: ExitStack
) -> None:
    """The bytes beyond the shard's own: of one piece at most."""

    def lies_late(request: Request) -> None:
        first, end = request.range()
        at = 5 * PIECE_SIZE - first
        request.say_range(change=lambda body: body[:at] + b"!" + body[at + 1 :] if first <= at + first < end else body)

    bad, honest = mirror(stack, lies_late, world), mirror(stack, webs.static, world)
    fetcher = world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(Busy, match="wrong bytes"):
            await fetcher.fetch_shard(world.manifest.shards[0], [MirrorSource(bad.url)])
        kept = info(fetcher, MirrorSource(bad.url)).pieces
        await fetcher.fetch_shard(world.manifest.shards[0], [MirrorSource(honest.url)])
    assert kept >= 5
    assert info(fetcher, MirrorSource(honest.url)).pieces == 8 - kept
    assert world.fetched(0) == world.shards[0]


async def test_no_name_may_lead_to_loopback_and_no_redirect_to_where_is_more_private(
    world: World, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs a mirror must not have nodes call services of their own machines and networks."""
    web = mirror(stack, webs.static, world)

    async def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        address = {"mirror.example": "127.0.0.1", "metadata.example": "169.254.169.254"}[host]
        return [(0, 0, 0, "", (address, port))]

    monkeypatch.setattr(trio.socket, "getaddrinfo", look_up)
    with WebClient(LIMITS) as client:
        for host in ("mirror.example", "metadata.example"):
            with pytest.raises(BadPeer, match="an address that nothing from outside may lead to"):
                await client.get(f"http://{host}:{web.server_port}/", lambda answer: answer.status)
    assert web.requests == []


async def test_who_has_a_shard_proves_it_by_a_piece_and_who_only_says_so_does_not(
    world: World, stack: ExitStack
) -> None:
    """Nothing of it is kept, whoever is asked; who fails is named among the sources."""
    shard, fetcher = world.manifest.shards[0], world.fetcher(LIMITS)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            peer = world.source(await nursery.start(world.server().run))
            assert await fetcher.proves(shard, peer)
            world.holder.store.remove(shard.sha256)
            assert not await fetcher.proves(shard, peer)
            nursery.cancel_scope.cancel()
        for answer, does in ((webs.static, True), (webs.wrong_bytes, False), (webs.not_there, False)):
            source = MirrorSource(mirror(stack, answer, world).url)
            assert await fetcher.proves(shard, source) == does
            assert does or info(fetcher, source).trouble
        gone = PeerSource(peer.node_id, DataAddress("127.0.0.1", 1))
        assert not await fetcher.proves(shard, gone)
    assert world.wanter.store.statistics().partial_shards == 0
