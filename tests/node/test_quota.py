"""What an account may ask of a node, on a clock that the test moves."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadInput, Busy
from contracts.types import Address
from genesis.schema import Tier
from node.inference.spec import Message, Parameters
from node.quota import MINUTE_S, Limits, Quota, Use, estimated_tokens, limits_of

OPERATOR, ALICE, BOB, CAROL, DAVE = (Address(bytes([i]) * 20) for i in range(1, 6))
TIERS = (
    Tier("basic", 1, 8, concurrent_answers=2, tokens_per_minute=600),
    Tier("pro", 2, 8, concurrent_answers=0, tokens_per_minute=6_000),
    Tier("unlimited", 3, 8, concurrent_answers=0, tokens_per_minute=0),
)
PLACES = 16


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Door:
    """A quota, and short ways to ask it."""

    def __init__(self, places: int = PLACES) -> None:
        self.clock = Clock()
        self.quota = Quota(TIERS, OPERATOR, places, self.clock)

    def admitted(self, account: Address, tier: str, tokens: int) -> AbstractContextManager[Use]:
        """The prompt counts as one of them."""
        return self.quota.admitted(account, tier, "hi", Parameters(max_tokens=tokens - 1))

    def used(self, account: Address, tier: str, tokens: int) -> None:
        """An answer that uses all it may."""
        with self.admitted(account, tier, tokens) as use:
            use.tokens = tokens


def test_answers_at_once() -> None:
    door = Door()
    with door.admitted(ALICE, "basic", 100):
        with door.admitted(ALICE, "basic", 100):
            with pytest.raises(Busy, match=r"has 2 answers under way .* tier basic allows 2 at once") as refused:
                door.used(ALICE, "basic", 100)
            assert refused.value.retry_after_s == 1
            door.used(BOB, "basic", 100)
        door.used(ALICE, "basic", 100)
    assert door.quota.statistics().refused == {"concurrent_answers": 1, "tokens_per_minute": 0, "places": 0}


def test_tokens_a_minute_and_when_there_are_more() -> None:
    door = Door()
    door.used(ALICE, "basic", 400)
    with pytest.raises(Busy, match=r"asks for up to 301 tokens and has 200 left of the 600 a minute") as refused:
        door.used(ALICE, "basic", 301)
    assert refused.value.retry_after_s == 11  # 101 tokens at 10 a second
    door.clock.now += 10
    with pytest.raises(Busy):
        door.used(ALICE, "basic", 301)
    door.clock.now += 1
    door.used(ALICE, "basic", 301)
    door.used(BOB, "basic", 600)


@given(st.lists(st.tuples(st.integers(2, 600), st.floats(0, 30)), max_size=20))
def test_who_comes_when_told_is_let_in_and_nobody_has_more_than_the_minute(asks: list[tuple[int, float]]) -> None:
    door = Door()
    used: list[tuple[float, int]] = []
    for tokens, pause_s in asks:
        door.clock.now += pause_s
        try:
            door.used(ALICE, "basic", tokens)
        except Busy as refused:
            door.clock.now += refused.retry_after_s
            door.used(ALICE, "basic", tokens)
        used.append((door.clock.now, tokens))
    for at, (first, _) in enumerate(used):
        for to, (last, _) in enumerate(used[at:], at + 1):
            assert sum(tokens for _, tokens in used[at:to]) <= 600 + 10 * (last - first) + 1e-6


def test_many_at_once_do_not_pass_the_limit_together() -> None:
    door = Door()
    with ExitStack() as answers:
        for _ in range(6):
            answers.enter_context(door.admitted(ALICE, "pro", 1_000))
        with pytest.raises(Busy, match="0 left of the 6000"):
            door.used(ALICE, "pro", 2)


def test_what_is_not_used_is_given_back_however_it_ends() -> None:
    door = Door()
    with door.admitted(ALICE, "basic", 600) as use:
        use.tokens = 50

    def fail() -> None:
        with door.admitted(ALICE, "basic", 550) as use:
            use.tokens = 20
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(Busy, match="530 left"):
        door.used(ALICE, "basic", 531)
    door.used(ALICE, "basic", 530)


def test_a_prompt_that_was_longer_than_it_seemed_is_paid_later() -> None:
    door = Door()
    with door.admitted(ALICE, "basic", 600) as use:
        use.tokens = 700
    door.clock.now += 10
    with pytest.raises(Busy, match="0 left of the 600"):
        door.used(ALICE, "basic", 2)
    door.clock.now += 1
    door.used(ALICE, "basic", 2)


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    door = Door()
    with pytest.raises(
        BadInput, match=r"up to 602 tokens \(prompt about 1, max_tokens 601\), more than the 600 a minute"
    ):
        door.used(ALICE, "basic", 602)
    assert door.quota.statistics().accounts == 0


def test_the_operator_has_no_limits_and_a_tier_from_later_has_the_defaults() -> None:
    door = Door()
    with ExitStack() as answers:
        for _ in range(5):
            answers.enter_context(door.admitted(OPERATOR, "basic", 100_000))
        for _ in range(4):
            answers.enter_context(door.admitted(ALICE, "gold", 100))
        with pytest.raises(Busy, match="tier gold allows 4"):
            door.used(ALICE, "gold", 100)
        with pytest.raises(BadInput, match="40000 a minute that tier none allows"):
            door.used(BOB, "", 40_001)
    assert limits_of(TIERS, "gold") == Limits()


def test_nobody_takes_all_places_whatever_the_tier() -> None:
    door = Door()
    with ExitStack() as answers:
        for account, count in ((OPERATOR, 8), (ALICE, 4), (BOB, 2), (CAROL, 1), (DAVE, 1)):
            # Half of what is free, as long as there is any.
            for _ in range(count):
                answers.enter_context(door.admitted(account, "unlimited", 100))
            with pytest.raises(Busy, match="are kept for others"):
                door.used(account, "unlimited", 100)
    assert door.quota.statistics().answers == 0
    assert door.quota.statistics().refused["places"] == 5


@pytest.mark.parametrize("places", [1, 2, 3])
def test_of_few_places_there_is_one_for_the_first(places: int) -> None:
    Door(places).used(ALICE, "unlimited", 100)


def test_another_tier_is_another_limit_and_what_is_under_way_stays_counted() -> None:
    door = Door()
    with door.admitted(ALICE, "basic", 300), door.admitted(ALICE, "basic", 300):
        door.used(ALICE, "pro", 6_000)
        with pytest.raises(Busy, match="has 2 answers"):
            door.used(ALICE, "basic", 2)
    assert door.quota.statistics().answers == 0


def test_accounts_that_have_their_whole_limit_again_are_forgotten() -> None:
    door = Door()
    for i in range(100):
        door.used(Address(i.to_bytes(20)), "basic", 600)
    assert door.quota.statistics().accounts == 100
    door.clock.now += MINUTE_S - 1
    door.used(ALICE, "basic", 600)
    door.clock.now += 1
    with door.admitted(BOB, "unlimited", 100):
        assert door.quota.statistics().accounts == 2
        door.clock.now += MINUTE_S
        door.used(ALICE, "basic", 600)
        assert door.quota.statistics().accounts == 2, "who has an answer under way is not forgotten"


def test_a_prompt_is_estimated_by_its_bytes() -> None:
    assert estimated_tokens("12345") == 2
    assert estimated_tokens("") == 0
    assert estimated_tokens((Message("system", "1234"), Message("user", "äö"))) == 2
