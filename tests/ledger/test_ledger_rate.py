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
