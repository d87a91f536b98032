"""Accounts: who may change the three sets, what stays impossible, and in which order authorities stand."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.calls import AddAdmin, AddAuthority, EnrolAccounts, ExpelAccount, RemoveAdmin, RemoveAuthority
from contracts.events import AdminAdded, AdminRemoved, AuthorityAdded, AuthorityRemoved, Enrolled, Expelled
from contracts.limits import ACCOUNTS_PER_CALL_MAX, AUTHORITIES_MAX
from contracts.types import Address
from tests.contracts.chain import ADMIN, AUTHORITY, OPERATOR, STRANGER, USER, Chain, Reverted

ZERO = Address(bytes(20))


def address(i: int) -> Address:
    return Address(hashlib.sha256(f"account {i}".encode()).digest()[:20])


def test_enrol_and_expel(chain: Chain) -> None:
    accounts = (address(1), address(2))
    assert chain.send(ADMIN, EnrolAccounts(accounts)) == [Enrolled(a) for a in accounts]
    assert all(chain.view("Accounts", "is_enrolled", a) for a in accounts)
    assert chain.send(ADMIN, ExpelAccount(address(1))) == [Expelled(address(1))]
    assert not chain.view("Accounts", "is_enrolled", address(1))
    assert chain.view("Accounts", "is_enrolled", address(2))
    assert chain.send(ADMIN, EnrolAccounts((address(1),))) == [Enrolled(address(1))]


def test_enrol_takes_as_many_as_it_says_and_no_more(chain: Chain) -> None:
    accounts = tuple(address(i) for i in range(ACCOUNTS_PER_CALL_MAX))
    assert len(chain.send(ADMIN, EnrolAccounts(accounts))) == ACCOUNTS_PER_CALL_MAX


@pytest.mark.parametrize(
    ("accounts", "reason"),
    [
        ((), "no accounts given"),
        ((ZERO,), "account is zero"),
        ((address(1), USER.address), "account is already enrolled"),
        ((address(1), address(1)), "account is already enrolled"),
    ],
)
def test_enrol_refuses_all_or_none(chain: Chain, accounts: tuple[Address, ...], reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(ADMIN, EnrolAccounts(accounts))
    assert not chain.view("Accounts", "is_enrolled", address(1))


def test_expel_refuses_whom_others_depend_on(chain: Chain) -> None:
    with pytest.raises(Reverted, match="account is not enrolled"):
        chain.send(ADMIN, ExpelAccount(STRANGER.address))
    with pytest.raises(Reverted, match="account is an admin"):
        chain.send(ADMIN, ExpelAccount(ADMIN.address))
    with pytest.raises(Reverted, match="account is an authority"):
        chain.send(ADMIN, ExpelAccount(AUTHORITY.address))


def test_admins_come_and_go_but_one_stays(chain: Chain) -> None:
    with pytest.raises(Reverted, match="last admin cannot be removed"):
        chain.send(ADMIN, RemoveAdmin(ADMIN.address))
    with pytest.raises(Reverted, match="already an admin"):
        chain.send(ADMIN, AddAdmin(ADMIN.address))
    with pytest.raises(Reverted, match="account is zero"):
        chain.send(ADMIN, AddAdmin(ZERO))
    with pytest.raises(Reverted, match="account is not an admin"):
        chain.send(ADMIN, RemoveAdmin(USER.address))
    # One who is enrolled is not enrolled again, one who is not is.
    assert chain.send(ADMIN, AddAdmin(USER.address)) == [AdminAdded(USER.address)]
    assert chain.send(USER, AddAdmin(STRANGER.address)) == [Enrolled(STRANGER.address), AdminAdded(STRANGER.address)]
    assert chain.send(STRANGER, RemoveAdmin(ADMIN.address)) == [AdminRemoved(ADMIN.address)]
    assert chain.view("Accounts", "admin_count") == 2
    with pytest.raises(Reverted, match="sender is not an admin"):
        chain.send(ADMIN, AddAdmin(ADMIN.address))
    assert chain.view("Accounts", "is_enrolled", ADMIN.address)
    assert chain.send(USER, ExpelAccount(ADMIN.address)) == [Expelled(ADMIN.address)]


def test_authorities_come_and_go_but_one_stays(chain: Chain) -> None:
    with pytest.raises(Reverted, match="last authority cannot be removed"):
        chain.send(ADMIN, RemoveAuthority(AUTHORITY.address))
    with pytest.raises(Reverted, match="already an authority"):
        chain.send(ADMIN, AddAuthority(AUTHORITY.address))
    with pytest.raises(Reverted, match="account is zero"):
        chain.send(ADMIN, AddAuthority(ZERO))
    with pytest.raises(Reverted, match="account is not an authority"):
        chain.send(ADMIN, RemoveAuthority(USER.address))
    assert chain.send(ADMIN, AddAuthority(OPERATOR.address)) == [AuthorityAdded(OPERATOR.address)]
    added = chain.send(ADMIN, AddAuthority(STRANGER.address))
    assert added == [Enrolled(STRANGER.address), AuthorityAdded(STRANGER.address)]
    assert chain.send(ADMIN, RemoveAuthority(AUTHORITY.address)) == [AuthorityRemoved(AUTHORITY.address)]
    assert chain.view("Accounts", "authorities") == (OPERATOR.address, STRANGER.address)
    assert not chain.view("Accounts", "is_authority", AUTHORITY.address)
    assert chain.send(ADMIN, ExpelAccount(AUTHORITY.address)) == [Expelled(AUTHORITY.address)]


def test_authorities_are_bounded(chain: Chain) -> None:
    for i in range(AUTHORITIES_MAX - 1):
        chain.send(ADMIN, AddAuthority(address(i)))
    with pytest.raises(Reverted, match="already 31 authorities"):
        chain.send(ADMIN, AddAuthority(address(AUTHORITIES_MAX)))
    chain.send(ADMIN, RemoveAuthority(address(7)))
    chain.send(ADMIN, AddAuthority(address(AUTHORITIES_MAX)))
    assert len(chain.view("Accounts", "authorities")) == AUTHORITIES_MAX


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_authorities_stand_in_the_order_their_events_give(toggles: list[int]) -> None:
    chain = Chain()
    expected = [AUTHORITY.address]
    for i in toggles:
        if address(i) in expected:
            chain.send(ADMIN, RemoveAuthority(address(i)))
            expected.remove(address(i))
        else:
            chain.send(ADMIN, AddAuthority(address(i)))
            expected.append(address(i))
    assert chain.view("Accounts", "authorities") == tuple(expected)
