"""Which pieces should come packed, with made-up speeds instead of a link."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from hypothesis import given
from hypothesis import strategies as st

from contracts.types import PIECE_SIZE
from node.network.fetching.chooser import GAIN_MIN, GROUP_PIECES, GROUPS, PAUSE_GROUPS_MAX, Chooser

Seconds = Callable[[bool], float]
"""What a piece takes, by whether it is packed."""

TRIAL = 2 * GROUPS * GROUP_PIECES
"""Pieces until there is a first opinion."""


def fetch(chooser: Chooser, pieces: int, seconds: Seconds, run: int = 1) -> list[bool]:
    """The way each of the next pieces came, asked for in runs."""
    ways: list[bool] = []
    while len(ways) < pieces:
        asked = [chooser.next() for _ in range(run)]
        for way in asked:
            chooser.took(way, PIECE_SIZE, seconds(way))
        ways += asked
    return ways


def speeds(plain: float, packed: float) -> Seconds:
    """In bytes a second."""
    return lambda way: PIECE_SIZE / (packed if way else plain)


def test_it_begins_with_a_few_of_each_in_turns() -> None:
    ways = fetch(Chooser(), TRIAL, speeds(1e6, 1e6))
    assert ways == ([False] * GROUP_PIECES + [True] * GROUP_PIECES) * GROUPS


@given(st.floats(1e4, 1e9), st.floats(0.1, 10.0), st.integers(1, 64))
def test_it_goes_on_with_the_faster_and_tries_the_other_now_and_then(plain: float, gain: float, run: int) -> None:
    chooser = Chooser()
    fetch(chooser, 4 * 64, speeds(plain, plain * gain), run)
    ways = fetch(chooser, 4000, speeds(plain, plain * gain), run)
    packed = sum(ways) / len(ways)
    other = packed if gain <= GAIN_MIN * (1 - 1e-9) else 1 - packed
    if abs(gain - GAIN_MIN) > 1e-6:
        assert 0 < other < 0.04


def test_the_pauses_between_tries_grow_up_to_a_bound() -> None:
    chooser = Chooser()
    ways = fetch(chooser, 20_000, speeds(1e8, 5e7))
    tries = [at for at in range(TRIAL, len(ways)) if ways[at] and not ways[at - 1]]
    pauses = [(later - at) // GROUP_PIECES - 1 for at, later in itertools.pairwise(tries)]
    assert pauses[:4] == [16, 32, 64, 128]
    assert set(pauses[3:]) == {PAUSE_GROUPS_MAX}


def test_a_little_faster_is_not_worth_it() -> None:
    assert sum(fetch(Chooser(), 1000, speeds(1e8, 1.04e8))) < 100


def test_a_link_that_becomes_slow_and_fast_again_is_followed() -> None:
    chooser = Chooser()
    fast, slow = speeds(3e8, 1e8), speeds(2e7, 2.9e7)
    assert sum(fetch(chooser, 1000, fast)) < 100
    assert sum(fetch(chooser, 1000, slow)) > 950
    fetch(chooser, 2 * GROUPS * PAUSE_GROUPS_MAX * GROUP_PIECES, fast)
    assert sum(fetch(chooser, 1000, fast)) < 50


def test_a_processor_that_gets_busy_is_followed_at_once() -> None:
    chooser = Chooser()
    assert sum(fetch(chooser, 1000, speeds(2e7, 2.9e7))) > 900
    assert sum(fetch(chooser, 1000, speeds(2e7, 1.5e7))) < 50


def test_what_a_limit_lets_through_at_first_does_not_decide() -> None:
    """The first megabytes come as fast as they can, and as they are."""

    def burst() -> Iterator[float]:
        yield from [0.002] * (GROUP_PIECES + 1)
        while True:
            yield 1.0

    took = burst()
    chooser = Chooser()
    fetch(chooser, TRIAL, lambda way: min(next(took), 0.035 if way else 0.05))
    assert sum(fetch(chooser, 100, speeds(2e7, 2.9e7))) > 80


def test_noise_does_not_turn_it() -> None:
    rng = random.Random(20_261_126)
    chooser = Chooser()

    def seconds(way: bool) -> float:
        return (0.035 if way else 0.05) * rng.uniform(0.7, 1.3) + (0.3 if rng.random() < 0.02 else 0.0)

    assert sum(fetch(chooser, 4000, seconds, 16)) > 3200


def test_pieces_that_were_asked_for_and_did_not_come_are_not_missed() -> None:
    chooser = Chooser()
    for _ in range(10 * TRIAL):
        asked = [chooser.next() for _ in range(8)]
        chooser.took(asked[0], PIECE_SIZE, 0.01 if asked[0] else 0.02)
    assert sum(fetch(chooser, 100, speeds(5e7, 1e8))) > 80


def test_an_immeasurably_short_time_is_no_trouble() -> None:
    assert len(fetch(Chooser(), 100, lambda way: 0.0)) == 100
