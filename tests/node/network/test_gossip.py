"""Gossip over real libp2p hosts on loopback: that it carries, that nothing depends on it, and who abuses it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import trio
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from libp2p.pubsub.pb import rpc_pb2
from libp2p.utils.varint import encode_varint_prefixed

from contracts.types import NodeId
from node.network import control, gossip, mesh, session
from node.network.host import Host
from node.network.mesh import MESSAGE_BYTES_MAX, PACKET_IDS_MAX, PACKET_MESSAGES_MAX, GossipStatistics
from node.network.messages import NewBlock, NewHead, Transactions, encode
from tests.node.network import fakes
from tests.node.network.fakes import GENESIS, FakeLedger, block, until
from tests.node.network.members import FAST, Member, lose_gossip, network, polite, stranger

TOPIC = gossip.topic(GENESIS)
NEVER_S = 1_000.0
SOON_S = 0.05


@pytest.fixture
def gossip_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What peers send each other directly comes too late to be of help."""
    monkeypatch.setattr(session, "TOLD_S", NEVER_S)
    monkeypatch.setattr(control, "ASKED_MAX", 0)


async def start(nursery: trio.Nursery, count: int, ledger: Callable[[], FakeLedger] = FakeLedger) -> list[Member]:
    """Nodes that are all connected and hear each other."""
    members: list[Member] = []
    for _ in range(count):
        members.append(Member(ledger(), *(member.address for member in members)))
        await nursery.start(members[-1].run)
    for member in members:
        await member.control.wait_peers(count - 1)
        others = [other.node_id for other in members if other is not member]
        await until(lambda member=member, others=others: all(reaches(member, other) for other in others))
        await until(lambda member=member: told(member).peers > 0)
    return members


def reaches(member: Member, node_id: NodeId) -> bool:
    assert member.control._mesh is not None
    return member.control._mesh.reaches(node_id)


def told(member: Member) -> GossipStatistics:
    return member.control.statistics().gossip


# That it carries


@pytest.mark.usefixtures("gossip_alone")
async def test_transactions_and_blocks_reach_everybody_and_nobody_sends_them_to_each_peer() -> None:
    async with network() as nursery:
        members = await start(nursery, 7)
        await members[3].ledger.submit(b"tx 1")
        for member in members:
            await member.ledger.wait_in_pool(b"tx 1")
        for number in range(1, 4):
            members[number].ledger.grow(1)
            for member in members:
                await member.ledger.wait_head(number - 1)
        assert all(member.ledger.blocks == members[0].ledger.blocks for member in members)
        for member in members:
            statistics = member.control.statistics()
            assert (statistics.transactions_sent, statistics.blocks_received) == (0, 0)
        assert sum(told(member).taken for member in members) == 4 * 6, "each message is taken once by each other node"


@pytest.mark.usefixtures("gossip_alone")
async def test_it_goes_on_through_nodes_in_between() -> None:
    """C knows B only and B knows A only."""
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        c = Member(FakeLedger(), b.address)
        await nursery.start(c.run)
        await until(lambda: reaches(a, b.node_id) and reaches(c, b.node_id) and told(b).peers == 2)
        a.ledger.grow(1)
        await c.ledger.wait_head(0)
        await c.ledger.submit(b"tx 1")
        await a.ledger.wait_in_pool(b"tx 1")
        assert a.peers() == c.peers() == [b.node_id]


@pytest.mark.usefixtures("gossip_alone")
async def test_more_at_once_than_a_queue_holds_is_not_lost() -> None:
    """py-libp2p's queue for a peer holds 32 messages and drops what comes then."""
    async with network() as nursery:
        a, b = await start(nursery, 2)
        raws = [b"tx %d " % number + bytes(gossip.BATCH_BYTES_MAX) for number in range(150)]
        for raw in raws:
            await a.ledger.submit(raw)
        for raw in raws:
            await b.ledger.wait_in_pool(raw)
        assert told(a).told == len(raws), "one message each"


@pytest.mark.usefixtures("gossip_alone")
async def test_small_transactions_are_told_together() -> None:
    async with network() as nursery:
        a, b = await start(nursery, 2)
        raws = [b"tx %d" % number for number in range(1_000)]
        for raw in raws:
            await a.ledger.submit(raw)
        for raw in raws:
            await b.ledger.wait_in_pool(raw)
        assert told(a).told < 100


@pytest.mark.usefixtures("gossip_alone")
async def test_of_a_block_that_is_too_large_only_the_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip, "MESSAGE_BYTES_MAX", 100)
    monkeypatch.setattr(
        fakes,
        "block",
        lambda number: b"block %d " % number + b"".join(sha256(b"%d" % place).digest() for place in range(10)),
    )
    async with network() as nursery:
        a, b = await start(nursery, 2)
        a.ledger.grow(1)
        await b.ledger.wait_head(0)
        assert (b.control.statistics().blocks_received, told(b).taken) == (1, 0)


@pytest.mark.usefixtures("gossip_alone")
async def test_who_misses_a_block_hears_from_the_next_that_it_is_behind() -> None:
    async with network() as nursery:
        a, b = await start(nursery, 2)
        a.ledger.grow(gossip.BLOCKS_TOLD_MAX + 3)
        await b.ledger.wait_head(gossip.BLOCKS_TOLD_MAX + 2)
        assert b.control.statistics().blocks_received > 0


# That nothing depends on it


async def test_what_gossip_loses_comes_from_peer_to_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_gossip(monkeypatch, SOON_S)
    async with network() as nursery:
        a, b, c = await start_deaf(nursery)
        a.ledger.grow(3)
        await c.ledger.wait_head(2)
        await c.ledger.submit(b"tx 1")
        await a.ledger.wait_in_pool(b"tx 1")
        await b.ledger.wait_in_pool(b"tx 1")
        assert told(a).told > 0
        assert told(c).told > 0


async def start_deaf(nursery: trio.Nursery) -> list[Member]:
    members: list[Member] = []
    for _ in range(3):
        members.append(Member(FakeLedger(), *(member.address for member in members)))
        await nursery.start(members[-1].run)
    for member in members:
        await member.control.wait_peers(2)
    return members


async def test_a_node_goes_on_without_gossip_when_libp2p_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_pubsub: object, _topic: str) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(mesh.Pubsub, "subscribe", fail)
    async with network() as nursery:
        a, _, c = await start_deaf(nursery)
        await until(lambda: "gossip has ended" in caplog.text)
        a.ledger.grow(3)
        await c.ledger.wait_head(2)
        await c.ledger.submit(b"tx 1")
        await a.ledger.wait_in_pool(b"tx 1")


# Who abuses it


def packet(*messages: bytes, **named: Any) -> rpc_pb2.RPC:
    return rpc_pb2.RPC(publish=[message(data, **named) for data in messages])


def message(data: bytes, **named: Any) -> rpc_pb2.Message:
    return rpc_pb2.Message(**{"data": data, "seqno": sha256(data).digest(), "topicIDs": [TOPIC], **named})


WRONG = {
    "no packet": (b"\xff\xff\xff", "gossip"),
    "no message": (packet(b"nonsense"), "that is none"),
    "an unknown message": (packet(encode(NewHead(1))[:-1]), "that is none"),
    "a name that is not its content's": (packet(encode(NewHead(1)), seqno=b"1"), "not named by its content"),
    "a sender": (packet(encode(NewHead(1)), from_id=b"somebody"), "not named by its content"),
    "another topic": (packet(encode(NewHead(1)), topicIDs=["/other"]), "not named by its content"),
    "a large message": (packet(bytes(MESSAGE_BYTES_MAX + 1)), "are taken"),
    "many messages": (packet(*(b"%d" % number for number in range(PACKET_MESSAGES_MAX + 1))), "are taken"),
    "a large packet": (bytes((1 << 20) + 1), "exceeds"),
    "a wrong block": (packet(encode(NewBlock(1, b"no block"))), "not a sealed block"),
    "a head that it has not": (packet(encode(NewHead(5))), "has no block"),
}


@pytest.mark.parametrize(("sent", "reason"), WRONG.values(), ids=WRONG)
async def test_who_breaks_the_protocol_is_dropped_and_kept_out(sent: rpc_pb2.RPC | bytes, reason: str) -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        stream = await speak(peer, a.node_id)
        await say(stream, sent)
        await until(lambda: reason in a.control.statistics().unreachable.get(peer.node_id, ""))
        await until(lambda: not peer.is_connected(a.node_id))
        assert (a.ledger.imported, a.ledger.pending()) == (0, [])


async def speak(peer: Host, node_id: NodeId) -> Any:
    return await peer._host.new_stream(ID.from_base58(node_id), [PROTOCOL_ID_V11])


async def say(stream: Any, sent: rpc_pb2.RPC | bytes) -> None:
    with suppress(StreamError):  # it may be dropped before it is through
        await stream.write(encode_varint_prefixed(sent if isinstance(sent, bytes) else sent.SerializeToString()))


async def test_who_tells_only_what_is_of_no_use_is_dropped() -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger(), limits=replace(FAST, requests_per_s=1.0, requests_burst=20.0))
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        stream = await speak(peer, a.node_id)
        refused = [encode(Transactions((b"no transaction %d" % number,))) for number in range(50)]
        await say(stream, packet(*refused))
        reason = "gossip: more than 1 messages a second that are of no use"
        await until(lambda: a.control.statistics().unreachable.get(peer.node_id) == reason)
        assert told(a).passed_over <= 20


@pytest.mark.usefixtures("gossip_alone")
async def test_what_one_node_refuses_goes_no_further() -> None:
    """A chain of three: what the first tells, the second refuses and the third never hears of."""
    async with network() as nursery, stranger(polite) as peer:
        b, c = await start(nursery, 2)
        await peer.dial(b.address)
        await b.control.wait_peers(2)
        stream = await speak(peer, b.node_id)
        await say(stream, packet(encode(Transactions((b"no transaction",))), encode(Transactions((b"tx good",)))))
        await c.ledger.wait_in_pool(b"tx good")
        assert (told(b).taken, told(b).passed_over) == (1, 1)
        assert (told(c).taken, told(c).passed_over) == (1, 0)


@pytest.mark.usefixtures("gossip_alone")
async def test_a_network_with_another_genesis_hears_nothing() -> None:
    other = sha256(b"another genesis").digest()
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        b = Member(FakeLedger(genesis_hash=other), a.address)
        await nursery.start(b.run)
        await until(lambda: "wrong genesis" in b.control.statistics().unreachable.get(a.node_id, ""))
        a.ledger.grow(1)
        await until(lambda: told(a).told == 1)
        assert (told(b).taken, told(b).passed_over) == (0, 0)


def test_of_a_packet_only_what_is_in_bounds_is_let_in() -> None:
    """py-libp2p would dial the addresses in a PRUNE, keep the signed record and every topic, and send a message as
    often as it is asked for."""
    told = packet(encode(NewHead(1)))
    told.senderRecord = b"addresses"
    for name in (TOPIC, "/other", *(f"/{number}" for number in range(100))):
        told.subscriptions.add(subscribe=True, topicid=name)
        told.control.graft.add(topicID=name)
        told.control.prune.add(topicID=name, backoff=60).peers.add(peerID=b"somebody", signedPeerRecord=b"there")
    told.control.iwant.add(messageIDs=[b"wanted"] * 10_000)
    told.control.ihave.add(topicID="/other", messageIDs=[b"%d" % number for number in range(PACKET_IDS_MAX + 1)])
    told.control.idontwant.add(messageIDs=[b"unwanted"])
    admitted = mesh._admitted(told, TOPIC)

    expected = packet(encode(NewHead(1)))
    expected.subscriptions.add(subscribe=True, topicid=TOPIC)
    expected.control.graft.add(topicID=TOPIC)
    expected.control.prune.add(topicID=TOPIC, backoff=60)
    expected.control.iwant.add(messageIDs=[b"wanted"])
    expected.control.ihave.add(topicID=TOPIC, messageIDs=[b"%d" % number for number in range(PACKET_IDS_MAX)])
    assert admitted == expected


def test_a_packet_that_says_nothing_leaves_nothing() -> None:
    assert mesh._admitted(rpc_pb2.RPC(), TOPIC) == rpc_pb2.RPC()


def test_a_message_of_every_kind_is_read_as_it_was_written() -> None:
    for said in (Transactions((b"tx 1", b"tx 2")), NewBlock(3, block(3)), NewHead(4)):
        assert gossip.decode_told(encode(said)) == said


def test_batches_keep_the_order_and_the_bounds() -> None:
    raws = [bytes([index % 256]) * (1 + index * 37 % 5_000) for index in range(1_000)]
    batches = list(gossip._batches(raws))
    assert [raw for batch in batches for raw in batch] == raws
    assert all(len(batch) <= 64 and sum(map(len, batch)) <= gossip.BATCH_BYTES_MAX for batch in batches)
    assert list(gossip._batches([])) == []
    assert list(gossip._batches([bytes(gossip.BATCH_BYTES_MAX + 1)] * 2)) == [(bytes(gossip.BATCH_BYTES_MAX + 1),)] * 2
