"""What is public is served to nodes that are no members, and nothing else is."""

from pathlib import Path

import pytest
import trio

from contracts.errors import Busy
from contracts.types import PIECE_SIZE, NodeId
from node.network.client import PeerConnection, connected
from node.network.identity import NodeIdentity
from node.network.pace import Share
from node.network.server import STRANGERS, DataServer
from node.network.wire import Challenge, Channel, DataLimits, GetPieces, Proof, proof_bytes, run_blocking
from tests.node.network.artifacts import make, put
from tests.node.network.fakes import until
from tests.node.network.test_data_plane import DEADLINE_S, FAST, SHARD_SIZE, World, raw_connection, with_connection

OF_NONE = "is no member of this network, and the shard {} is of no public model"


class Network(World):
    """The holder has a public model and another one; the wanter is no member."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.members.discard(self.wanter.identity.node_id)
        self.public = {self.manifest_hash, *(shard.sha256 for shard in self.manifest.shards)}
        self.other, shards = make(SHARD_SIZE, SHARD_SIZE, seed=2)
        self.other_hash = put(self.holder.store, self.other, shards)


@pytest.fixture
def world(tmp_path: Path) -> Network:
    return Network(tmp_path)


@pytest.mark.parametrize("plain", [False, True])
async def test_a_stranger_fetches_a_public_model(world: Network, plain: bool) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(plain=plain)
            sources = [world.source(await nursery.start(server.run), plain=plain)]
            fetcher = world.fetcher(plain=plain)
            manifest = await fetcher.fetch_manifest(world.manifest_hash, sources)
            for shard in manifest.shards:
                await fetcher.fetch_shard(shard, sources)
            assert [world.fetched(0), world.fetched(1)] == world.shards
            assert world.asked == [], "nobody is to look for pieces at a stranger's"
            nursery.cancel_scope.cancel()


async def test_a_stranger_is_refused_every_other_model_in_one_line(world: Network) -> None:
    shard = world.other.shards[0]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            source = world.source(await nursery.start(server.run))
            reason = OF_NONE.format(shard.sha256.hex())
            with pytest.raises(Busy, match=f"{world.wanter.identity.node_id} {reason}"):
                await world.fetcher().fetch_shard(shard, [source])
            with pytest.raises(Busy, match=reason):
                await with_connection(
                    source,
                    world.wanter.identity,
                    FAST,
                    lambda connection: list(connection.pieces(shard.sha256, shard.size, 0, 1)),
                )
            with pytest.raises(Busy, match=f"and the manifest {world.other_hash.hex()} is of no public model"):
                await world.fetcher().fetch_manifest(world.other_hash, [source])
            assert (server.statistics().pieces_served, server.statistics().manifests_served) == (0, 0)
            # Whether there is such a shard here at all is nobody's business either.
            with pytest.raises(Busy, match=OF_NONE.format("00" * 32)):
                await with_connection(
                    source,
                    world.wanter.identity,
                    FAST,
                    lambda connection: connection.have(type(shard.sha256)(bytes(32)), 1),
                )
            nursery.cancel_scope.cancel()


async def test_a_refused_request_ends_a_strangers_connection(world: Network) -> None:
    public, other = world.manifest.shards[0], world.other.shards[0]

    def use(connection: PeerConnection) -> None:
        list(connection.pieces(public.sha256, public.size, 0, 1))
        with pytest.raises(Busy, match="is of no public model"):
            list(connection.pieces(other.sha256, other.size, 0, 1))
        list(connection.pieces(public.sha256, public.size, 1, 1))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            source = world.source(await nursery.start(world.server().run))
            with pytest.raises(Busy, match=r"closed|failed"):
                await with_connection(source, world.wanter.identity, FAST, use)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("left", ["nothing", "something else"])
async def test_what_is_public_no_longer_is_refused_within_the_connection(world: Network, left: str) -> None:
    shard = world.manifest.shards[0]

    def use(connection: PeerConnection) -> None:
        list(connection.pieces(shard.sha256, shard.size, 0, 2))
        world.public = set() if left == "nothing" else {world.other_hash}
        list(connection.pieces(shard.sha256, shard.size, 2, 2))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            source = world.source(await nursery.start(server.run))
            with pytest.raises(Busy, match=OF_NONE.format(shard.sha256.hex())):
                await with_connection(source, world.wanter.identity, FAST, use)
            assert server.statistics().pieces_served == 2
            if left == "nothing":
                with pytest.raises(Busy, match="it joins with a signed transaction"):
                    await world.fetcher().fetch_shard(shard, [source])
            nursery.cancel_scope.cancel()


async def test_a_member_that_leaves_keeps_what_is_public_and_loses_the_rest(world: Network) -> None:
    public, other = world.manifest.shards[0], world.other.shards[0]
    world.members.add(world.wanter.identity.node_id)

    def use(connection: PeerConnection) -> None:
        list(connection.pieces(other.sha256, other.size, 0, 1))
        world.members.discard(world.wanter.identity.node_id)
        list(connection.pieces(public.sha256, public.size, 0, 1))
        list(connection.pieces(other.sha256, other.size, 1, 1))

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server()
            source = world.source(await nursery.start(server.run))
            with pytest.raises(Busy, match=OF_NONE.format(other.sha256.hex())):
                await with_connection(source, world.wanter.identity, FAST, use)
            assert server.statistics().pieces_served == 2
            nursery.cancel_scope.cancel()


async def test_a_stranger_proves_its_key(world: Network) -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            tls = await raw_connection(await nursery.start(world.server().run))
            claimed, own = world.wanter.identity.node_id, NodeIdentity.generate()

            def pretend() -> None:
                channel = Channel(tls)
                channel.within(FAST.handshake_s)
                channel.handshake()
                nonce = channel.receive_frame(Challenge).nonce
                proof = proof_bytes(world.holder.identity.node_id, claimed, nonce)
                channel.send_frame(Proof(claimed, own.sign(proof)))
                channel.receive_part()

            with pytest.raises(Busy, match="the proof is not signed by"):
                await run_blocking(tls, pretend)
            nursery.cancel_scope.cancel()


async def test_strangers_leave_members_their_places(world: Network) -> None:
    shard = world.manifest.shards[0]
    member = NodeIdentity.generate()
    world.members.add(member.node_id)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(limits=DataLimits(connections_max=4))
            source = world.source(await nursery.start(server.run))
            async with connected(source, world.wanter.identity, FAST):
                with pytest.raises(Busy, match="1 connections of strangers are open"):
                    async with connected(source, NodeIdentity.generate(), FAST):
                        pass
                await with_connection(
                    source, member, FAST, lambda peer: list(peer.pieces(shard.sha256, shard.size, 0, 1))
                )
            await until(lambda: not server.statistics().connections)
            async with connected(source, NodeIdentity.generate(), FAST):
                pass
            nursery.cancel_scope.cancel()


class NamingServer(DataServer):
    """Keeps under which name each request takes its share of what goes out."""

    names: list[str]

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        self.names.append(share.name)
        super()._send_pieces(channel, share, request)


async def test_all_strangers_have_the_share_of_one_member_and_members_hear_nothing_of_them(world: Network) -> None:
    shard = world.manifest.shards[0]
    member = NodeIdentity.generate()
    world.members.add(member.node_id)

    def use(connection: PeerConnection, index: int = 3) -> tuple[tuple[NodeId, ...], bytes]:
        list(connection.pieces(shard.sha256, shard.size, index, 1))
        found = connection.have(shard.sha256, SHARD_SIZE // PIECE_SIZE)
        return tuple(map(NodeId, found.others)), found.given

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            server = world.server(NamingServer)
            assert isinstance(server, NamingServer)
            server.names = []
            source = world.source(await nursery.start(server.run))
            strangers = [world.wanter.identity, NodeIdentity.generate()]
            assert [await with_connection(source, stranger, FAST, use) for stranger in strangers] == [((), b"")] * 2
            others, given = await with_connection(source, member, FAST, lambda connection: use(connection, 5))
            assert (others, given) == ((), bytes([1 << 5]))
            assert await with_connection(source, strangers[0], FAST, use) == ((), b"")
            assert server.names == [STRANGERS, STRANGERS, member.node_id, STRANGERS]
            assert world.asked == [member.node_id]
            nursery.cancel_scope.cancel()
