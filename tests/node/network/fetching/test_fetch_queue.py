"""The queue of pieces under a made-up clock: every piece comes, rarest first, and nothing is asked for in vain."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.types import PIECE_SIZE
from node.network.fetching.queue import (
    LANES_PER_PIECE_MAX,
    RUN_PIECES_MAX,
    SILENT_S,
    SOONER_S,
    SOONER_TIMES,
    WINDOW_PIECES,
    Lane,
    PieceQueue,
)

FAST = 1e12
"""Bytes a second: a run is then as long as it may be."""
COUNT_MAX = 40


def queue_of(count: int, missing: range | list[int] | None = None, seed: int = 1) -> PieceQueue:
    return PieceQueue.of(count, range(count) if missing is None else missing, random.Random(seed))


def bits(*pieces: int) -> int:
    return sum(1 << piece for piece in pieces)


def pieces_of(lane: Lane) -> list[int]:
    return [index for index in range(lane.asked.bit_length()) if lane.asked >> index & 1]


class Fetch(RuleBasedStateMachine):
    """Lanes that come, go, stall, lose pieces and learn of new ones."""

    @initialize(count=st.integers(1, COUNT_MAX), data=st.data(), seed=st.integers(0, 1000))
    def begin(self, count: int, data: st.DataObject, seed: int) -> None:
        missing = data.draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1))
        self.queue = queue_of(count, missing, seed)
        self.wanted = set(missing)
        self.now = 0.0
        self.copies = 0

    def lane(self, data: st.DataObject, busy: bool) -> Lane | None:
        lanes = [lane for lane in self.queue.lanes if bool(lane.asked) == busy]
        return data.draw(st.sampled_from(lanes)) if lanes else None

    @rule(have=st.integers(0, 2**COUNT_MAX - 1))
    @precondition(lambda self: len(self.queue.lanes) < 5)
    def join(self, have: int) -> None:
        lane = self.queue.join(have)
        assert lane.have <= self.queue.everything

    @rule(data=st.data(), rate=st.sampled_from([0.0, PIECE_SIZE * 3.5, FAST]))
    def take(self, data: st.DataObject, rate: float) -> None:
        lane = self.lane(data, busy=False)
        if lane is None:
            return
        asked_before = [other.asked for other in self.queue.lanes]
        run = self.queue.take(lane, self.now, rate)
        elsewhere = 0
        for asked in asked_before:
            elsewhere |= asked
        if run is None:
            assert not self.queue.missing & lane.have & ~elsewhere, "there was something to ask of it"
            return
        assert 1 <= len(run.pieces) <= RUN_PIECES_MAX
        if rate == 0.0:
            assert len(run.pieces) == 1
        for index in run.pieces:
            assert index in self.wanted, "it is here already"
            assert lane.have >> index & 1, "its source does not have it"
            assert sum(asked >> index & 1 for asked in asked_before) < LANES_PER_PIECE_MAX
            if run.silent is None:
                assert not elsewhere >> index & 1, "another lane is at it"
        if run.silent is not None:
            assert run.silent is not lane
            waited_s = self.now - run.silent.heard
            assert waited_s >= SILENT_S or SOONER_TIMES * lane.piece_s < run.silent.piece_s - waited_s

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        lane = self.lane(data, busy=True)
        if lane is None:
            return
        index = pieces_of(lane)[0]
        assert self.queue.arrived(lane, index, self.now) == (index in self.wanted)
        self.wanted.discard(index)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if self.queue.lanes:
            self.queue.leave(data.draw(st.sampled_from(self.queue.lanes)))

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        lane = self.lane(data, busy=True)
        if lane is not None:
            index = pieces_of(lane)[0]
            self.queue.refuse(lane, index)
            self.queue.finish(lane)
            self.queue.update(lane, self.queue.everything)
            assert not lane.have >> index & 1, "it is not asked for that again"

    @rule(data=st.data(), have=st.integers(0, 2**COUNT_MAX - 1))
    def learn(self, data: st.DataObject, have: int) -> None:
        lane = self.lane(data, busy=False)
        if lane is not None:
            self.queue.update(lane, have)

    @rule(seconds=st.floats(0, 5))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def missing_is_what_did_not_come(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.missing == bits(*self.wanted)

    def teardown(self) -> None:
        """Whatever happened, one honest source is enough to end it, within a few runs for each piece."""
        if not hasattr(self, "queue"):
            return
        honest = self.queue.join(self.queue.everything)
        for _ in range(3 * COUNT_MAX):
            if not self.wanted:
                break
            self.now += 1000
            run = self.queue.take(honest, self.now, FAST)
            for index in run.pieces if run else ():
                self.queue.arrived(honest, index, self.now)
                self.wanted.discard(index)
        stuck = {i for i in self.wanted if sum(lane.asked >> i & 1 for lane in self.queue.lanes) < LANES_PER_PIECE_MAX}
        assert not stuck


TestFetch = Fetch.TestCase
TestFetch.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=6), st.integers(0, 99))
def test_the_first_piece_asked_for_is_one_of_the_rarest(haves: list[int], seed: int) -> None:
    queue = queue_of(16, seed=seed)
    lanes = [queue.join(have) for have in haves]
    run = queue.take(lanes[0], 0.0, 0.0)
    copies = {index: sum(have >> index & 1 for have in haves) for index in range(16) if haves[0] >> index & 1}
    if not copies:
        assert run is None
    else:
        assert run is not None
        assert copies[run.pieces.start] == min(copies.values())


@given(st.lists(st.tuples(st.integers(0, 2**8 - 1), st.integers(0, 2**8 - 1)), min_size=1, max_size=4))
def test_what_a_source_gave_to_others_counts_as_a_copy(known: list[tuple[int, int]]) -> None:
    """Two nodes that do not know each other then ask the only one that has everything for different pieces."""
    queue = queue_of(8)
    seeder = queue.join(queue.everything, 0, known[0][1])
    for have, given_away in known[1:]:
        queue.join(have, 0, given_away)
    run = queue.take(seeder, 0.0, 0.0)
    assert run is not None
    lanes = queue.lanes
    copies = [sum((lane.have >> i & 1) + (lane.given >> i & 1) for lane in lanes) for i in range(8)]
    assert copies[run.pieces.start] == min(copies)


def test_from_complete_sources_pieces_come_in_order() -> None:
    """Only then can the shard's own hash follow them without reading anything back late."""
    queue = queue_of(100)
    lanes = [queue.join(queue.everything), queue.join(queue.everything)]
    taken = []
    for _ in range(4):
        for lane in lanes:
            taken += pieces_taken(queue, lane, 10 * PIECE_SIZE)
    assert taken == list(range(len(taken)))


def test_in_a_swarm_nodes_begin_at_different_places() -> None:
    """What all had would be of no use to any."""
    starts = set()
    for seed in range(20):
        queue = queue_of(500, seed=seed)
        seeder = queue.join(queue.everything)
        queue.join(0)
        run = queue.take(seeder, 0.0, 0.0)
        assert run is not None
        starts.add(run.pieces.start)
    assert len(starts) > 15


def test_nothing_is_asked_for_beyond_the_window() -> None:
    queue = queue_of(2 * WINDOW_PIECES)
    beyond = queue.join(bits(WINDOW_PIECES, WINDOW_PIECES + 1))
    assert queue.take(beyond, 0.0, FAST) is None
    first = queue.join(1)
    assert queue.take(first, 0.0, FAST) is not None
    queue.arrived(first, 0, 0.0)
    run = queue.take(beyond, 0.0, FAST)
    assert run is not None
    assert run.pieces == range(WINDOW_PIECES, WINDOW_PIECES + 1)


def pieces_taken(queue: PieceQueue, lane: Lane, bytes_per_s: float) -> list[int]:
    """One run, from asking to the last piece."""
    run = queue.take(lane, 0.0, bytes_per_s)
    assert run is not None
    for index in run.pieces:
        assert queue.arrived(lane, index, 0.0)
    queue.finish(lane)
    return list(run.pieces)


def test_a_run_is_as_long_as_its_source_is_fast_and_shorter_towards_the_end() -> None:
    queue = queue_of(1000)
    slow, fast = queue.join(queue.everything), queue.join(queue.everything)
    lengths = [
        [len(pieces_taken(queue, slow, 5.9 * PIECE_SIZE)) for _ in range(5)],
        [len(pieces_taken(queue, fast, FAST)) for _ in range(8)],
    ]
    assert lengths == [[1, 2, 4, 5, 5], [1, 2, 4, 8, 16, 32, RUN_PIECES_MAX, RUN_PIECES_MAX]]
    while queue.missing:
        last = len(pieces_taken(queue, fast, FAST))
    assert last == 1


def test_a_silent_lane_is_taken_over_from_once() -> None:
    queue = queue_of(1)
    silent, second, third = (queue.join(1) for _ in range(3))
    assert queue.take(silent, 0.0, 0.0) is not None
    assert queue.take(second, SILENT_S - 0.1, 0.0) is None
    run = queue.take(second, SILENT_S, 0.0)
    assert run is not None
    assert run.silent is silent
    assert queue.take(third, 10 * SILENT_S, 0.0) is None, "two are at it"
    queue.leave(silent)
    run = queue.take(third, 10 * SILENT_S, 0.0)
    assert run is not None
    assert run.silent is second


def test_a_lane_whose_pieces_take_long_is_given_longer() -> None:
    """A narrow link is no reason to ask another, as narrow, for the same."""
    queue = queue_of(2)
    slow, other = queue.join(3), queue.join(3)
    assert queue.take(slow, 0.0, 0.0) is not None
    queue.arrived(slow, 0, 5.0)
    queue.finish(slow)
    assert queue.take(slow, 5.0, 0.0) is not None
    assert queue.take(other, 5.0 + 14.9, 0.0) is None
    run = queue.take(other, 5.0 + 15.0, 0.0)
    assert run is not None
    assert run.silent is slow


def paced(queue: PieceQueue, index: int, piece_s: float) -> Lane:
    """A lane whose source took so long for a piece, which is here now."""
    lane = queue.join(1 << index)
    assert queue.take(lane, -piece_s, 0.0) is not None
    assert queue.arrived(lane, index, 0.0)
    queue.finish(lane)
    queue.update(lane, queue.everything)
    return lane


def test_at_the_end_a_fast_source_takes_over_from_one_with_a_long_queue() -> None:
    queue = queue_of(4)
    slow, fast = paced(queue, 0, 12.0), paced(queue, 1, 0.5)
    run = queue.take(slow, 0.0, 0.0)
    assert run is not None
    other = queue.take(fast, 0.0, 0.0)
    assert other is not None
    assert other.silent is None, "there was a piece that nobody was asked for"
    queue.arrived(fast, other.pieces.start, 0.5)
    queue.finish(fast)
    again = queue.take(fast, 0.5, 0.0)
    assert again is not None
    assert (again.pieces, again.silent) == (run.pieces, slow)


def test_one_that_took_long_once_may_show_that_it_does_not_always() -> None:
    queue = queue_of(3)
    slow, fast = paced(queue, 0, 12.0), paced(queue, 1, 0.001)
    assert queue.take(slow, 0.0, 0.0) is not None
    assert queue.take(fast, SOONER_S - 0.1, 0.0) is None
    assert queue.take(fast, SOONER_S, 0.0) is not None


def test_at_the_end_nothing_is_asked_twice_where_it_hardly_comes_sooner() -> None:
    queue = queue_of(3)
    slow, fast = paced(queue, 0, 1.5), paced(queue, 1, 0.5)
    assert queue.take(slow, 0.0, 0.0) is not None
    assert queue.take(fast, 0.6, 0.0) is None


def test_what_a_lost_lane_was_asked_for_is_free_at_once() -> None:
    queue = queue_of(4)
    lost, other = queue.join(queue.everything), queue.join(queue.everything)
    run = queue.take(lost, 0.0, 0.0)
    assert run is not None
    queue.leave(lost)
    again = queue.take(other, 0.0, 0.0)
    assert again is not None
    assert (again.pieces, again.silent) == (run.pieces, None)


def test_a_lane_takes_one_run_at_a_time() -> None:
    queue = queue_of(4)
    lane = queue.join(queue.everything)
    queue.take(lane, 0.0, 0.0)
    with pytest.raises(AssertionError):
        queue.take(lane, 0.0, 0.0)
