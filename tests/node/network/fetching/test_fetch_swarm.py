"""Swarms on simulated links, small enough for every run of the tests; `make bench-swarm` has thousands of nodes."""

from __future__ import annotations

import pytest
import trio

from contracts.types import NodeId
from node.network.fetching.flight import STARVED_S
from node.network.wire import DataLimits
from tests.node.network.fetching.simulated import RETRY_S, Outcome, Swarm, VirtualPace

MIB = 1 << 20
RATE = 4 * MIB


def copies(swarm: Swarm) -> list[int]:
    return [node.pieces.bits.bit_count() for node in swarm.wanting]


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_nodes_are_done_soon_after_the_least_time_there_is(seed: int) -> None:
    """The seeder's link and everybody's are the limit: it gives nothing twice before it gave everything."""
    pieces = 96
    swarm = Swarm(10, pieces, RATE, seed)
    outcome = swarm.run()
    assert copies(swarm) == [pieces] * 10
    assert outcome.done_s[-1] < 1.3 * pieces * MIB / RATE, outcome
    assert outcome.seeder_pieces < 1.3 * pieces
    assert outcome.pieces_served < 1.02 * 10 * pieces, "hardly anything was sent in vain"
    assert outcome.attempts == 10


def test_the_same_seed_is_the_same_run() -> None:
    def run(seed: int) -> Outcome:
        return Swarm(6, 16, RATE, seed).run()

    first = run(3)
    assert (run(3).done_s, run(3).messages) == (first.done_s, first.messages)
    assert run(4).done_s != first.done_s


def test_those_whom_the_seeder_has_no_place_for_find_those_it_has() -> None:
    """It serves two; the others ask around among the members, and nobody's fetch ends in between."""
    swarm = Swarm(8, 24, RATE, 1, DataLimits(connections_max=2))
    outcome = swarm.run()
    assert copies(swarm) == [24] * 8
    assert outcome.attempts == 8


def test_who_waits_in_vain_is_told_so() -> None:
    """Others fetch the same and have nothing either: that is hope, but not for ever. One of the three was through with
    asking before anybody asked it, and began anew."""
    swarm = Swarm(3, 4, RATE, 1)
    swarm.seeder.pieces.bits = 0
    attempts: list[list[int]] = []

    async def main() -> None:
        with trio.move_on_after(STARVED_S + 2 * RETRY_S):
            async with trio.open_nursery() as nursery:
                for node in swarm.wanting:
                    nursery.start_soon(node.fetch)
                await trio.sleep(STARVED_S - 0.1)
                attempts.append([node.attempts for node in swarm.wanting])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert sorted(attempts[0]) == [1, 1, 2]
    assert min(node.attempts for node in swarm.wanting) == 2


async def test_the_virtual_pace_keeps_its_limit_and_shares_it(autojump_clock: trio.testing.MockClock) -> None:
    pace = VirtualPace(RATE)
    got: dict[NodeId, int] = {}

    async def draw(name: NodeId) -> None:
        while True:
            await pace.take(name, MIB)
            got[name] = got.get(name, 0) + 1

    began = trio.current_time()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            for name in map(NodeId, "aab"):
                nursery.start_soon(draw, name)
    assert trio.current_time() - began == 10
    assert 40 <= sum(got.values()) <= 42
    assert abs(got[NodeId("a")] - got[NodeId("b")]) <= 1
