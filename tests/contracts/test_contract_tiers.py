"""Tiers: their one order, grants that end, and what a check records."""

import pytest

from contracts.calls import (
    CheckTier,
    DefineTier,
    ExpelAccount,
    GrantTier,
    LeaveNode,
    RetireModel,
    RevokeTier,
    SetCheckPeriod,
)
from contracts.events import CheckPeriodSet, TierChecked, TierDefined, TierGranted, TierRevoked
from contracts.limits import CHECK_PERIOD_S_MAX, UINT64_MAX
from contracts.types import Address, ModelId, Version
from tests.contracts.chain import (
    ADMIN,
    AUTHORITY,
    JOIN,
    MODEL,
    NODE_ID,
    NOW,
    OPERATOR,
    STRANGER,
    USER,
    Chain,
    Reverted,
    model,
)

DAY = 24 * 3600


def check_of(account: Address, version: str = "1.0") -> CheckTier:
    return CheckTier(account, ModelId("smol"), Version(version))


def test_define(chain: Chain) -> None:
    assert chain.send(ADMIN, DefineTier("max", 255, UINT64_MAX)) == [TierDefined("max", 255, UINT64_MAX)]
    assert chain.view("Tiers", "rank_of", "max") == 255
    assert chain.view("Tiers", "tier_at", 255) == "max"
    assert chain.view("Tiers", "is_tier", "max")
    assert not chain.view("Tiers", "is_tier", "min")


def test_define_again_changes_the_cache_only(chain: Chain) -> None:
    assert chain.send(ADMIN, DefineTier("pro", 2, 5)) == [TierDefined("pro", 2, 5)]
    assert chain.view("Tiers", "cache_size_of", "pro") == 5
    with pytest.raises(Reverted, match="rank of a tier cannot change"):
        chain.send(ADMIN, DefineTier("pro", 9, 5))
    assert chain.view("Tiers", "tier_at", 9) == ""


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (DefineTier("", 9, 1), "tier must match"),
        (DefineTier("Max", 9, 1), "tier must match"),
        (DefineTier("max", 0, 1), "rank is zero"),
        (DefineTier("max", 9, 0), "cache_size is zero"),
        (DefineTier("max", 2, 1), "rank belongs to another tier"),
    ],
)
def test_define_refuses(chain: Chain, call: DefineTier, reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(ADMIN, call)


def test_grant_holds_before_its_end_and_not_at_it(chain: Chain) -> None:
    assert chain.view("Tiers", "held", USER.address) == ""
    granted = chain.send(ADMIN, GrantTier(USER.address, "basic", NOW + 10))
    assert granted == [TierGranted(USER.address, "basic", NOW + 10)]
    chain.now = NOW + 9
    assert chain.view("Tiers", "held", USER.address) == "basic"
    chain.now = NOW + 10
    assert chain.view("Tiers", "held", USER.address) == ""


def test_grant_replaces_and_revoke_takes(chain: Chain) -> None:
    chain.send(ADMIN, GrantTier(USER.address, "pro", UINT64_MAX))
    chain.send(ADMIN, GrantTier(USER.address, "basic", NOW + 10))
    assert chain.view("Tiers", "grant_of", USER.address) == ("basic", NOW + 10)
    assert chain.send(ADMIN, RevokeTier(USER.address)) == [TierRevoked(USER.address)]
    assert chain.view("Tiers", "held", USER.address) == ""
    with pytest.raises(Reverted, match="account holds no tier"):
        chain.send(ADMIN, RevokeTier(USER.address))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (GrantTier(Address(bytes(20)), "basic", NOW + 1), "account is zero"),
        (GrantTier(USER.address, "gold", NOW + 1), "unknown tier"),
        (GrantTier(USER.address, "", NOW + 1), "unknown tier"),
        (GrantTier(USER.address, "basic", NOW), "until is not in the future"),
        (GrantTier(USER.address, "basic", 0), "until is not in the future"),
    ],
)
def test_grant_refuses(chain: Chain, call: GrantTier, reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(ADMIN, call)


def test_check_period_has_bounds(chain: Chain) -> None:
    assert chain.send(ADMIN, SetCheckPeriod(1)) == [CheckPeriodSet(1)]
    assert chain.send(ADMIN, SetCheckPeriod(CHECK_PERIOD_S_MAX)) == [CheckPeriodSet(CHECK_PERIOD_S_MAX)]
    with pytest.raises(Reverted, match="period_s is zero"):
        chain.send(ADMIN, SetCheckPeriod(0))
    with pytest.raises(Reverted, match="period_s is over 366 days"):
        chain.send(ADMIN, SetCheckPeriod(CHECK_PERIOD_S_MAX + 1))


@pytest.fixture
def served(chain: Chain) -> Chain:
    """A chain with MODEL for the tier basic and another for pro, and a node of OPERATOR."""
    chain.send(ADMIN, MODEL)
    chain.send(ADMIN, model(version="2.0", minimum_tier="pro"))
    chain.send(OPERATOR, JOIN)
    return chain


def test_check_without_a_tier_is_recorded_as_refused(served: Chain) -> None:
    # Whom it is about need not be enrolled: users ask with tokens and may never send a transaction.
    [event] = served.send(OPERATOR, check_of(STRANGER.address))
    assert event == TierChecked(
        account=STRANGER.address,
        model_id=ModelId("smol"),
        version=Version("1.0"),
        held="",
        required="basic",
        granted=False,
        until=NOW + DAY,
        checker=OPERATOR.address,
    )


@pytest.mark.parametrize(
    ("tier", "version", "granted"),
    [("basic", "1.0", True), ("basic", "2.0", False), ("pro", "2.0", True), ("unlimited", "1.0", True)],
)
def test_check_compares_ranks(served: Chain, tier: str, version: str, granted: bool) -> None:
    served.send(ADMIN, GrantTier(USER.address, tier, UINT64_MAX))
    [event] = served.send(OPERATOR, check_of(USER.address, version))
    assert isinstance(event, TierChecked)
    assert (event.held, event.granted, event.until) == (tier, granted, NOW + DAY)


def test_check_holds_no_longer_than_the_grant(served: Chain) -> None:
    served.send(ADMIN, GrantTier(USER.address, "basic", NOW + 10))
    [event] = served.send(OPERATOR, check_of(USER.address))
    assert isinstance(event, TierChecked)
    assert (event.granted, event.until) == (True, NOW + 10)
    # A grant that does not suffice bounds nothing.
    [event] = served.send(OPERATOR, check_of(USER.address, "2.0"))
    assert isinstance(event, TierChecked)
    assert (event.granted, event.until) == (False, NOW + DAY)
    served.now = NOW + 10
    [event] = served.send(OPERATOR, check_of(USER.address))
    assert isinstance(event, TierChecked)
    assert (event.held, event.granted, event.until) == ("", False, NOW + 10 + DAY)


def test_check_by_the_account_itself(served: Chain) -> None:
    [event] = served.send(USER, check_of(USER.address))
    assert isinstance(event, TierChecked)
    assert event.checker == USER.address


def test_check_refuses_who_has_no_business_with_it(served: Chain) -> None:
    with pytest.raises(Reverted, match="sender is not enrolled"):
        served.send(STRANGER, check_of(STRANGER.address))
    for sender in (USER, ADMIN, AUTHORITY):
        with pytest.raises(Reverted, match="operates no node and is not the account"):
            served.send(sender, check_of(STRANGER.address))
    with pytest.raises(Reverted, match="account is zero"):
        served.send(OPERATOR, check_of(Address(bytes(20))))
    served.send(ADMIN, ExpelAccount(OPERATOR.address))
    with pytest.raises(Reverted, match="sender is not enrolled"):
        served.send(OPERATOR, check_of(USER.address))


def test_check_refuses_an_operator_whose_node_left(served: Chain) -> None:
    served.send(OPERATOR, LeaveNode(NODE_ID))
    with pytest.raises(Reverted, match="operates no node"):
        served.send(OPERATOR, check_of(USER.address))


def test_check_refuses_a_model_that_is_not_in_use(served: Chain) -> None:
    with pytest.raises(Reverted, match="unknown model"):
        served.send(OPERATOR, check_of(USER.address, "3.0"))
    served.send(ADMIN, RetireModel(ModelId("smol"), Version("1.0")))
    with pytest.raises(Reverted, match="model is retired"):
        served.send(OPERATOR, check_of(USER.address))
