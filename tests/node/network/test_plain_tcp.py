"""Pieces in clear, for trusted networks: both keys are proved all the same, and nobody goes there unless told to."""

import logging
import socket
from pathlib import Path

import pytest
import trio

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, NodeId
from node.network import handshake
from node.network.client import PeerConnection, connected
from node.network.identity import NodeIdentity
from node.network.server import DataServer
from node.network.wire import Challenge, Channel, DataLimits, Greeting, Proof, proof_bytes, run_blocking
from tests.node.network.fakes import until
from tests.node.network.test_data_plane import DEADLINE_S, FAST, IMPATIENT, PATIENT, SIZE, World, dropped

PASSED_OVER = "only with network.plain_tcp = true"
SOON_S = PATIENT.handshake_s / 4
"""Well before a handshake is given up for want of an answer."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def raw(port: int) -> socket.socket:
    return await trio.to_thread.run_sync(socket.create_connection, ("127.0.0.1", port))


async def test_a_manifest_and_shards_arrive_in_clear(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(plain=True)
            sources = [world.source(await nursery.start(server.run), plain=True)]
            fetcher = world.fetcher(plain=True)
            manifest = await fetcher.fetch_manifest(world.manifest_hash, sources)
            for shard in manifest.shards:
                await fetcher.fetch_shard(shard, sources)
            assert [world.fetched(0), world.fetched(1)] == world.shards
            assert await fetcher.proves(manifest.shards[0], sources[0])
            assert fetcher.statistics().bytes_fetched == SIZE
            assert fetcher.statistics().source_failures == 0
            await until(lambda: server.statistics().pieces_served == 13)  # counted once it is sent
            nursery.cancel_scope.cancel()


async def test_who_fetches_in_clear_fetches_over_tls_too(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server().run))
            await world.fetcher(plain=True).fetch_shard(world.manifest.shards[0], [source])
            assert world.fetched(0) == world.shards[0]
            nursery.cancel_scope.cancel()


async def test_a_node_that_was_not_told_to_never_connects_in_clear(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    shard = world.manifest.shards[0]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = world.source(listener.getsockname()[1], plain=True)
        fetcher = world.fetcher()
        with trio.fail_after(DEADLINE_S), caplog.at_level(logging.WARNING, "node"):
            for _ in range(2):
                with pytest.raises(Busy, match=PASSED_OVER):
                    await fetcher.fetch_shard(shard, [source])
            with pytest.raises(Busy, match=PASSED_OVER):
                await world.fetcher().fetch_manifest(world.manifest_hash, [source])
            assert not await world.fetcher().proves(shard, source)
            with pytest.raises(BadPeer, match=PASSED_OVER):
                async with connected(source, world.wanter.identity, FAST):
                    pass
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    (told,) = fetcher.statistics().sources
    assert (told.source, told.state) == (str(source), "dropped")
    assert PASSED_OVER in told.trouble
    said = [record.message for record in caplog.records if str(source) in record.message]
    assert len(said) == 3, "once for each fetcher"
    assert all(PASSED_OVER in message for message in said)


async def test_who_passes_a_source_over_takes_the_shard_from_another(world: World) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            in_clear, over_tls = world.server(plain=True), world.server()
            sources = [
                world.source(await nursery.start(in_clear.run), plain=True),
                world.source(await nursery.start(over_tls.run)),
            ]
            await world.fetcher().fetch_shard(world.manifest.shards[0], sources)
            assert world.fetched(0) == world.shards[0]
            await until(lambda: over_tls.statistics().pieces_served == 8)
            assert in_clear.statistics().pieces_served == 0
            nursery.cancel_scope.cancel()


async def test_a_stranger_is_refused_in_clear_with_the_reason(world: World) -> None:
    world.members.discard(world.wanter.identity.node_id)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(plain=True)
            source = world.source(await nursery.start(server.run), plain=True)
            with pytest.raises(Busy, match="is no member of this network"):
                await world.fetcher(plain=True).fetch_shard(world.manifest.shards[0], [source])
            assert server.statistics().pieces_served == 0
            nursery.cancel_scope.cancel()


async def test_a_member_that_leaves_is_cut_off_in_clear(world: World) -> None:
    shard = world.manifest.shards[0]

    def use(connection: PeerConnection) -> None:
        list(connection.pieces(shard.sha256, shard.size, 0, 2))
        world.members.discard(world.wanter.identity.node_id)
        list(connection.pieces(shard.sha256, shard.size, 2, 2))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(plain=True)
            source = world.source(await nursery.start(server.run), plain=True)
            async with connected(source, world.wanter.identity, FAST, plain=True) as connection:
                with pytest.raises(Busy, match="is no member"):
                    await connection.run(lambda: use(connection))
            assert server.statistics().pieces_served == 2
            nursery.cancel_scope.cancel()


class CuriousServer(DataServer):
    """Keeps who proved to be whom."""

    seen: list[NodeId]

    def _admit(self, channel: Channel) -> tuple[NodeId, bool]:
        admitted = super()._admit(channel)
        self.seen.append(admitted[0])
        return admitted


@pytest.mark.parametrize("is_impostor", [True, False])
async def test_a_server_with_another_key_does_not_learn_who_asks_in_clear(world: World, is_impostor: bool) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(CuriousServer, identity=NodeIdentity.generate() if is_impostor else None, plain=True)
            assert isinstance(server, CuriousServer)
            server.seen = []
            source = world.source(await nursery.start(server.run), plain=True)
            fetcher = world.fetcher(plain=True)
            if is_impostor:
                with pytest.raises(Busy, match="another node answers there"):
                    await fetcher.fetch_shard(world.manifest.shards[0], [source])
                assert dropped(fetcher) == [str(source)]
            else:
                await fetcher.fetch_shard(world.manifest.shards[0], [source])
            await until(lambda: not server.statistics().handshakes + server.statistics().connections)
            assert set(server.seen) == (set() if is_impostor else {world.wanter.identity.node_id})
            nursery.cancel_scope.cancel()


async def test_what_a_server_signed_for_one_connection_opens_no_other(world: World) -> None:
    """Somebody between who kept a real node's challenge cannot answer in its name, nor have another nonce signed."""
    kept: list[Challenge] = []

    async def keep(port: int) -> None:
        sock = await raw(port)

        def greet() -> None:
            channel = Channel(sock)
            channel.within(FAST.handshake_s)
            channel.send_frame(Greeting(bytes(32)))
            assert channel.receive_part() == 0
            kept.append(channel.receive_frame(Challenge))

        await run_blocking(sock, greet)

    def pretend(sock: socket.socket, challenge: Challenge) -> None:
        channel = Channel(sock)
        channel.within(FAST.handshake_s)
        channel.receive_frame(Greeting)
        channel.send_part()
        channel.send_frame(challenge)
        channel.receive_frame(Proof)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await keep(await nursery.start(world.server(plain=True).run))
            nursery.cancel_scope.cancel()
        server, client = socket.socketpair()
        channel = Channel(client)
        channel.within(FAST.handshake_s)
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                with pytest.raises(Busy, match="closed after 0"):
                    await run_blocking(server, lambda: pretend(server, kept[0]))

            nursery.start_soon(answer)
            with pytest.raises(BadPeer, match="another node answers there"):
                await run_blocking(
                    client,
                    lambda: handshake.prove(channel, world.wanter.identity, world.holder.identity.node_id, plain=True),
                )


async def test_the_servers_own_nonce_is_signed_with_the_clients(world: World) -> None:
    """Or whoever stands between could have the client sign the nonce of a connection of his own."""
    server, client = socket.socketpair()

    def swap() -> None:
        """A real server's answer with another nonce in it."""
        channel = Channel(server)
        channel.within(FAST.handshake_s)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            behind = Channel(theirs)
            behind.within(FAST.handshake_s)
            behind.send_frame(channel.receive_frame(Greeting))
            inner = Channel(ours)
            inner.within(FAST.handshake_s)
            handshake.challenge(inner, world.holder.identity, plain=True, packs=False)
            behind.receive_part()
            found = behind.receive_frame(Challenge)
        channel.send_part()
        channel.send_frame(Challenge(bytes(32), False, found.signature))

    channel = Channel(client)
    channel.within(FAST.handshake_s)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_blocking, server, swap)
            with pytest.raises(BadPeer, match="another node answers there"):
                await run_blocking(
                    client,
                    lambda: handshake.prove(channel, world.wanter.identity, world.holder.identity.node_id, plain=True),
                )


async def test_a_proof_made_for_another_server_is_worth_nothing_in_clear(world: World) -> None:
    thief, victim = NodeIdentity.generate(), world.wanter.identity
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            sock = await raw(await nursery.start(world.server(plain=True).run))

            def steal() -> None:
                channel = Channel(sock)
                channel.within(FAST.handshake_s)
                channel.send_frame(Greeting(bytes(32)))
                channel.receive_part()
                nonce = channel.receive_frame(Challenge).nonce
                signature = victim.sign(proof_bytes(thief.node_id, victim.node_id, nonce))
                channel.send_frame(Proof(victim.node_id, signature))
                channel.receive_part()

            with pytest.raises(Busy, match="the proof is not signed by"):
                await run_blocking(sock, steal)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("serves_plain", "reason"),
    [(True, "no TLS is spoken there, perhaps plain TCP"), (False, "TLS is spoken here, not plain TCP")],
    ids=["TLS at a plain port", "plain at a TLS port"],
)
async def test_who_speaks_the_other_way_is_told_so_at_once(world: World, serves_plain: bool, reason: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(plain=serves_plain, limits=PATIENT)
            source = world.source(await nursery.start(server.run), plain=not serves_plain)
            with trio.fail_after(SOON_S), pytest.raises(Busy, match=reason):
                async with connected(source, world.wanter.identity, PATIENT, plain=True):
                    pass
            await until(lambda: not server.statistics().handshakes)
            # A node that has changed its ways since is no liar: it is asked again.
            fetcher = world.fetcher(plain=True)
            with pytest.raises(Busy, match=reason):
                await fetcher.fetch_shard(world.manifest.shards[0], [source])
            assert dropped(fetcher) == []
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(3000), b"\x16\x03\x01\xff\xff" + bytes(100), b"\x00\x00\x00\x05hello", b""],
    ids=["http", "zeros", "half a TLS record", "no greeting", "nothing"],
)
async def test_garbage_in_clear_hurts_nobody(world: World, garbage: bytes) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=IMPATIENT, plain=True)
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
            await world.fetcher(plain=True).fetch_shard(world.manifest.shards[0], [world.source(port, plain=True)])
            nursery.cancel_scope.cancel()


async def test_mute_connections_are_bounded_in_clear(world: World) -> None:
    limits = DataLimits(handshakes_max=2, handshake_s=1.0)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=limits, plain=True)
            port = await nursery.start(server.run)
            mute = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(3)]
            await until(lambda: server.statistics().connections_refused)
            assert server.statistics().handshakes == 2
            await until(lambda: not server.statistics().handshakes)
            await world.fetcher(plain=True).fetch_shard(world.manifest.shards[0], [world.source(port, plain=True)])
            for stream in mute:
                await stream.aclose()
            nursery.cancel_scope.cancel()


async def test_a_byte_altered_on_the_way_is_refused_by_its_hash(world: World) -> None:
    """What plain TCP does not keep from happening harms nobody."""
    shard = world.manifest.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            port: int = await nursery.start(world.server(plain=True).run)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, Meddler(port), listeners)
            between = world.source(listeners[0].socket.getsockname()[1], plain=True)
            with pytest.raises(Busy, match="came with wrong bytes"):
                await world.fetcher(plain=True).fetch_shard(shard, [between])
            assert not world.wanter.store.held(shard.sha256)
            nursery.cancel_scope.cancel()


class Meddler:
    """Passes everything on, and turns over a bit of what lies deep in a piece."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __call__(self, stream: trio.SocketStream) -> None:
        behind = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with stream, behind, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, stream, behind, nursery.cancel_scope, None)
            nursery.start_soon(self._pass, behind, stream, nursery.cancel_scope, PIECE_SIZE // 2)

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope, at: int | None
    ) -> None:
        passed = 0
        try:
            while data := bytearray(await source.receive_some()):
                if at is not None and passed <= at < passed + len(data):
                    data[at - passed] ^= 1
                passed += len(data)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()
