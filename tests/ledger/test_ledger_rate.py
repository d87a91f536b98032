"""The token bucket: a burst, then the rate, and never more saved up than a burst."""

from hypothesis import given
from hypothesis import strategies as st

from ledger.rate import Rate


def test_a_burst_and_then_the_rate() -> None:
    rate = Rate(per_s=2, burst=3)
    assert [rate.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert [rate.take(now) for now in (100.4, 100.5, 100.6, 101.0)] == [False, True, False, True]
    assert [rate.take(1000.0) for _ in range(4)] == [True, True, True, False]


@given(st.lists(st.floats(0, 10), max_size=200).map(sorted))
def test_over_any_time_no_more_than_the_rate_and_a_burst(moments: list[float]) -> None:
    rate = Rate(per_s=5, burst=4)
    taken = [now for now in moments if rate.take(now)]
    for at, first in enumerate(taken):
        for count, last in enumerate(taken[at:], 1):
            assert count <= 4 + 5 * (last - first) + 1e-6


def test_much_at_once_what_was_not_used_and_a_debt() -> None:
    rate = Rate(per_s=10, burst=600)
    assert rate.left(5.0) == 600
    assert rate.take(5.0, 500)
    assert not rate.take(5.0, 101)
    assert rate.wait_s(5.0, 101) == 0.1
    rate.give_back(5.0, 400)
    assert rate.left(5.0) == 500
    rate.give_back(5.0, 10_000)
    assert rate.left(5.0) == 600, "never more than a burst"
    rate.give_back(5.0, -700)
    assert rate.wait_s(5.0, 20) == 12
    assert not rate.take(16.9, 20)
    assert rate.take(17.0, 20)
