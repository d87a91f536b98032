"""The pool: nonces without gaps, shares, turns; the whole of it against a model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from contracts.errors import Busy, Conflict
from contracts.types import Address
from ledger import pool as pools
from ledger.keys import Key
from ledger.pool import POOL_SENDER_TRANSACTIONS_MAX, Pool
from ledger.transactions import Transaction, decode
from tests.ledger.world import ADMIN, CONFIG, OPERATOR, STRANGER, join, raw_call

KEYS = (ADMIN, OPERATOR, STRANGER)
_made: dict[tuple[Key, int], Transaction] = {}


def transaction(key: Key, nonce: int) -> Transaction:
    if (key, nonce) not in _made:
        raw = raw_call(key, nonce, join())
        _made[key, nonce] = decode(raw, CONFIG.network.chain_id, CONFIG.network.gas_limit)
    return _made[key, nonce]


def filled(*entries: tuple[Key, int]) -> Pool:
    pool = Pool()
    for sequence, (key, nonce) in enumerate(entries, start=1):
        pool.add(transaction(key, nonce), sequence)
    return pool


def test_nonces_have_no_gaps_and_are_used_once() -> None:
    pool = filled((ADMIN, 3), (ADMIN, 4))
    assert pool.next_nonce(ADMIN.address, 3) == 5
    assert pool.next_nonce(OPERATOR.address, 7) == 7
    pool.check(transaction(ADMIN, 5), 3)
    for nonce, why in ((6, "leaves a gap"), (4, "is used"), (0, "is used")):
        with pytest.raises(Conflict, match=f"{why}.* is 5"):
            pool.check(transaction(ADMIN, nonce), 3)


def test_share_of_one_account() -> None:
    pool = filled(*((ADMIN, nonce) for nonce in range(POOL_SENDER_TRANSACTIONS_MAX)))
    with pytest.raises(Busy, match="of this account"):
        pool.check(transaction(ADMIN, POOL_SENDER_TRANSACTIONS_MAX), 0)
    pool.check(transaction(OPERATOR, 0), 0)


@pytest.mark.parametrize(("name", "value"), [("POOL_TRANSACTIONS_MAX", 2), ("POOL_BYTES_MAX", 1000)])
def test_bounds_of_the_whole(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(pools, name, value)
    pool = filled((ADMIN, 0), (ADMIN, 1))
    with pytest.raises(Busy, match="pool is full"):
        pool.check(transaction(OPERATOR, 0), 0)
    pool.remove(pool.stale({ADMIN.address: 1}, [ADMIN.address]))
    pool.check(transaction(OPERATOR, 0), 0)


def test_accounts_take_turns_in_the_order_of_their_eldest() -> None:
    pool = filled((OPERATOR, 5), (OPERATOR, 6), (ADMIN, 0), (OPERATOR, 7), (STRANGER, 2))
    found = [(t.sender, t.nonce) for t in pool.in_turns()]
    o, a, s = OPERATOR.address, ADMIN.address, STRANGER.address
    assert found == [(o, 5), (a, 0), (s, 2), (o, 6), (o, 7)]


def test_what_lies_behind_a_gap_is_stale() -> None:
    pool = filled((ADMIN, 0), (ADMIN, 1), (ADMIN, 2), (OPERATOR, 0))
    everyone = {key.address for key in KEYS}
    assert not pool.stale({}, everyone)
    assert not pool.stale({ADMIN.address: 0}, everyone)
    assert list(pool.stale({ADMIN.address: 2}, everyone)) == [1, 2]
    assert list(pool.stale({ADMIN.address: 7}, everyone)) == [1, 2, 3]
    assert list(pool.stale({}, everyone - {OPERATOR.address})) == [4]
    pool.remove({1: transaction(ADMIN, 0)})
    assert list(pool.stale({ADMIN.address: 0}, everyone)) == [2, 3], "their nonces can no longer come up"


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a plain list of what waits, with the nonces of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()
        self.nonces: dict[Address, int] = {key.address: 0 for key in KEYS}
        self.waiting: list[tuple[int, Transaction]] = []

    def of(self, sender: Address) -> list[Transaction]:
        return [t for _, t in self.waiting if t.sender == sender]

    @rule(key=st.sampled_from(KEYS), offset=st.integers(-2, 2))
    def arrive(self, key: Key, offset: int) -> None:
        expected = self.nonces[key.address] + len(self.of(key.address))
        arriving = transaction(key, max(0, expected + offset))
        if arriving.nonce != expected:
            with pytest.raises(Conflict):
                self.pool.check(arriving, self.nonces[key.address])
            return
        self.pool.check(arriving, self.nonces[key.address])
        self.pool.add(arriving, self.pool.sequence + 1)
        self.waiting.append((self.pool.sequence, arriving))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def block(self, data: st.DataObject) -> None:
        """Some of what waits became final, in turns; and perhaps other transactions of the same accounts."""
        taken = list(self.pool.in_turns())[: data.draw(st.integers(1, len(self.waiting)))]
        nonces = {t.sender: t.nonce + 1 for t in taken}
        other = data.draw(st.sampled_from(KEYS)).address
        nonces[other] = nonces.get(other, self.nonces[other]) + data.draw(st.integers(0, 2))
        self.nonces |= nonces
        stale = self.pool.stale(nonces, self.nonces.keys())
        assert stale == {s: t for s, t in self.waiting if t.nonce < self.nonces[t.sender]}
        self.pool.remove(stale)
        self.waiting = [(s, t) for s, t in self.waiting if s not in stale]

    @rule(key=st.sampled_from(KEYS))
    def expelled(self, key: Key) -> None:
        stale = self.pool.stale({}, self.nonces.keys() - {key.address})
        assert list(stale.values()) == self.of(key.address)
        self.pool.remove(stale)
        self.waiting = [(s, t) for s, t in self.waiting if s not in stale]

    @invariant()
    def same(self) -> None:
        assert len(self.pool) == len(self.waiting)
        assert self.pool.in_order() == [t for _, t in self.waiting]
        assert sorted(self.pool.in_turns(), key=lambda t: t.hash) == sorted(self.pool.in_order(), key=lambda t: t.hash)
        assert all(t.hash in self.pool for _, t in self.waiting)
        for sender, nonce in self.nonces.items():
            assert [t.nonce for t in self.of(sender)] == list(range(nonce, nonce + len(self.of(sender))))
            assert self.pool.next_nonce(sender, nonce) == nonce + len(self.of(sender))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
