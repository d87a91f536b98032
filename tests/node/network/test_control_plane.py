"""Real libp2p hosts on loopback: sync, forwarding, and peers that break the rules."""

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
from libp2p.stream_muxer.yamux.yamux import TYPE_DATA, YAMUX_HEADER_FORMAT

from contracts.errors import BadPeer, Busy, Conflict, NoSpace
from contracts.types import NodeId
from node.agreement import StateMark
from node.network import host as host_module
from node.network.addresses import ControlAddress, DataAddress, control_address
from node.network.identity import NodeIdentity
from node.network.messages import (
    ANSWER_BYTES_MAX,
    BLOCKS_MAX,
    REQUEST_BYTES_MAX,
    Answer,
    Blocks,
    Delivered,
    GetBlocks,
    GetNodes,
    Hello,
    Nodes,
    Submitted,
    SubmitTransactions,
    TurnedAway,
    Welcome,
    decode_answer,
    decode_request,
    encode,
)
from node.network.muxer import BUFFERED_BYTES_MAX
from node.network.session import SyncLimits
from tests.node.network.fakes import (
    GENESIS,
    NODES,
    FakeLedger,
    block,
    receipts,
    until,
)
from tests.node.network.members import DEADLINE_S, FAST, Member, host_address, lose_gossip, network, polite, stranger


@pytest.mark.parametrize("is_lost", [False, True], ids=["with gossip", "without"])
async def test_three_nodes_come_to_the_same_chain_and_stay_there(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C knows B only and B knows A only: blocks and transactions still reach everyone."""
    if is_lost:
        lose_gossip(monkeypatch, 0)
    async with network() as nursery:
        a = Member(FakeLedger(blocks=2 * BLOCKS_MAX + 7), data_endpoint=DataAddress("10.1.2.3", 9946))
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        c = Member(FakeLedger(blocks=3), b.address)
        await nursery.start(c.run)
        await b.control.wait_caught_up()
        await c.ledger.wait_head(2 * BLOCKS_MAX + 6)
        assert a.ledger.blocks == b.ledger.blocks == c.ledger.blocks
        assert b.control.data_addresses() == {a.node_id: DataAddress("10.1.2.3", 9946)}

        a.ledger.grow(1)
        await c.ledger.wait_head(2 * BLOCKS_MAX + 7)
        await c.ledger.submit(b"tx from c")
        await a.ledger.wait_in_pool(b"tx from c")
        assert c.ledger.blocks == a.ledger.blocks


async def test_many_peers_do_not_make_a_node_fetch_the_chain_many_times() -> None:
    async with network() as nursery:
        full = [Member(FakeLedger(blocks=5 * BLOCKS_MAX)) for _ in range(3)]
        for member in full:
            await nursery.start(member.run)
        late = Member(FakeLedger(), *(member.address for member in full))
        await nursery.start(late.run)
        await late.control.wait_peers(3)
        await late.control.wait_caught_up()
        assert late.control.statistics().blocks_received <= 6 * BLOCKS_MAX


async def test_a_block_that_all_peers_have_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_gossip(monkeypatch, 0)
    async with network() as nursery:
        peers = [Member(FakeLedger(blocks=2)) for _ in range(4)]
        for member in peers:
            await nursery.start(member.run)
        a = Member(FakeLedger(blocks=2), *(member.address for member in peers))
        await nursery.start(a.run)
        await a.control.wait_peers(4)
        for number in range(3, 10):
            for member in peers:
                member.ledger.grow(1)
            await a.ledger.wait_head(number - 1)
            await until(lambda: a.control.statistics().sync.mode == "idle")
        assert a.control.statistics().blocks_received == 7


async def test_members_of_the_ledger_are_dialled_as_they_appear() -> None:
    members: list[ControlAddress] = []
    async with network() as nursery:
        a, b = Member(FakeLedger(blocks=4)), Member(FakeLedger(), members=lambda: tuple(members))
        await nursery.start(a.run)
        await nursery.start(b.run)
        members += [a.address, b.address]
        await b.control.wait_peers()
        await b.ledger.wait_head(3)
        assert a.peers() == [b.node_id]


async def test_a_node_that_was_down_is_found_again() -> None:
    """libp2p refuses a peer that was down for a minute unless it is told otherwise."""
    async with network() as nursery:
        a = Member(FakeLedger(blocks=1))
        port = await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await b.ledger.wait_head(0)
        a.scope.cancel()
        await a.stopped.wait()
        await until(lambda: not b.peers())
        await until(lambda: "Connection refused" in b.control.statistics().unreachable.get(a.node_id, ""))
        again = Member(a.ledger, port=port, identity=a.identity)
        await nursery.start(again.run)
        again.ledger.grow(1)
        await b.ledger.wait_head(1)
        assert b.peers() == [a.node_id]
        assert b.control.statistics().unreachable == {}


async def test_another_genesis_is_turned_away_with_that_reason_on_both_sides() -> None:
    other = bytes(32)
    async with network() as nursery:
        a = Member(FakeLedger(blocks=3))
        await nursery.start(a.run)
        b = Member(FakeLedger(genesis_hash=other), a.address)
        await nursery.start(b.run)
        for here, there in ((a, b), (b, a)):
            await until(lambda h=here, t=there: t.node_id in h.control.statistics().unreachable)
            reason = here.control.statistics().unreachable[there.node_id]
            assert "wrong genesis" in reason
            assert other.hex() in reason
            assert GENESIS.hex() in reason
        await until(lambda: a.node_id in b.control._sessions)
        assert "wrong genesis" in b.control.statistics().unreachable[a.node_id], "it stands while they try again"
        assert b.ledger.imported == 0
        assert a.peers() == b.peers() == []


async def test_another_chain_id_is_turned_away() -> None:
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        b = Member(FakeLedger(chain_id=8), a.address)
        await nursery.start(b.run)
        await until(lambda: "wrong chain id" in b.control.statistics().unreachable.get(a.node_id, ""))


async def test_a_bad_block_drops_its_peer_and_keeps_it_out() -> None:
    asked: list[bytes] = []

    async def lie(node_id: NodeId, frame: bytes) -> bytes:
        asked.append(frame)
        match decode_request(frame):
            case Hello():
                return encode(Welcome(2, None))
            case GetBlocks():
                return encode(Blocks(2, (block(1), b"rubbish")))
        return await polite(node_id, frame)

    async with network() as nursery:
        identity = NodeIdentity.generate()
        async with stranger(lie, identity) as liar:
            a = Member(FakeLedger(), host_address(liar))
            await nursery.start(a.run)
            await until(lambda: a.control.statistics().unreachable.get(liar.node_id) == "not a sealed block")
            assert a.ledger.blocks == [block(1)]
            # It is refused as well when it is the one that dials.
            await until(lambda: not liar.is_connected(a.node_id))
            asked.clear()
            await liar.dial(a.address)
            await until(lambda: not liar.is_connected(a.node_id))
            assert a.peers() == []
            assert asked == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Blocks(9, ()), "says its head is 9, but has no block 1"),
        (Welcome(1, None), "answered GetBlocks with Welcome"),
        (Submitted(("",)), "answered GetBlocks with Submitted"),
    ],
)
async def test_a_peer_that_does_not_give_what_it_says_is_dropped(answer: object, reason: str) -> None:
    async def tease(node_id: NodeId, frame: bytes) -> bytes:
        match decode_request(frame):
            case Hello():
                return encode(Welcome(9, None))
            case GetBlocks():
                return encode(answer)  # type: ignore[arg-type]
        return await polite(node_id, frame)

    async with network() as nursery, stranger(tease) as peer:
        a = Member(FakeLedger(), host_address(peer))
        await nursery.start(a.run)
        await until(lambda: a.control.statistics().unreachable.get(peer.node_id) == reason)


async def test_a_new_node_that_is_far_behind_joins_without_executing() -> None:
    """Blocks with receipts and the state's nodes come over the wire, from both."""
    limits = replace(FAST, fast_blocks_min=BLOCKS_MAX)
    async with network() as nursery:
        full = [Member(FakeLedger(blocks=3 * BLOCKS_MAX)) for _ in range(2)]
        for member in full:
            await nursery.start(member.run)
        late = Member(FakeLedger(), *(member.address for member in full), limits=limits)
        await nursery.start(late.run)
        await late.control.wait_peers(2)
        await late.control.wait_caught_up()
        assert (late.ledger.imported, late.ledger.blocks) == (0, full[0].ledger.blocks)
        assert len(late.ledger.fast_sync.given) == NODES
        full[0].ledger.grow(1)
        await late.ledger.wait_head(3 * BLOCKS_MAX)
        assert late.ledger.imported == 1
        await until(lambda: late.control.statistics().sync.mode == "idle")


@pytest.mark.parametrize(
    ("blocks", "nodes", "reason"),
    [
        (Blocks(9, (block(1),), (), ()), None, "sent 1 blocks and 0 receipts for 9 blocks"),
        (Blocks(9, (block(1),), (), (b"forged",)), None, "not block 1 with its receipts"),
        (None, Nodes((b"rubbish",)), "not the nodes asked for"),
        (None, Delivered(), "answered GetNodes with Delivered"),
    ],
)
async def test_a_peer_that_deceives_who_joins_is_dropped(
    blocks: Blocks | None, nodes: Answer | None, reason: str
) -> None:
    whole = tuple(map(block, range(1, 10)))

    async def deceive(node_id: NodeId, frame: bytes) -> bytes:
        match decode_request(frame):
            case Hello():
                return encode(Welcome(9, None))
            case GetBlocks():
                return encode(blocks or Blocks(9, whole, (), tuple(map(receipts, range(1, 10)))))
            case GetNodes():
                return encode(nodes or Nodes(()))
        return await polite(node_id, frame)

    async with network() as nursery, stranger(deceive) as peer:
        a = Member(FakeLedger(), host_address(peer), limits=replace(FAST, fast_blocks_min=1))
        await nursery.start(a.run)
        await until(lambda: a.control.statistics().unreachable.get(peer.node_id) == reason)
        assert a.ledger.head.number == 0


async def test_a_peer_that_serves_old_blocks_for_ever_is_dropped() -> None:
    async def repeat(node_id: NodeId, frame: bytes) -> bytes:
        match decode_request(frame):
            case Hello():
                return encode(Welcome(5, None))
            case GetBlocks():
                return encode(Blocks(5, (block(1),)))
        return await polite(node_id, frame)

    async with network() as nursery, stranger(repeat) as peer:
        a = Member(FakeLedger(), host_address(peer))
        await nursery.start(a.run)
        await until(lambda: "they end at 1" in a.control.statistics().unreachable.get(peer.node_id, ""))


async def test_trouble_of_our_own_ledger_is_no_offence_of_the_peer() -> None:
    async with network() as nursery:
        a = Member(FakeLedger(blocks=2))
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        b.ledger.refuse_with = NoSpace("the disk is full")
        await nursery.start(b.run)
        await until(lambda: b.control.statistics().unreachable.get(a.node_id) == "the disk is full")
        b.ledger.refuse_with = None
        await b.ledger.wait_head(1)


async def test_a_silent_peer_is_given_up_while_others_are_pulled_from() -> None:
    async def mute(node_id: NodeId, frame: bytes) -> bytes:
        if isinstance(decode_request(frame), Hello):
            return encode(Welcome(100, None))
        await trio.sleep_forever()
        raise AssertionError

    async with network() as nursery, stranger(mute) as peer:
        good = Member(FakeLedger(blocks=10))
        await nursery.start(good.run)
        limits = SyncLimits(long_poll_s=0.5, answer_s_max=0.5, redial_s_max=0.1)
        a = Member(FakeLedger(), host_address(peer), good.address, limits=limits)
        await nursery.start(a.run)
        await a.ledger.wait_head(9)
        await until(lambda: "did not answer" in a.control.statistics().unreachable.get(peer.node_id, ""))


GARBAGE = [
    (b"", "is none"),
    (b"\xc1", "is none"),
    (os.urandom(2000), "is none"),
    (msgspec.msgpack.encode({"type": "Hello"}), "is none"),
    (msgspec.msgpack.encode({"type": "FormatDisk", "genesis_hash": GENESIS}), "is none"),
    (
        msgspec.msgpack.encode({"type": "GetBlocks", "genesis_hash": GENESIS, "start": 0, "count": 1, "wait_s": 0}),
        "none",
    ),
    (
        msgspec.msgpack.encode({"type": "GetBlocks", "genesis_hash": GENESIS, "start": 1, "count": 10**9, "wait_s": 0}),
        "none",
    ),
    (b"\x91" * 100_000, "is none"),
    (bytes(REQUEST_BYTES_MAX + 1), "over the limit"),
]


@pytest.mark.parametrize(("frame", "reason"), GARBAGE, ids=range(len(GARBAGE)))
async def test_a_request_that_is_none_drops_its_sender(frame: bytes, reason: str) -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        with pytest.raises(Busy):
            await peer.request(a.node_id, frame, ANSWER_BYTES_MAX, 5.0)
        await until(lambda: reason in a.control.statistics().unreachable.get(peer.node_id, ""))
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await b.control.wait_peers()


async def test_a_peer_that_floods_is_dropped_and_kept_out() -> None:
    async with network() as nursery, stranger(polite) as flooder:
        a = Member(FakeLedger(), limits=replace(FAST, requests_per_s=1.0, requests_burst=20.0))
        await nursery.start(a.run)
        await flooder.dial(a.address)

        async def flood() -> None:
            for _ in range(100):
                await flooder.request(a.node_id, encode(SubmitTransactions(GENESIS, (b"tx 1",))), ANSWER_BYTES_MAX, 5)

        with pytest.raises(Busy):
            await flood()
        assert 0 < a.control.statistics().transactions_received < 50, "a burst of 20, and one for each second it took"
        reason = "more than 1 requests a second"
        await until(lambda: a.control.statistics().unreachable.get(flooder.node_id) == reason)
        await flooder.dial(a.address)
        await until(lambda: not flooder.is_connected(a.node_id))


async def test_an_answer_that_is_too_large_drops_its_sender() -> None:
    async def bloat(node_id: NodeId, frame: bytes) -> bytes:
        if isinstance(decode_request(frame), Hello):
            return bytes(ANSWER_BYTES_MAX + 1)
        return await polite(node_id, frame)

    async with network() as nursery, stranger(bloat) as peer:
        a = Member(FakeLedger(), host_address(peer))
        await nursery.start(a.run)
        await until(lambda: "over the limit" in a.control.statistics().unreachable.get(peer.node_id, ""))


@pytest.mark.parametrize(
    "protocol_bytes",
    [b"\x05\xff\xfe\xfd\xfc\n", b"\xff" * 40, b"\x13/multistream/1.0.0\n\x03\xff\xff\n"],
    ids=["handshake", "length", "name"],
)
async def test_garbage_in_protocol_negotiation_does_not_end_the_host(protocol_bytes: bytes) -> None:
    """libp2p 0.8.1 raises UnicodeDecodeError out of its stream handler, which would end its whole service."""
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        stream = await peer._network.new_stream(host_module.ID.from_base58(a.node_id))
        await stream.write(protocol_bytes)
        with pytest.raises(host_module.STREAM_ERRORS):
            await read_until_it_ends(stream)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await b.control.wait_peers()


async def read_until_it_ends(stream: Any) -> None:
    while True:
        await stream.read(1000)


async def test_garbage_instead_of_noise_does_not_end_the_host() -> None:
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\x13/multistream/1.0.0\n" + bytes(500)):
            stream = await trio.open_tcp_stream("127.0.0.1", a.control.port)
            await stream.send_all(garbage)
            await stream.aclose()
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await b.control.wait_peers()


async def test_streams_of_one_peer_are_bounded() -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        poll = encode(GetBlocks(GENESIS, 1, 1, 20.0))
        answers: list[bytes] = []
        refused: list[Busy] = []

        async def ask() -> None:
            try:
                answers.append(await peer.request(a.node_id, poll, ANSWER_BYTES_MAX, DEADLINE_S))
            except Busy as error:
                refused.append(error)

        async with trio.open_nursery() as asking:
            for _ in range(host_module.STREAMS_PER_PEER_MAX + 5):
                asking.start_soon(ask)
            await until(lambda: len(refused) == 5)
            a.ledger.grow(1)
        assert len(answers) == host_module.STREAMS_PER_PEER_MAX
        assert len(refused) == 5
        assert a.peers() == [peer.node_id]


async def test_a_frame_of_any_size_is_not_waited_for() -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        stream = await peer._network.new_stream(host_module.ID.from_base58(a.node_id))
        muxed = stream.muxed_conn
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, 2**31)
        await muxed._write_frame(header)
        await until(lambda: not a.peers())


async def test_a_peer_cannot_fill_our_memory() -> None:
    """It sends on and on, past the window, while its request is being answered."""
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        stream = await peer._host.new_stream(host_module.ID.from_base58(a.node_id), [host_module.PROTOCOL])
        poll = encode(GetBlocks(GENESIS, 1, 1, 5.0))
        await stream.write(struct.pack(">I", len(poll)) + poll)
        body = bytes(60_000)
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.muxed_stream.stream_id, len(body))
        assert a.control._host is not None
        (ours,) = a.control._host._network.get_connections(host_module.ID.from_base58(peer.node_id))
        held = 0
        for _ in range(2 * BUFFERED_BYTES_MAX // len(body)):
            await stream.muxed_conn._write_frame(header + body)
            held = max(held, sum(map(len, ours.muxed_conn.stream_buffers.values())))
        assert BUFFERED_BYTES_MAX // 2 < held <= BUFFERED_BYTES_MAX


async def test_inbound_connections_come_and_go_without_using_up_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """libp2p 0.8.1 gives an inbound slot back only when the host ends."""
    monkeypatch.setattr(host_module, "CONNECTIONS_MAX", 3)
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        for _ in range(6):
            await peer.dial(a.address)
            await a.control.wait_peers()
            await peer.disconnect(a.node_id)
            await until(lambda: not a.peers())


async def test_transactions_are_sent_again_until_they_leave_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.network.outbox.RESEND_S_MIN", 0.05)
    received: list[bytes] = []

    async def forget(node_id: NodeId, frame: bytes) -> bytes:
        request = decode_request(frame)
        if isinstance(request, SubmitTransactions):
            received.extend(request.transactions)
        return await polite(node_id, frame)

    async with network() as nursery, stranger(forget) as peer:
        a = Member(FakeLedger(), host_address(peer))
        await nursery.start(a.run)
        await a.ledger.submit(b"tx 1")
        await until(lambda: received.count(b"tx 1") >= 3)
        a.ledger.clear_pool()
        await a.ledger.submit(b"tx 2")
        await until(lambda: received.count(b"tx 2") >= 1)


async def test_a_refused_transaction_says_why_and_the_rest_are_taken() -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        frame = encode(SubmitTransactions(GENESIS, (b"nonsense", b"tx good")))
        answer = decode_answer(await peer.request(a.node_id, frame, ANSWER_BYTES_MAX, 5.0))
        assert answer == Submitted(("not a signed Ethereum transaction", ""))
        assert a.ledger.pending() == [b"tx good"]


async def test_a_request_for_another_network_is_turned_away_though_the_greeting_was_right() -> None:
    async with network() as nursery, stranger(polite) as peer:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        await peer.dial(a.address)
        await a.control.wait_peers()
        frame = encode(GetBlocks(bytes(32), 1, 1, 0))
        answer = decode_answer(await peer.request(a.node_id, frame, ANSWER_BYTES_MAX, 5.0))
        assert isinstance(answer, TurnedAway)
        assert "wrong genesis" in answer.reason


async def test_another_key_at_an_address_is_not_taken_for_the_node() -> None:
    async with network() as nursery, stranger(polite) as peer:
        expected = NodeIdentity.generate().node_id
        address = control_address(expected, "127.0.0.1", peer.port)
        a = Member(FakeLedger(), address)
        await nursery.start(a.run)
        await until(lambda: expected in a.control.statistics().unreachable)
        assert f"Another node than {expected} answers" in a.control.statistics().unreachable[expected]


async def test_a_port_in_use_is_said() -> None:
    """libp2p listens with SO_REUSEPORT and would share the port silently."""
    async with network() as nursery:
        a = Member(FakeLedger())
        port = await nursery.start(a.run)
        with pytest.raises(Conflict, match=f"Port {port} on 127.0.0.1 is in use"):
            await Member(FakeLedger(), port=port).control.run()


async def test_stopping_leaves_no_socket() -> None:
    def sockets() -> set[str]:
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                found.add(os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                continue
        return {target for target in found if target.startswith("socket:")}

    before = sockets()
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await b.control.wait_peers()
        assert len(sockets()) > len(before)
    assert sockets() == before


async def test_names_are_resolved_by_the_system() -> None:
    async with network() as nursery:
        a = Member(FakeLedger(blocks=1))
        port = await nursery.start(a.run)
        b = Member(FakeLedger(), ControlAddress(a.node_id, "dns4", "localhost", port))
        await nursery.start(b.run)
        await b.ledger.wait_head(0)


async def test_an_address_where_nobody_listens_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    nobody = NodeIdentity.generate().node_id
    async with network() as nursery:
        a = Member(FakeLedger(), control_address(nobody, "127.0.0.1", port))
        await nursery.start(a.run)
        await until(lambda: "cannot be reached" in a.control.statistics().unreachable.get(nobody, ""))


async def test_an_answer_that_is_none_is_a_bad_peer() -> None:
    with pytest.raises(BadPeer):
        decode_answer(b"\x93\x01\x02\x03")


async def test_words_of_consensus_reach_the_peer_in_order_and_states_are_compared() -> None:
    async with network() as nursery:
        a = Member(FakeLedger(blocks=1))
        a.state.own = (StateMark(1, b"\1" * 32),)
        await nursery.start(a.run)
        b = Member(FakeLedger(blocks=1), a.address)
        b.state.own = (StateMark(1, b"\2" * 32),)
        await nursery.start(b.run)
        await until(lambda: a.node_id in b.consensus.outboxes and b.node_id in a.consensus.outboxes)
        words = [b"word %d" % n for n in range(20)]
        for word in words:
            await a.consensus.outboxes[b.node_id].sender.send(word)
        await until(lambda: len(b.consensus.received) == len(words))
        assert b.consensus.received == [(a.node_id, word) for word in words]
        assert (a.node_id, a.state.own) in b.state.compared
        assert (b.node_id, b.state.own) in a.state.compared


async def test_a_peer_whose_words_are_none_is_dropped() -> None:
    async with network() as nursery:
        a, b = Member(FakeLedger()), None
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await until(lambda: a.node_id in b.consensus.outboxes)
        await b.consensus.outboxes[a.node_id].sender.send(b"nonsense")
        await until(lambda: b.node_id in a.control.statistics().unreachable)
        assert "no word of consensus" in a.control.statistics().unreachable[b.node_id]


async def test_a_peer_that_consensus_blames_is_dropped() -> None:
    async with network() as nursery:
        a = Member(FakeLedger())
        await nursery.start(a.run)
        b = Member(FakeLedger(), a.address)
        await nursery.start(b.run)
        await until(lambda: a.peers() == [b.node_id])
        a.consensus.on_offence(b.node_id, "a stranger's vote")
        await until(lambda: b.node_id in a.control.statistics().unreachable)
        assert a.control.statistics().unreachable[b.node_id] == "a stranger's vote"


async def test_a_node_that_is_stuck_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for block 2 and is asked for block 4: whoever is asked tells of its own head, not of the question."""
    monkeypatch.setattr("node.network.session.LAG_S_MAX", 0.0)

    async def hang(sealed: Sequence[bytes]) -> None:
        await trio.sleep_forever()

    async with network() as nursery:
        stuck = Member(FakeLedger(blocks=1))
        stuck.ledger.import_blocks = hang  # type: ignore[method-assign]
        await nursery.start(stuck.run)
        a = Member(FakeLedger(blocks=3), stuck.address)
        await nursery.start(a.run)
        await until(lambda: a.control.statistics().lagging)
        assert [peer.head_number for peer in a.control.statistics().peers] == [1]


async def test_a_peer_that_stays_at_an_old_block_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be stuck, or keep the newer blocks from us: asking others shows it."""
    monkeypatch.setattr("node.network.session.LAG_S_MAX", 0.0)
    async with network() as nursery, stranger(polite) as old:
        new = Member(FakeLedger(blocks=3))
        await nursery.start(new.run)
        a = Member(FakeLedger(), host_address(old), new.address)
        await nursery.start(a.run)
        await a.ledger.wait_head(2)
        await until(lambda: a.control.statistics().lagging)
        assert a.control.statistics().lagging == (old.node_id,)
