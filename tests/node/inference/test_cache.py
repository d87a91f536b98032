"""The cache policy: beside examples, a state machine against a reference of a few lines."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contracts.errors import Busy, Conflict, NoSpace, NotFound, Refused
from node.inference.cache import ModelCache


def filled(budget: int, *models: tuple[str, int], pinned: tuple[str, ...] = ()) -> ModelCache:
    cache = ModelCache(budget)
    for key, size in models:
        cache.add(key, size, key in pinned)
    return cache


def test_the_least_recently_used_goes_first() -> None:
    cache = filled(10, ("a", 4), ("b", 3), ("c", 3))
    assert cache.hit("a")
    assert cache.plan("d", 3) == ("b",)
    assert cache.plan("d", 4) == ("b", "c")


def test_nothing_goes_when_it_fits() -> None:
    assert filled(10, ("a", 4)).plan("b", 6) == ()


def test_the_pinned_model_stays_and_the_refusal_has_the_numbers() -> None:
    cache = filled(10, ("core", 6), ("b", 2), pinned=("core",))
    with pytest.raises(NoSpace) as refused:
        cache.plan("big", 5)
    line = str(refused.value)
    for part in ("big needs 5 bytes", "cache of 10", "pinned core (6)", "could go b (2)", "at least 1 bytes"):
        assert part in line
    assert cache.plan("c", 4) == ("b",)


def test_a_model_larger_than_the_cache_is_told_what_is_missing() -> None:
    with pytest.raises(NoSpace, match="raise the cache by at least 7 bytes"):
        ModelCache(10).plan("big", 17)


def test_a_model_in_use_is_not_evicted() -> None:
    cache = filled(10, ("a", 6))
    cache.enter("a")
    with pytest.raises(Busy, match=r"in use a \(6\)"):
        cache.plan("b", 5)
    cache.leave("a")
    assert cache.plan("b", 5) == ("a",)


def test_the_number_of_models_is_limited() -> None:
    cache = ModelCache(100, models_max=2)
    cache.add("a", 1)
    cache.add("b", 1)
    assert cache.plan("c", 1) == ("a",)
    cache.hit("a", pin=True)
    cache.hit("b", pin=True)
    with pytest.raises(NoSpace, match="the limit is 2"):
        cache.plan("c", 1)


def test_what_may_be_unloaded() -> None:
    cache = filled(10, ("core", 5), ("a", 5), pinned=("core",))
    with pytest.raises(NotFound, match="loaded are: core, a"):
        cache.check_removable("b", unpin=False)
    with pytest.raises(Conflict, match="pinned core model"):
        cache.check_removable("core", unpin=False)
    cache.check_removable("core", unpin=True)
    cache.enter("a")
    with pytest.raises(Busy, match="1 requests"):
        cache.check_removable("a", unpin=False)


class CacheMachine(RuleBasedStateMachine):
    """The reference: a list of [key, size, pinned, users], least recently used first."""

    BUDGET = 100
    LIMIT = 5

    def __init__(self) -> None:
        super().__init__()
        self.cache = ModelCache(self.BUDGET, self.LIMIT)
        self.reference: list[list] = []

    def entry(self, key: str) -> list | None:
        return next((entry for entry in self.reference if entry[0] == key), None)

    @rule(key=st.sampled_from("abcdefgh"), size=st.integers(1, 120), pin=st.booleans())
    def load(self, key: str, size: int, pin: bool) -> None:
        entry = self.entry(key)
        assert self.cache.hit(key, pin) == (entry is not None)
        if entry is not None:
            entry[2] = entry[2] or pin
            self.reference.remove(entry)
            self.reference.append(entry)
            return
        kept, out = list(self.reference), []
        while sum(e[1] for e in kept) + size > self.BUDGET or len(kept) + 1 > self.LIMIT:
            victim = next((e for e in kept if not e[2] and not e[3]), None)
            if victim is None:
                with pytest.raises(Refused) as refused:
                    self.cache.plan(key, size)
                pinned = [e for e in self.reference if e[2]]
                never = sum(e[1] for e in pinned) + size > self.BUDGET or len(pinned) + 1 > self.LIMIT
                assert type(refused.value) is (NoSpace if never else Busy)
                return
            kept.remove(victim)
            out.append(victim[0])
        assert self.cache.plan(key, size) == tuple(out)
        for gone in out:
            self.cache.remove(gone, evicted=True)
        self.cache.add(key, size, pin)
        self.reference = [*kept, [key, size, pin, 0]]

    @rule(key=st.sampled_from("abcdefgh"))
    def enter(self, key: str) -> None:
        if entry := self.entry(key):
            self.cache.enter(key)
            entry[3] += 1
            self.reference.remove(entry)
            self.reference.append(entry)

    @rule(key=st.sampled_from("abcdefgh"))
    def leave(self, key: str) -> None:
        entry = self.entry(key)
        if entry and entry[3]:
            self.cache.leave(key)
            entry[3] -= 1

    @rule(key=st.sampled_from("abcdefgh"))
    def unpin(self, key: str) -> None:
        self.cache.unpin(key)
        if entry := self.entry(key):
            entry[2] = False

    @invariant()
    def same(self) -> None:
        assert [[r.key, r.size_bytes, r.pinned, r.users] for r in self.cache.residents()] == self.reference
        statistics = self.cache.statistics()
        assert statistics.used_bytes <= self.BUDGET
        assert statistics.models <= self.LIMIT


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
