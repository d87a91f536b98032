"""Pieces that go packed, over real TLS on loopback: when they do, what counts, and servers that pack in bad faith."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
import zstandard

from contracts.errors import Busy
from contracts.types import PIECE_SIZE, ShardHash
from node.network.client import PeerConnection
from node.network.fetching.chooser import GROUP_PIECES
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.pace import Pace, Share
from node.network.planes import Packer
from node.network.server import DataServer
from node.network.wire import Challenge, Channel, DataLimits, GetPieces, Status, packed_bits
from tests.node.network.artifacts import weights
from tests.node.network.test_data_plane import DEADLINE_S, FAST, World, dropped, with_connection

PIECES = 40
"""More than half of them are packed only by choice: a connection chooses after 24, of which 12 were packed to see."""
SLOW = 8_000_000
"""Bytes a second: a piece takes several times longer than packing it does."""


class CountingPace(Pace):
    """A limit that notes what it was asked for."""

    def __init__(self, bytes_per_s: int) -> None:
        super().__init__(bytes_per_s)
        self.taken = 0

    def take(self, share: Share, size_bytes: int) -> None:
        self.taken += size_bytes
        super().take(share, size_bytes)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """With a shard long enough to choose the faster way."""
    return weights_world(tmp_path, PIECES)


@pytest.fixture
def small(tmp_path: Path) -> World:
    """With a shard long enough to ask for pieces both ways."""
    return weights_world(tmp_path, 3 * GROUP_PIECES)


def weights_world(path: Path, pieces: int) -> World:
    data = weights(8 * PIECE_SIZE - 777) * (pieces // 8 + 1)
    return World(path, shard_size=pieces * PIECE_SIZE, data=data[: pieces * PIECE_SIZE - 777])


def server(
    world: World,
    kind: type[DataServer] = DataServer,
    *,
    pace: Pace | None = None,
    compression: bool = True,
    limits: DataLimits = FAST,
) -> DataServer:
    return kind(
        world.holder.identity,
        world.holder.store,
        is_member=world.members.__contains__,
        listen_host="127.0.0.1",
        listen_port=0,
        limits=limits,
        pace=pace,
        compression=compression,
    )


def fetcher(world: World, pace: Pace | None = None, compression: bool = True) -> Fetcher:
    """One connection for each source."""
    return Fetcher(
        world.wanter.store, world.wanter.identity, limits=FAST, pace=pace, lanes_max=1, compression=compression
    )


async def fetch(world: World, serving: DataServer, fetching: Fetcher) -> None:
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(serving.run))
            seen: list[int] = []
            await fetching.fetch_shard(shard, [source], seen.append)
            assert (seen[0], seen[-1], len(seen)) == (0, shard.size, shard.piece_count + 1)
            nursery.cancel_scope.cancel()
    assert world.fetched(0) == world.shards[0]
    assert fetching.statistics().bytes_fetched == serving.statistics().bytes_served == shard.size
    assert fetching.statistics().bytes_saved == serving.statistics().bytes_saved


async def test_over_a_slow_link_weights_come_packed_and_the_limit_counts_what_goes_over_it(world: World) -> None:
    pace, incoming = CountingPace(SLOW), CountingPace(0)
    serving = server(world, pace=pace)
    await fetch(world, serving, fetcher(world, incoming))
    found = serving.statistics()
    assert found.pieces_packed > PIECES // 2
    assert pace.taken == incoming.taken == found.bytes_served - found.bytes_saved
    assert found.bytes_saved > 0.25 * found.pieces_packed * PIECE_SIZE
    assert pace.taken < 0.9 * world.manifest.shards[0].size


async def test_without_a_limit_on_loopback_pieces_come_as_they_are_once_it_is_measured(world: World) -> None:
    serving = server(world)
    await fetch(world, serving, fetcher(world))
    assert 0 < serving.statistics().pieces_packed < PIECES // 2


@pytest.mark.parametrize(("ours", "theirs"), [(True, False), (False, True), (False, False)])
async def test_who_does_not_want_it_gets_and_gives_pieces_as_they_are(small: World, ours: bool, theirs: bool) -> None:
    serving = server(small, compression=theirs)
    await fetch(small, serving, fetcher(small, compression=ours))
    assert serving.statistics().pieces_packed == 0


async def test_while_others_are_packing_pieces_go_out_as_they_are(small: World) -> None:
    serving = server(small, limits=DataLimits(packers_max=1))
    with serving._packers:
        await fetch(small, serving, fetcher(small))
    assert serving.statistics().pieces_packed == 0


async def test_what_does_not_shrink_goes_out_as_it_is(tmp_path: Path) -> None:
    noise = World(tmp_path)
    serving = server(noise)
    await fetch(noise, serving, fetcher(noise))
    assert (serving.statistics().pieces_packed, serving.statistics().bytes_saved) == (0, 0)


async def test_only_the_pieces_that_may_come_packed_do(small: World) -> None:
    shard = small.manifest.shards[0]
    sizes: list[int] = []

    def use(connection: PeerConnection) -> bytes:
        may = [False, True, True, False, True]
        pieces = connection.pieces(shard.sha256, shard.size, 3, 5, may, sizes.append)
        return b"".join(bytes(piece) for piece in pieces)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            serving = server(small)
            source = small.source(await nursery.start(serving.run))
            came = await with_connection(source, small.wanter.identity, FAST, use)
            nursery.cancel_scope.cancel()
    assert came == small.shards[0][3 * PIECE_SIZE : 8 * PIECE_SIZE]
    assert [size < 0.75 * PIECE_SIZE for size in sizes] == [False, True, True, False, True]


# Those who know nothing of packing


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    ends = socket.socketpair()
    with ends[0], ends[1]:
        pair = Channel(ends[0]), Channel(ends[1])
        for channel in pair:
            channel.within(5.0)
        yield pair


def frame(**fields: object) -> bytes:
    data = msgspec.msgpack.encode(fields)
    return len(data).to_bytes(4) + data


def test_frames_of_those_who_know_nothing_of_packing_are_understood() -> None:
    with channels() as (one, other):
        one.send(frame(type="Challenge", nonce=bytes(32)))
        assert other.receive_frame(Challenge) == Challenge(bytes(32), packs=False)
        one.send(frame(type="GetPieces", shard_hash=bytes(32), first=7, count=2))
        request = other.receive_frame(GetPieces)
        assert [request.may_pack(index) for index in (7, 8)] == [False, False]


def test_words_of_those_who_know_more_are_passed_over() -> None:
    """So do nodes from before there was packing pass over its words."""
    with channels() as (one, other):
        one.send(frame(type="Challenge", nonce=bytes(32), packs=True, also="brotli"))
        assert other.receive_frame(Challenge).packs


def test_which_pieces_may_come_packed_is_said_in_bits() -> None:
    may = [True, False, False, True, True, False, False, False, False, True]
    request = GetPieces(bytes(32), 100, 10, packed_bits(may))
    assert request.packed == b"\x19\x02"
    assert [request.may_pack(index) for index in range(100, 110)] == may
    assert packed_bits([False] * 1024) == b""
    assert len(packed_bits([True] * 1024)) == 128
    with channels() as (one, other):
        one.send_frame(GetPieces(bytes(32), 2**32 - 1, 1024, packed_bits([True] * 1024)))
        assert other.receive_frame(GetPieces).may_pack(2**32 + 1022)


async def test_more_bits_than_pieces_can_be_asked_for_are_refused(small: World) -> None:
    def use(connection: PeerConnection) -> None:
        sha256 = small.manifest.shards[0].sha256
        connection._channel.send(frame(type="GetPieces", shard_hash=sha256, first=0, count=1, packed=bytes(129)))
        connection._channel.receive_part()

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = small.source(await nursery.start(server(small).run))
            with pytest.raises(Busy, match="that is none"):
                await with_connection(source, small.wanter.identity, FAST, use)
            nursery.cancel_scope.cancel()


# Bad faith


class PackingServer(DataServer):
    """Packs as it likes."""

    def _pack(self, packer: Packer, piece: memoryview) -> bytes | None:
        return self.packed(bytes(piece))

    def packed(self, piece: bytes) -> bytes:
        raise NotImplementedError


class BombServer(PackingServer):
    def packed(self, piece: bytes) -> bytes:
        return b"\2" + zstandard.compress(bytes(64 << 20))


class NoiseServer(PackingServer):
    def packed(self, piece: bytes) -> bytes:
        return b"\2" + piece[:1000]


class OtherBytesServer(PackingServer):
    """What it packs is of the right size and unpacks well."""

    def packed(self, piece: bytes) -> bytes:
        return b"\1" + zstandard.compress(bytes(len(piece)))


class NothingServer(PackingServer):
    def packed(self, piece: bytes) -> bytes:
        return b""


class LargerServer(PackingServer):
    def packed(self, piece: bytes) -> bytes:
        return b"\1" + piece


class UnaskedServer(DataServer):
    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        piece = self._shelf.piece(ShardHash(request.shard_hash), request.first)
        packed = Packer().pack(piece)
        assert packed is not None
        channel.send_part(packed, Status.PACKED)


class PackedManifestServer(DataServer):
    def _send_manifest(self, channel: Channel, manifest_hash: object) -> None:
        channel.send_part(b"\1 a packed manifest", Status.PACKED)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (BombServer, "comes in a frame that says it has 67,108,864 bytes where 1,048,576 are due"),
        (NoiseServer, "comes in 1,001 bytes that cannot be unpacked"),
        (OtherBytesServer, "came with wrong bytes"),
        (NothingServer, "packs the 1,048,576 bytes of piece 4 in 0"),
        (LargerServer, "packs the 1,048,576 bytes of piece 4 in 1,048,577"),
        (UnaskedServer, "packs piece 0, which was to come as it is"),
    ],
)
async def test_a_server_that_packs_in_bad_faith_is_dropped_and_named(
    small: World, kind: type[DataServer], reason: str
) -> None:
    shard = small.manifest.shards[0]
    fetching = fetcher(small)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = small.source(await nursery.start(server(small, kind).run))
            with pytest.raises(Busy, match=reason) as caught:
                await fetching.fetch_shard(shard, [bad])
            assert str(bad) in str(caught.value)
            assert dropped(fetching) == [str(bad)]
            honest_identity = NodeIdentity.generate()
            honest = small.source(await nursery.start(small.server(identity=honest_identity).run), honest_identity)
            await fetching.fetch_shard(shard, [bad, honest])
            nursery.cancel_scope.cancel()
    assert small.fetched(0) == small.shards[0]


async def test_nothing_but_pieces_comes_packed(small: World) -> None:
    fetching = fetcher(small)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = small.source(await nursery.start(server(small, PackedManifestServer).run))
            with pytest.raises(Busy, match="a packed piece of 19 bytes where none is due"):
                await fetching.fetch_manifest(small.manifest_hash, [bad])
            nursery.cancel_scope.cancel()
    assert dropped(fetching) == [str(bad)]
