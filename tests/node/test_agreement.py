"""The state hash: equal for equal states, different for different ones; and the alarm when two nodes differ."""

import logging

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.events import ContractEvent
from contracts.types import Address, NodeId
from ledger.accounts import Accounts
from node import agreement
from node import state as states
from node.agreement import ALARMS_MAX, Agreement, StateHasher, StateMark
from node.state import State
from tests.node.test_projections import ACCOUNTS, after, announced, any_event, possible, possible_samples, registered

NOBODY = Accounts()
PEER, OTHER = NodeId("12D3KooWPeer"), NodeId("12D3KooWOther")


def fresh(state: State, accounts: Accounts = NOBODY) -> bytes:
    return StateHasher().hash(state, accounts)


@settings(max_examples=100, deadline=None)
@given(drawn=st.lists(any_event, max_size=30), before=st.lists(any_event, max_size=10))
def test_hash_is_of_the_state_alone(drawn: list[ContractEvent], before: list[ContractEvent]) -> None:
    """Not of the way there: neither of what the hasher saw before nor of a detour through a snapshot."""
    hasher = StateHasher()
    hasher.hash(after(*possible(before)), Accounts(enrolled=frozenset(ACCOUNTS)))
    now = State()
    for event in possible(drawn):
        now = after(event, start=now)
        found = hasher.hash(now, NOBODY)
        assert found == fresh(now) == fresh(states.decode(states.encode(now)))


@settings(max_examples=100, deadline=None)
@given(one=st.lists(any_event, max_size=8), two=st.lists(any_event, max_size=8))
def test_different_states_have_different_hashes(one: list[ContractEvent], two: list[ContractEvent]) -> None:
    first, second = after(*possible(one)), after(*possible(two))
    assert (fresh(first) == fresh(second)) == (states.encode(first) == states.encode(second))


def test_every_kind_of_event_moves_the_hash() -> None:
    now, seen = State(), set[bytes]()
    for event in possible_samples()[2:] + possible_samples()[:1]:
        if type(event).__name__ in {"NodeLeft", "TierRevoked", "MirrorRemoved"}:
            continue
        now = after(event, start=now)
        seen.add(fresh(now))
    assert len(seen) == len(possible_samples()) - 4


def test_accounts_count_and_their_order_does_not() -> None:
    some = frozenset(Address(bytes([i]) * 20) for i in range(40))
    turned = frozenset(sorted(some, reverse=True))
    assert fresh(State(), Accounts(enrolled=some)) == fresh(State(), Accounts(enrolled=turned))
    assert len({fresh(State(), Accounts(**{name: some})) for name in Accounts.__struct_fields__}) == 3
    assert fresh(State(), Accounts(enrolled=some)) != fresh(State())


def test_what_did_not_change_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    two_models = after(registered(), registered("two"), announced("a", 0), announced("b", 1, model_id="two"))
    hasher, encoded = StateHasher(), list[tuple[str, ...]]()
    hasher.hash(two_models, NOBODY)
    real = states.Part.encode

    def encode(part: states.Part) -> bytes:
        encoded.append(part.name)
        return real(part)

    monkeypatch.setattr(states.Part, "encode", encode)
    moved = after(announced("c", 1, model_id="two"), start=two_models)
    assert hasher.hash(moved, NOBODY) == fresh(moved)
    assert encoded[0] == ("announced", "two", "1")
    assert encoded[1:].count(("announced", "one", "1")) == 1, "only by the fresh one"


# Between nodes


def mark(number: int, value: int = 0) -> StateMark:
    return StateMark(number, bytes([value]) * 32)


OURS = (mark(16), mark(32), mark(45))


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ((), None),
        ((mark(48), mark(50)), None),
        ((mark(44, 9),), None),
        ((mark(32),), True),
        ((mark(16), mark(32), mark(45), mark(48, 9)), True),
        ((mark(16), mark(32, 1)), False),
        ((mark(16, 1), mark(32)), False),
    ],
)
def test_verdict(theirs: tuple[StateMark, ...], verdict: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    found = Agreement()
    assert found.compare(PEER, OURS, theirs) is verdict
    assert len(found.alarms()) == len(caplog.records) == (verdict is False)


def test_alarm_says_who_where_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    found = Agreement()
    found.compare(PEER, OURS, (mark(16), mark(32, 1)))
    (line,) = found.alarms()
    for part in (PEER, "block 32", "0x" + "01" * 32, "0x" + "00" * 32, "aigen ledger verify", "aigen ledger resync"):
        assert part in line
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.ERROR, line)]


def test_one_error_for_each_peer_and_block(caplog: pytest.LogCaptureFixture) -> None:
    found = Agreement()
    for _ in range(3):
        found.compare(PEER, OURS, (mark(32, 1),))
        found.compare(OTHER, OURS, (mark(32, 2),))
    assert len(caplog.records) == 2
    found.compare(PEER, OURS, (mark(45, 1),))
    assert len(caplog.records) == 3
    assert len(found.alarms()) == 2


def test_alarm_stands_until_the_peer_agrees_at_a_later_block() -> None:
    found = Agreement()
    found.compare(PEER, OURS, (mark(32, 1),))
    found.compare(PEER, OURS, (mark(16),))
    found.compare(PEER, OURS, (mark(90),))
    assert found.alarms()
    assert found.compare(PEER, OURS, (mark(45),))
    assert not found.alarms()


def test_alarms_are_bounded() -> None:
    found = Agreement()
    for number in range(ALARMS_MAX + 5):
        found.compare(NodeId(f"12D3KooW{number}"), OURS, (mark(16, 1),))
    assert len(found.alarms()) == ALARMS_MAX
    assert f"12D3KooW{ALARMS_MAX + 4} " in found.alarms()[-1]


def test_the_format_is_part_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fresh(State())
    monkeypatch.setattr(agreement, "STATE_HASH_FORMAT", "another")
    assert fresh(State()) != before


def test_a_mark_travels() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(mark(16)), type=StateMark) == mark(16)
