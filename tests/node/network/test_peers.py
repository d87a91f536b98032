"""Back-off, bans and resending: bookkeeping under a hand-driven clock."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from contracts.types import NodeId
from node.network.addresses import ControlAddress
from node.network.messages import TRANSACTIONS_BYTES_MAX, TRANSACTIONS_MAX
from node.network.outbox import RESEND_S_MAX, RESEND_S_MIN, SENDS_MAX, Outbox
from node.network.peers import (
    ADDRESSES_PER_PEER_MAX,
    BAN_S_MAX,
    BAN_S_MIN,
    OFFENCES_FORGOTTEN_S,
    RECORDS_MAX,
    RETRY_S_MAX,
    RETRY_S_MIN,
    PeerBook,
)

ME, PEER = NodeId("me"), NodeId("peer")


def address(node_id: NodeId, port: int = 1) -> ControlAddress:
    return ControlAddress(node_id, "ip4", "10.0.0.1", port)


def book(*addresses: ControlAddress) -> PeerBook:
    made = PeerBook(ME, _random=random.Random(1))
    made.set_targets(addresses)
    return made


def test_a_target_is_due_at_once_and_we_are_none_ourselves() -> None:
    made = book(address(ME), address(PEER), address(PEER), address(PEER, 2))
    assert made.due(0) == [(PEER, (address(PEER), address(PEER, 2)))]
    assert made.next_due(0) == float("inf")


def test_pauses_grow_to_a_bound_and_end_with_success() -> None:
    made, now, pauses = book(address(PEER)), 0.0, []
    for _ in range(12):
        made.failed(PEER, now, "refused")
        assert made.due(now) == []
        pauses.append(made.next_due(now))
        now += pauses[-1]
        assert [node_id for node_id, _ in made.due(now)] == [PEER]
    assert RETRY_S_MIN * 0.75 <= pauses[0] <= RETRY_S_MIN * 1.25
    assert RETRY_S_MAX * 0.75 <= pauses[-1] <= RETRY_S_MAX * 1.25
    assert made.reasons() == {PEER: "refused"}
    made.succeeded(PEER)
    assert made.reason(PEER) == ""
    made.failed(PEER, now, "closed")
    assert made.next_due(now) <= RETRY_S_MIN * 1.25


def test_bans_double_to_a_bound_and_are_forgotten() -> None:
    made, now, bans = book(address(PEER)), 0.0, []
    for _ in range(10):
        made.offended(PEER, now, "bad block")
        assert made.is_banned(PEER, now)
        bans.append(made.next_due(now))
        now += bans[-1]
        assert not made.is_banned(PEER, now)
    assert bans[:3] == [BAN_S_MIN, 2 * BAN_S_MIN, 4 * BAN_S_MIN]
    assert bans[-1] == BAN_S_MAX
    now += OFFENCES_FORGOTTEN_S + 1
    made.offended(PEER, now, "bad block")
    assert made.next_due(now) == BAN_S_MIN


def test_a_success_does_not_lift_a_ban() -> None:
    made = book(address(PEER))
    made.offended(PEER, 0, "bad block")
    made.succeeded(PEER)
    assert made.is_banned(PEER, 1)
    assert made.due(1) == []


def test_a_node_that_is_no_longer_named_is_not_dialled() -> None:
    made = book(address(PEER))
    made.set_targets([])
    assert made.due(0) == []
    assert not made.is_target(PEER)


def test_the_book_is_bounded_and_forgets_idle_nodes_first() -> None:
    made = book(address(PEER), *(address(PEER, port) for port in range(2, 100)))
    assert len(made.due(0)[0][1]) == ADDRESSES_PER_PEER_MAX
    made.offended(NodeId("bad"), 0, "bad block")
    for number in range(RECORDS_MAX + 10):
        made.failed(NodeId(f"n{number}"), 0, "closed")
    assert len(made.reasons()) == RECORDS_MAX - 1
    assert made.is_target(PEER)
    assert made.is_banned(NodeId("bad"), 1)


def test_a_transaction_is_sent_at_once_and_again_with_pauses_a_bounded_number_of_times() -> None:
    box, now, times = Outbox(), 0.0, []
    while (batch := box.take([b"tx"], now)) or box.next_due() < float("inf"):
        if batch:
            times.append(now)
            assert box.take([b"tx"], now) == []
        else:
            now = box.next_due()
    assert len(times) == SENDS_MAX
    assert times[:2] == [0.0, RESEND_S_MIN]
    assert max(b - a for a, b in itertools.pairwise(times)) == RESEND_S_MAX


def test_what_left_the_pool_is_forgotten() -> None:
    box = Outbox()
    assert box.take([b"a", b"b"], 0) == [b"a", b"b"]
    assert box.take([b"b"], 0) == []
    assert box.take([b"a", b"b"], 0) == [b"a"]


def test_a_peer_does_not_get_its_own_back_at_once() -> None:
    box = Outbox()
    box.received(b"a", 0)
    assert box.take([b"a"], 0) == []
    assert box.take([b"a"], RESEND_S_MIN) == [b"a"]


@given(st.lists(st.integers(min_value=1, max_value=131_072), max_size=200))
def test_batches_keep_the_order_and_the_limits(sizes: list[int]) -> None:
    pool = [number.to_bytes(4, "big") + bytes(size) for number, size in enumerate(sizes)]
    box, sent = Outbox(), []
    while batch := box.take(pool, 0):
        assert len(batch) <= TRANSACTIONS_MAX
        assert sum(map(len, batch)) <= TRANSACTIONS_BYTES_MAX
        sent += batch
    assert sent == pool
