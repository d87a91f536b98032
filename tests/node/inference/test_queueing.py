"""The queue among accounts: by hand, and against what it promises in a small machine with places and tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from node.inference.queueing import FairQueue


def taken(queue: FairQueue[str], tokens: dict[str, int]) -> str:
    """All of the queue, each answer's tokens worked on at once and done."""
    said = []
    while queue:
        item = queue.take()
        name = item[0]
        queue.charge(name, tokens[name])
        queue.done(name)
        said.append(item)
    return " ".join(said)


def test_accounts_take_turns_each_in_its_own_order() -> None:
    queue = FairQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], 1, item)
    assert len(queue) == 6
    assert taken(queue, {"a": 10, "b": 10, "c": 10}) == "a1 b1 c1 a2 b2 a3"


def test_what_counts_is_tokens_and_not_answers() -> None:
    queue = FairQueue[str]()
    for item in ("a1", "a2", "a3", "b1", "b2", "b3", "b4", "b5"):
        queue.put(item[0], 1, item)
    assert taken(queue, {"a": 30, "b": 10}) == "a1 b1 b2 b3 a2 b4 b5 a3"


def test_a_higher_weight_has_more_and_not_all() -> None:
    queue = FairQueue[str]()
    for number in range(9):
        queue.put("a", 1, f"a{number}")
        queue.put("b", 3, f"b{number}")
    found = taken(queue, {"a": 6, "b": 6}).split()
    assert Counter(item[0] for item in found[:12]) == {"a": 3, "b": 9}


def test_who_comes_later_begins_where_the_others_are() -> None:
    queue = FairQueue[str]()
    for number in range(8):
        queue.put("a", 1, f"a{number}")
    for _ in range(4):
        queue.take()
        queue.charge("a", 100)
    for number in range(4):
        queue.put("b", 1, f"b{number}")
    assert taken(queue, {"a": 100, "b": 100}) == "a4 b0 a5 b1 a6 b2 a7 b3", "not four of b first"


def test_what_is_next_stays_so_until_it_is_taken_or_removed() -> None:
    queue = FairQueue[str]()
    queue.put("a", 1, "a1")
    queue.put("a", 1, "a2")
    queue.take()
    queue.put("b", 1, "b1")
    assert queue.first() == "a2"
    queue.charge("a", 100)
    queue.put("c", 1, "c1")
    assert queue.first() == "a2", "it may need much room, and others come all the time"
    assert queue.remove(lambda item: item == "c1") == ["c1"]
    assert queue.first() == "a2"
    assert queue.remove(lambda item: item == "a2") == ["a2"]
    assert queue.first() == "b1"
    assert queue.take() == "b1"
    assert queue.first() is None
    assert not queue


def test_only_who_has_something_here_or_is_ahead_of_somebody_is_known() -> None:
    queue = FairQueue[str]()
    for number in range(100):
        queue.put(str(number), 1, str(number))
    for _ in range(99):
        name = queue.take()
        queue.charge(name, 5)
        queue.done(name)
    assert len(queue._accounts) == 100, "they are all ahead of the last"
    name = queue.take()
    assert list(queue._accounts) == [name]
    queue.done(name)
    assert not queue._accounts


@dataclass
class Machine:
    """Places, and answers that take a token a step once their prompt counts."""

    places: int
    weights: list[int]
    queue: FairQueue[tuple[int, int]] = field(default_factory=FairQueue)
    jobs: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    running: dict[tuple[int, int], int] = field(default_factory=dict)
    served: Counter[int] = field(default_factory=Counter)
    begun: list[tuple[int, int]] = field(default_factory=list)

    def put(self, account: int, prompt: int, answer: int) -> None:
        item = (account, len(self.jobs))
        self.jobs[item] = prompt, answer
        self.queue.put(str(account), self.weights[account], item)

    def step(self) -> None:
        while len(self.running) < self.places and self.queue.first() is not None:
            item = self.queue.take()
            prompt, self.running[item] = self.jobs[item]
            self.begun.append(item)
            self._work(item[0], prompt)
        for item in list(self.running):
            self._work(item[0], 1)
            self.running[item] -= 1
            if not self.running[item]:
                del self.running[item]
                self.queue.done(str(item[0]))

    def _work(self, account: int, tokens: int) -> None:
        self.queue.charge(str(account), tokens)
        self.served[account] += tokens

    def waiting(self) -> set[int]:
        return {account for account, _ in self.jobs.keys() - set(self.begun)}


LONGEST = 20

job = st.tuples(st.integers(0, LONGEST // 2), st.integers(1, LONGEST // 2))
arrivals = st.lists(st.tuples(st.integers(0, 2), job, st.integers(1, 30), st.integers(0, 60)), min_size=1, max_size=15)
"""An account, its answers that are alike, how many, and the steps until the next come."""


@given(st.integers(1, 2), st.lists(st.integers(1, 5), min_size=3, max_size=3), arrivals)
def test_who_always_waits_is_served_by_weight_and_everybody_in_order(
    places: int, weights: list[int], came: list[tuple[int, tuple[int, int], int, int]]
) -> None:
    """However answers come: since when two accounts both have something waiting, what each was given, over its weight,
    is the same but for the answers that can be under way when one begins to wait, and when one looks."""
    machine = Machine(places, weights)
    since: dict[tuple[int, int], dict[int, int]] = {}

    def step() -> None:
        machine.step()
        waiting = machine.waiting()
        assert not waiting or len(machine.running) <= places
        for one in range(3):
            for other in range(one):
                if not {one, other} <= waiting:
                    since.pop((one, other), None)
                    continue
                before = since.setdefault((one, other), dict(machine.served))
                shares = [(machine.served[who] - before.get(who, 0)) / weights[who] for who in (one, other)]
                bound = 2 * places * LONGEST / min(weights[one], weights[other])
                assert abs(shares[0] - shares[1]) <= bound + 1e-6

    for account, (prompt, answer), count, steps in came:
        for _ in range(count):
            machine.put(account, prompt, answer)
        for _ in range(steps):
            step()
    while machine.queue or machine.running:
        step()
    assert set(machine.begun) == set(machine.jobs), "nobody waits for ever"
    for account in range(3):
        numbers = [number for who, number in machine.begun if who == account]
        assert numbers == sorted(numbers)
    assert not machine.queue._accounts


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.lists(job, min_size=2, max_size=2))
def test_over_a_long_time_the_shares_are_as_the_weights(
    places: int, one: int, other: int, jobs: list[tuple[int, int]]
) -> None:
    machine = Machine(places, [one, other])
    for account, (prompt, answer) in enumerate(jobs):
        for _ in range(60):
            machine.put(account, prompt, answer)
    while machine.waiting() == {0, 1}:
        machine.step()
        lead = machine.served[0] / one - machine.served[1] / other
        assert abs(lead) <= places * LONGEST / min(one, other) + 1e-6
