"""What is remembered of sources: who is asked first, who not at all, and what is told of them."""

from __future__ import annotations

import random

import pytest

from contracts.errors import BadPeer, Busy
from node.network.fetching import records as module
from node.network.fetching.records import DROPPED_S, SOURCES_SHOWN_MAX, Records
from node.network.sources import MirrorSource


def mirror(number: int) -> MirrorSource:
    return MirrorSource(f"http://m{number}")


def test_those_that_failed_least_are_asked_first_the_others_in_any_order() -> None:
    records = Records(random.Random(1))
    sources = [mirror(number) for number in range(6)]
    for number, source in enumerate(sources[:3]):
        for _ in range(number + 1):
            records.failed(source, Busy("away"), 0.0)
    orders = {tuple(records.in_order(sources)) for _ in range(20)}
    assert len(orders) > 1
    assert all(order[3:] == tuple(sources[:3]) for order in orders)
    records.brought(sources[2], 10, 1.0)
    assert records.in_order(sources)[-1] == sources[1]


def test_a_liar_is_dropped_for_an_hour_a_busy_one_is_not() -> None:
    records = Records(random.Random(1))
    records.failed(mirror(1), BadPeer("wrong bytes"), 5.0)
    records.failed(mirror(2), Busy("away"), 5.0)
    assert records.dropped(mirror(1), 5.0 + DROPPED_S - 1) == "wrong bytes"
    assert records.dropped(mirror(1), 5.0 + DROPPED_S) == ""
    assert records.dropped(mirror(2), 5.0) == ""
    assert [info.state for info in records.infos(6.0)] == ["failed", "dropped"]
    assert records.failures == 2


def test_what_is_told_of_a_source() -> None:
    records = Records(random.Random(1))
    records.opened(mirror(1))
    records.brought(mirror(1), 500, 1.0)
    records.brought(mirror(1), 500, 2.0)
    (info,) = records.infos(2.0)
    assert (info.source, info.state, info.pieces, info.bytes_fetched) == ("mirror http://m1", "active", 2, 1000)
    assert info.rate == 1000
    records.closed(mirror(1))
    (info,) = records.infos(2.0)
    assert (info.state, info.rate, info.trouble) == ("idle", 0, "")


def test_memory_and_what_is_told_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES_REMEMBERED_MAX", 100)
    records = Records(random.Random(1))
    records.opened(mirror(0))
    records.failed(mirror(1), Busy("away"), 0.0)
    for number in range(2, 150):
        records.opened(mirror(number))
        records.closed(mirror(number))
    infos = records.infos(1.0)
    assert len(infos) == SOURCES_SHOWN_MAX
    assert infos[0].source == str(mirror(0)), "one that is at work is never forgotten"
    assert len(records._records) == 100
