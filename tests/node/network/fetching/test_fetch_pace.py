"""Limits: the rule under a made-up clock, and threads that wait by the real one."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import Busy
from contracts.types import NodeId, ShardHash
from node.network.askers import NODES_PER_SHARD_MAX, REMEMBERED_S, SHARDS_MAX, Askers
from node.network.fetching.meter import SPAN_S, Meter
from node.network.pace import BURST_S, Pace, Share, Shares, Ticket
from node.network.wire import OTHERS_MAX

RATE = 1000.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.floats(0, 2)), min_size=1, max_size=60))
def test_no_more_goes_out_than_the_limit_and_a_burst(wishes: list[tuple[str, int, float]]) -> None:
    shares, now, granted = Shares(RATE), 100.0, 0
    began = now
    for name, size, pause in wishes:
        now += pause
        ticket = shares.ask(name, size)
        while not ticket.granted:
            now = max(now, shares.due())
            assert shares.grant(now)
        granted += size
        # The last one granted may still be on its way.
        assert granted - size <= RATE * (now - began + BURST_S) + 1e-6


@given(st.integers(2, 6), st.integers(1, 400), st.integers(0, 5))
def test_whoever_wants_all_they_can_get_gets_as_much_as_the_others(names: int, size: int, head_start: int) -> None:
    shares = Shares(RATE)
    waiting: dict[str, Ticket] = {}
    got = dict.fromkeys(map(str, range(names)), 0)
    for _ in range(head_start):  # one that was alone before has no debt
        alone = shares.ask("0", size)
        assert shares.grant(shares.due())
        assert alone.granted
    now = shares.due()
    for _ in range(50 * names):
        for name in got:
            if name not in waiting:
                # The last one asks for less at a time, and more often.
                waiting[name] = shares.ask(name, size if name != str(names - 1) else max(1, size // 3))
        now = max(now, shares.due())
        assert shares.grant(now)
        for name in [name for name, ticket in waiting.items() if ticket.granted]:
            got[name] += waiting.pop(name).size_bytes
    assert max(got.values()) - min(got.values()) <= 2 * size


def test_one_that_was_away_does_not_make_up_for_it() -> None:
    shares = Shares(RATE)
    for _ in range(50):
        shares.ask("busy", 100)
        assert shares.grant(shares.due())
    tickets = [(name, shares.ask(name, 100)) for name in ("late", "busy") * 5]
    for _ in range(6):
        assert shares.grant(shares.due())
    assert 2 <= sum(ticket.granted for name, ticket in tickets if name == "late") <= 4


def test_a_withdrawn_wish_is_not_granted() -> None:
    shares = Shares(RATE)
    first, second = shares.ask("a", 10), shares.ask("b", 10)
    shares.withdraw(first)
    assert shares.grant(shares.due())
    assert (first.granted, second.granted) == (False, True)
    assert not shares.grant(float("inf"))


def test_threads_wait_for_their_share_and_all_together_keep_the_limit() -> None:
    pace = Pace(1_000_000)
    got: dict[str, int] = {}

    def move(name: str) -> None:
        share = Share(pace, name)
        for _ in range(5):
            share.take(50_000)
            got[name] = got.get(name, 0) + 50_000

    threads = [threading.Thread(target=move, args=(name,)) for name in "abcd"]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    assert got == dict.fromkeys("abcd", 250_000)
    assert seconds > 1.0 - BURST_S - 0.06


def test_closing_a_share_ends_its_wait_and_nobody_elses() -> None:
    pace = Pace(1000)
    mine, other = Share(pace, "mine"), Share(pace, "other")
    mine.take(1000)
    failures: list[str] = []

    def wait() -> None:
        try:
            mine.take(10_000_000)
        except Busy as error:
            failures.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    mine.close()
    thread.join(10)
    assert failures == ["the connection was given up"]
    other.take(1)


def test_without_a_limit_nobody_waits() -> None:
    share = Share(Pace(0))
    began = time.monotonic()
    for _ in range(1000):
        share.take(1 << 40)
    assert time.monotonic() - began < 1


def test_a_meter_forgets() -> None:
    meter = Meter()
    for second in range(20):
        meter.add(500, float(second))
    assert meter.rate(19.0) == pytest.approx(500 * 11 / 10)
    assert meter.rate(19.0 + SPAN_S + 1) == 0.0


def test_askers_are_told_of_each_other_for_a_while() -> None:
    askers, shard = Askers(), ShardHash(bytes(32))
    a, b, c = map(NodeId, "abc")
    assert askers.others(shard, a, 0.0) == ()
    assert askers.others(shard, b, 1.0) == (a,)
    assert askers.others(shard, c, 2.0) == (b, a)
    assert askers.others(shard, a, 3.0) == (c, b)
    assert askers.others(ShardHash(bytes([1]) * 32), a, 3.0) == ()
    assert askers.others(shard, a, REMEMBERED_S + 1.5) == (c,)


def test_askers_are_bounded() -> None:
    askers = Askers()
    for number in range(3 * NODES_PER_SHARD_MAX):
        others = askers.others(ShardHash(bytes(32)), NodeId(str(number)), 0.0)
    assert len(others) == OTHERS_MAX
    assert len(askers._by_shard[ShardHash(bytes(32))].nodes) == NODES_PER_SHARD_MAX
    for number in range(2 * SHARDS_MAX):
        askers.others(ShardHash(number.to_bytes(32)), NodeId("a"), 0.0)
    assert len(askers._by_shard) == SHARDS_MAX


def test_what_was_given_is_told_until_everything_was() -> None:
    askers, shard = Askers(), ShardHash(bytes(32))
    assert askers.given(shard) == b""
    askers.gave(shard, range(1, 3), 10)
    assert askers.given(shard) == bytes([0b110])
    askers.gave(shard, range(9, 10), 10)
    assert askers.given(shard) == bytes([0b110, 0b10])
    assert askers.given(ShardHash(bytes([1]) * 32)) == b"", "another shard's pieces are others"
    askers.gave(shard, range(2**32 - 5, 2**32), 10)
    askers.gave(shard, range(8, 2**32), 10)
    assert askers.given(shard) == bytes([0b110, 0b11]), "pieces that there are not cost nothing"
    askers.gave(shard, range(10), 10)
    assert askers.given(shard) == b"", "what says nothing any more is forgotten"
