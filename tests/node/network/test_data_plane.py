"""Pieces over real TLS on loopback: honest servers, and every kind of other."""

import functools
import os
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.testing

from contracts.errors import BadInput, Busy, Conflict
from contracts.types import PIECE_SIZE, NodeId, ShardHash
from node.network.addresses import DataAddress
from node.network.client import PeerConnection, connected
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity, client_context
from node.network.pace import Share
from node.network.server import DataServer
from node.network.sources import PeerSource
from node.network.wire import (
    Challenge,
    Channel,
    DataLimits,
    GetPieces,
    Proof,
    piece_bytes,
    proof_bytes,
    run_blocking,
)
from node.storage.store import ShardStore
from tests.node.network.artifacts import describe, make, put
from tests.node.network.fakes import until

T = TypeVar("T")

DEADLINE_S = 30.0
FAST = DataLimits(connect_s=5.0, handshake_s=5.0, idle_s=5.0, piece_s=5.0)
IMPATIENT = DataLimits(connect_s=0.5, handshake_s=0.5, idle_s=0.5, piece_s=0.5)
PATIENT = DataLimits(handshake_s=20.0, idle_s=20.0, piece_s=20.0)
SHARD_SIZE = 8 * PIECE_SIZE
SIZE = SHARD_SIZE + 3 * PIECE_SIZE + 4321


class Node:
    """A node's identity and store."""

    def __init__(self, path: Path) -> None:
        self.identity = NodeIdentity.generate()
        self.store = ShardStore(path, reserve_bytes=0)


class World:
    """One node that holds an artifact and one that wants it."""

    def __init__(self, path: Path, size: int = SIZE, shard_size: int = SHARD_SIZE, data: bytes | None = None) -> None:
        self.holder = Node(path / "holder")
        self.wanter = Node(path / "wanter")
        self.manifest, self.shards = make(size, shard_size) if data is None else describe(data, shard_size)
        self.manifest_hash = put(self.holder.store, self.manifest, self.shards)
        self.members = {self.holder.identity.node_id, self.wanter.identity.node_id}
        self.damaged: list[tuple[ShardHash, int]] = []
        self.public: set[bytes] = set()
        self.asked: list[NodeId] = []

    def server(
        self,
        kind: Callable[..., DataServer] = DataServer,
        *,
        port: int = 0,
        limits: DataLimits = FAST,
        identity: NodeIdentity | None = None,
        plain: bool = False,
    ) -> DataServer:
        return kind(
            identity or self.holder.identity,
            self.holder.store,
            is_member=self.members.__contains__,
            listen_host="127.0.0.1",
            listen_port=port,
            on_damage=lambda shard, index: self.damaged.append((shard, index)),
            on_asked=lambda shard, node_id: self.asked.append(node_id),
            public=lambda: self.public,
            limits=limits,
            plain=plain,
        )

    def source(self, port: int, identity: NodeIdentity | None = None, plain: bool = False) -> PeerSource:
        return PeerSource((identity or self.holder.identity).node_id, DataAddress("127.0.0.1", port, plain))

    def fetcher(self, limits: DataLimits = FAST, plain: bool = False) -> Fetcher:
        return Fetcher(self.wanter.store, self.wanter.identity, limits=limits, plain=plain)

    def fetched(self, index: int) -> bytes:
        return self.wanter.store.path(self.manifest.shards[index].sha256).read_bytes()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def with_connection(
    source: PeerSource, identity: NodeIdentity, limits: DataLimits, use: Callable[[PeerConnection], T]
) -> T:
    """What `use` makes of an admitted connection, in a worker thread."""
    async with connected(source, identity, limits) as connection:
        return await connection.run(lambda: use(connection))


def dropped(fetcher: Fetcher) -> list[str]:
    return [source.source for source in fetcher.statistics().sources if source.state == "dropped"]


def open_sockets() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


async def test_manifest_and_shards_arrive_and_nothing_is_fetched_twice(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            sources = [world.source(await nursery.start(server.run))]
            fetcher = world.fetcher()
            manifest = await fetcher.fetch_manifest(world.manifest_hash, sources)
            assert manifest == world.manifest
            for shard in manifest.shards:
                seen: list[int] = []
                await fetcher.fetch_shard(shard, sources, seen.append)
                assert seen == sorted(set(seen))
                assert (seen[0], seen[-1], len(seen)) == (0, shard.size, shard.piece_count + 1)
            assert [world.fetched(0), world.fetched(1)] == world.shards
            await fetcher.fetch_manifest(world.manifest_hash, [])
            await fetcher.fetch_shard(manifest.shards[0], [])
            statistics = fetcher.statistics()
            assert (statistics.shards_fetched, statistics.manifests_fetched) == (2, 1)
            assert (statistics.pieces_fetched, statistics.bytes_fetched) == (12, SIZE)
            assert server.statistics().pieces_served == 12
            nursery.cancel_scope.cancel()


async def test_a_manifest_damaged_on_disk_is_fetched_again(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            sources = [world.source(await nursery.start(world.server().run))]
            fetcher = world.fetcher()
            await fetcher.fetch_manifest(world.manifest_hash, sources)
            path = world.wanter.store.root / "manifests" / world.manifest_hash.hex()
            path.write_bytes(path.read_bytes()[:-1])
            assert await fetcher.fetch_manifest(world.manifest_hash, sources) == world.manifest
            assert await fetcher.fetch_manifest(world.manifest_hash, []) == world.manifest
            nursery.cancel_scope.cancel()


async def test_the_same_shard_asked_for_at_once_is_fetched_once(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            sources = [world.source(await nursery.start(server.run))]
            fetcher = world.fetcher()
            async with trio.open_nursery() as fetches:
                for _ in range(5):
                    fetches.start_soon(fetcher.fetch_shard, world.manifest.shards[0], sources)
            assert server.statistics().pieces_served == 8
            assert world.fetched(0) == world.shards[0]
            nursery.cancel_scope.cancel()


async def test_a_stranger_is_refused_with_the_reason(world: World) -> None:
    world.members.discard(world.wanter.identity.node_id)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            sources = [world.source(await nursery.start(server.run))]
            with pytest.raises(Busy, match="is no member of this network"):
                await world.fetcher().fetch_shard(world.manifest.shards[0], sources)
            assert server.statistics().pieces_served == 0
            nursery.cancel_scope.cancel()


async def test_a_member_that_leaves_is_cut_off_within_its_connection(world: World) -> None:
    shard = world.manifest.shards[0]

    def use(connection: PeerConnection) -> None:
        list(connection.pieces(shard.sha256, shard.size, 0, 2))
        world.members.discard(world.wanter.identity.node_id)
        list(connection.pieces(shard.sha256, shard.size, 2, 2))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            source = world.source(await nursery.start(server.run))
            with pytest.raises(Busy, match="is no member"):
                await with_connection(source, world.wanter.identity, FAST, use)
            assert server.statistics().pieces_served == 2
            nursery.cancel_scope.cancel()


async def test_a_server_with_another_key_is_refused_before_it_learns_who_asks(world: World) -> None:
    impostor = NodeIdentity.generate()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(identity=impostor)
            source = world.source(await nursery.start(server.run))
            fetcher = world.fetcher()
            with pytest.raises(Busy, match="another node answers there"):
                await fetcher.fetch_shard(world.manifest.shards[0], [source])
            assert dropped(fetcher) == [str(source)]
            assert server.statistics().pieces_served == 0
            nursery.cancel_scope.cancel()


async def test_a_proof_made_for_another_server_is_worth_nothing(world: World) -> None:
    """A member that is asked something cannot pass the proof on and be served in the asker's name."""
    thief = NodeIdentity.generate()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(world.server().run)
            tls = await raw_connection(port)

            def steal() -> None:
                channel = Channel(tls)
                channel.within(5.0)
                channel.handshake()
                nonce = channel.receive_frame(Challenge).nonce
                victim = world.wanter.identity
                channel.send_frame(
                    Proof(victim.node_id, victim.sign(proof_bytes(thief.node_id, victim.node_id, nonce)))
                )
                channel.receive_part()

            with pytest.raises(Busy, match="the proof is not signed by"):
                await run_blocking(tls, steal)
            nursery.cancel_scope.cancel()


async def raw_connection(port: int) -> ssl.SSLSocket:
    def connect() -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", port))
        return client_context().wrap_socket(sock, do_handshake_on_connect=False)

    return await trio.to_thread.run_sync(connect)


class LyingServer(DataServer):
    """One bit of the third piece is wrong."""

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        for index in range(request.first, request.first + request.count):
            piece = bytearray(self._shelf.piece(ShardHash(request.shard_hash), index))
            if index == 2:
                piece[777] ^= 1
            channel.send_part(piece)


class TruncatingServer(DataServer):
    """Hangs up in the middle of a piece."""

    pieces_max = 0
    """In one connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sent: dict[Channel, int] = {}

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        whole = min(request.count, self.pieces_max - self._sent.get(channel, 0))
        super()._send_pieces(channel, share, msgspec.structs.replace(request, count=whole))
        self._sent[channel] = self._sent.get(channel, 0) + whole
        if request.count > whole:
            channel.send(b"\0\x00\x10\x00\x00" + bytes(1000))
            raise Busy("hangs up")


class FlakyServer(TruncatingServer):
    """Hangs up in the middle of the fourth piece of every connection."""

    pieces_max = 3


class StallingServer(DataServer):
    """Sends half a piece and then nothing, for as long as the client waits."""

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        channel.send(b"\0\x00\x10\x00\x00" + bytes(PIECE_SIZE // 2))
        channel.receive_frame(GetPieces)


class DrippingServer(DataServer):
    """A byte now and then: never silent, never done."""

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        channel.send(b"\0\x00\x10\x00\x00")
        channel._socket.settimeout(0.05)
        while True:
            try:
                channel._socket.recv(1)
            except TimeoutError:
                channel.send(b"x")
            else:
                raise Busy("the client gave up")


class WrongSizeServer(DataServer):
    """Offers four gigabytes for one piece."""

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        channel.send(b"\0\xff\xff\xff\xff")


class WrongManifestServer(DataServer):
    def _send_manifest(self, channel: Channel, manifest_hash: object) -> None:
        channel.send_part(b"some other manifest")


class BoastfulServer(DataServer):
    """Claims a manifest of four gigabytes."""

    def _send_manifest(self, channel: Channel, manifest_hash: object) -> None:
        channel.send(b"\0\xff\xff\xff\xff")


ZOO = [
    (LyingServer, "came with wrong bytes", True),
    (TruncatingServer, "closed after", False),
    (StallingServer, "stalled", False),
    (DrippingServer, "too slow", False),
    (WrongSizeServer, "offers 4,294,967,295 bytes", True),
]


@pytest.mark.parametrize(("kind", "reason", "is_dropped"), ZOO)
async def test_a_bad_source_costs_little_and_an_honest_one_finishes(
    world: World, kind: type[DataServer], reason: str, is_dropped: bool
) -> None:
    liar = NodeIdentity.generate()
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = world.source(await nursery.start(world.server(kind, identity=liar).run), liar)
            fetcher = world.fetcher(IMPATIENT)
            with pytest.raises(Busy, match=reason):
                await fetcher.fetch_shard(shard, [bad])
            assert not world.wanter.store.held(shard.sha256)
            assert dropped(fetcher) == ([str(bad)] if is_dropped else [])

            honest = world.source(await nursery.start(world.server().run))
            await fetcher.fetch_shard(shard, [bad, honest])
            assert world.fetched(0) == world.shards[0]
            nursery.cancel_scope.cancel()


async def test_a_source_that_keeps_hanging_up_is_asked_again_while_it_gives_something(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server(FlakyServer).run))
            fetcher = world.fetcher()
            await fetcher.fetch_shard(world.manifest.shards[0], [source])
            assert world.fetched(0) == world.shards[0]
            assert fetcher.statistics().source_failures >= 1
            assert fetcher.statistics().pieces_fetched == 8
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", [WrongManifestServer, BoastfulServer])
async def test_a_wrong_manifest_drops_its_source(world: World, kind: type[DataServer]) -> None:
    liar = NodeIdentity.generate()
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            bad = world.source(await nursery.start(world.server(kind, identity=liar).run), liar)
            fetcher = world.fetcher()
            with pytest.raises(Busy):
                await fetcher.fetch_manifest(world.manifest_hash, [bad])
            assert dropped(fetcher) == [str(bad)]
            honest = world.source(await nursery.start(world.server().run))
            assert await fetcher.fetch_manifest(world.manifest_hash, [bad, honest]) == world.manifest
            nursery.cancel_scope.cancel()


async def test_kill_of_the_server_midway_then_resume_fetches_only_what_is_missing(tmp_path: Path) -> None:
    world = World(tmp_path, size=48 * PIECE_SIZE, shard_size=48 * PIECE_SIZE)
    shard = world.manifest.shards[0]
    fetcher = world.fetcher()
    pieces: list[int] = []
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def run(*, task_status: trio.TaskStatus[int]) -> None:
                with first:
                    await world.server().run(task_status=task_status)

            source = world.source(await nursery.start(run))

            def kill_after_a_few(count: int) -> None:
                pieces.append(count)
                if len(pieces) == 6:
                    first.cancel()

            with pytest.raises(Busy, match=r"no connection|closed after|failed"):
                await fetcher.fetch_shard(shard, [source], kill_after_a_few)
            before = fetcher.statistics().pieces_fetched
            assert 5 <= before < 48
            again = world.server(port=source.address.port)
            await nursery.start(again.run)
            await fetcher.fetch_shard(shard, [source])
            assert fetcher.statistics().pieces_fetched == 48
            assert again.statistics().pieces_served == 48 - before
            assert world.fetched(0) == world.shards[0]
            nursery.cancel_scope.cancel()


async def test_cancelling_a_fetch_leaves_no_socket_and_no_thread_at_work(world: World) -> None:
    began, before = trio.current_time(), open_sockets()
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(StallingServer, limits=PATIENT)
            source = world.source(await nursery.start(server.run))
            async with trio.open_nursery() as fetching:
                fetching.start_soon(world.fetcher(PATIENT).fetch_shard, shard, [source])
                await until(lambda: server.statistics().connections)
                assert trio.testing.active_thread_count() == 3
                fetching.cancel_scope.cancel()
            await until(lambda: not server.statistics().connections)
            # The writer let go of the shard too.
            with world.wanter.store.open_partial(shard.sha256, shard.size, shard.pieces):
                pass
            nursery.cancel_scope.cancel()
    assert trio.current_time() - began < PATIENT.piece_s / 2
    assert trio.testing.active_thread_count() == 0
    assert open_sockets() == before


async def test_cancelling_the_server_ends_its_connections(world: World) -> None:
    began, before = trio.current_time(), open_sockets()
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()

            async def run(*, task_status: trio.TaskStatus[int]) -> None:
                with scope:
                    await world.server(StallingServer, limits=PATIENT).run(task_status=task_status)

            source = world.source(await nursery.start(run))

            def use(connection: PeerConnection) -> None:
                trio.from_thread.run_sync(scope.cancel)
                list(connection.pieces(shard.sha256, shard.size, 0, 1))

            with pytest.raises(Busy):
                await with_connection(source, world.wanter.identity, PATIENT, use)
    assert trio.current_time() - began < PATIENT.piece_s / 2
    assert trio.testing.active_thread_count() == 0
    assert open_sockets() == before


async def test_a_flipped_byte_on_disk_is_noticed_and_not_served(world: World) -> None:
    shard = world.manifest.shards[0]
    path = world.holder.store.path(shard.sha256)
    data = bytearray(path.read_bytes())
    data[5 * PIECE_SIZE + 99] ^= 0x10
    path.write_bytes(data)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            source = world.source(await nursery.start(server.run))
            fetcher = world.fetcher()
            with pytest.raises(Busy, match="damaged here") as caught:
                await fetcher.fetch_shard(shard, [source])
            assert str(path) not in str(caught.value)
            assert set(world.damaged) == {(shard.sha256, 5)}
            assert fetcher.statistics().pieces_fetched == 7
            assert server.statistics().pieces_damaged >= 1
            # The node repairs itself (here: by hand), and the rest follows.
            path.write_bytes(world.shards[0])
            await fetcher.fetch_shard(shard, [source])
            assert world.fetched(0) == world.shards[0]
            nursery.cancel_scope.cancel()


async def test_what_is_not_there_is_said_and_the_connection_goes_on(world: World) -> None:
    shard = world.manifest.shards[1]
    unknown = ShardHash(bytes(32))

    def use(connection: PeerConnection) -> bytes:
        for ask in (
            functools.partial(connection.pieces, unknown, PIECE_SIZE, 0, 1),
            functools.partial(connection.pieces, shard.sha256, shard.size, 4, 1),
        ):
            with pytest.raises(Busy, match="it refuses: shard"):
                list(ask())
        with pytest.raises(Busy, match="it refuses: the manifest"):
            connection.manifest(world.manifest_hash.__class__(bytes(32)), 1000)
        return b"".join(bytes(piece) for piece in connection.pieces(shard.sha256, shard.size, 0, 4))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server().run))
            assert await with_connection(source, world.wanter.identity, FAST, use) == world.shards[1]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(3000),
        os.urandom(500),
        b"",
    ],
    ids=["http", "zeros", "random", "nothing"],
)
async def test_garbage_instead_of_tls_hurts_nobody(world: World, garbage: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=IMPATIENT)
            port = await nursery.start(server.run)
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(garbage)
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
            await until(lambda: not server.statistics().handshakes)
            await world.fetcher().fetch_shard(world.manifest.shards[0], [world.source(port)])
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"\xff\xff\xff\xff", "over the limit"),
        (b"\0\0\0\x05hello", "that is none"),
        (b"\0\0\0\0", "that is none"),
    ],
)
async def test_a_malformed_request_ends_the_connection_with_the_reason(world: World, frame: bytes, reason: str) -> None:
    def use(connection: PeerConnection) -> None:
        connection._channel.send(frame)
        connection._channel.receive_part()

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server().run))
            with pytest.raises(Busy, match=reason):
                await with_connection(source, world.wanter.identity, FAST, use)
            nursery.cancel_scope.cancel()


async def test_a_frame_nested_without_end_hurts_nobody(world: World) -> None:
    body = b"\x82\xa4type\xa5Proof\xa1x" + b"\x91" * 990 + b"\xc0"

    def speak(port: int) -> None:
        with client_context().wrap_socket(socket.create_connection(("127.0.0.1", port), DEADLINE_S)) as tls:
            tls.sendall(len(body).to_bytes(4) + body)
            while tls.recv(4096):
                pass

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(900)
    try:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                server = world.server()
                source = world.source(await nursery.start(server.run))
                await trio.to_thread.run_sync(speak, source.address.port)
                await until(lambda: not server.statistics().handshakes)
                await world.fetcher().fetch_shard(world.manifest.shards[0], [source])
                nursery.cancel_scope.cancel()
    finally:
        sys.setrecursionlimit(limit)


async def test_connections_of_one_peer_are_bounded(world: World) -> None:
    limits = DataLimits(connections_per_peer_max=2)
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=limits)
            source = world.source(await nursery.start(server.run))
            release = trio.Event()

            def hold(connection: PeerConnection) -> None:
                trio.from_thread.run(release.wait)

            async with trio.open_nursery() as holding:
                for _ in range(2):
                    holding.start_soon(with_connection, source, world.wanter.identity, FAST, hold)
                await until(lambda: server.statistics().connections == 2)
                with pytest.raises(Busy, match="the most one node may have"):
                    await world.fetcher().fetch_shard(shard, [source])
                release.set()
            await until(lambda: not server.statistics().connections)
            await world.fetcher().fetch_shard(shard, [source])
            nursery.cancel_scope.cancel()


async def test_handshakes_that_never_end_are_bounded_and_pass(world: World) -> None:
    limits = DataLimits(handshakes_max=2, handshake_s=1.0)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=limits)
            port = await nursery.start(server.run)
            mute = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
            await until(lambda: server.statistics().connections_refused)
            assert server.statistics().handshakes == 2
            await until(lambda: not server.statistics().handshakes)
            await world.fetcher().fetch_shard(world.manifest.shards[0], [world.source(port)])
            for stream in mute:
                await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_a_port_in_use_is_said(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(world.server().run)
            with pytest.raises(Conflict, match=f"Port {port} on 127.0.0.1 is in use"):
                await world.server(port=port).run()
            nursery.cancel_scope.cancel()


async def test_no_source_and_no_listener_are_said(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    fetcher = world.fetcher()
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(Busy, match="Connection refused"):
            await fetcher.fetch_shard(world.manifest.shards[0], [world.source(port)])
        with pytest.raises(Busy, match="nobody is known to have it"):
            await fetcher.fetch_shard(world.manifest.shards[0], [])


async def test_a_manifest_that_lies_about_a_shard_is_found_at_the_end(world: World) -> None:
    """All pieces fit their hashes and the whole does not fit the ledger's: nobody's fault but the manifest's."""
    other, shards = make(SHARD_SIZE, SHARD_SIZE, seed=1)
    real = world.manifest.shards[0]
    forged = type(real)(real.sha256, other.shards[0].size, other.shards[0].pieces)
    manifest = type(other)(other.format, other.shard_size, other.piece_size, other.files, (forged,))
    node = Node(world.holder.store.root.parent / "forger")
    node.store.put_manifest(manifest.encode(), manifest.manifest_hash())
    (node.store.root / "shards" / real.sha256.hex()).write_bytes(shards[0])
    world.holder = node
    world.members.add(node.identity.node_id)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server().run))
            fetcher = world.fetcher()
            with pytest.raises(BadInput, match="wrong manifest"):
                await fetcher.fetch_shard(forged, [source])
            assert not world.wanter.store.held(real.sha256)
            assert dropped(fetcher) == []
            nursery.cancel_scope.cancel()


def test_piece_sizes() -> None:
    assert [piece_bytes(2 * PIECE_SIZE + 5, index) for index in range(3)] == [PIECE_SIZE, PIECE_SIZE, 5]
