# pragma version 0.4.3
# pragma evm-version cancun
"""
@title The tiers, who holds one until when, and the record of every tier check
@notice Owns tier definitions, grants and the check period. A grant belongs to the account whether or not it is
        enrolled: a tier is the right to ask a model, enrolment the right to send transactions.
        Asks Accounts who is an admin, Models what a model requires, Members who operates a node.
@dev Models asks this contract in turn which tiers exist. The addresses of all contracts are known before any of them
     is deployed (fixed in genesis; derived from the deployer's nonce elsewhere), so each is an immutable of the other.
"""

import text

interface Accounts:
    def is_admin(account: address) -> bool: view
    def is_enrolled(account: address) -> bool: view

interface Models:
    def required_tier(model_id: String[64], version: String[64]) -> String[64]: view

interface Members:
    def is_operator(account: address) -> bool: view

struct Grant:
    tier: String[64]
    until: uint64

CHECK_PERIOD_MAX: constant(uint64) = 366 * 24 * 3600  # seconds

event TierDefined:
    name: String[64]
    rank: uint8
    cache_size: uint64

event TierGranted:
    account: indexed(address)
    tier: String[64]
    until: uint64

event TierRevoked:
    account: indexed(address)

event CheckPeriodSet:
    period_s: uint64

event TierChecked:
    account: indexed(address)
    model_id: String[64]
    version: String[64]
    held: String[64]
    required: String[64]
    granted: bool
    until: uint64
    checker: indexed(address)

accounts: public(immutable(address))
models: public(immutable(address))
members: public(immutable(address))

rank_of: public(HashMap[String[64], uint8])
tier_at: public(HashMap[uint8, String[64]])
cache_size_of: public(HashMap[String[64], uint64])
grant_of: public(HashMap[address, Grant])
check_period_s: public(uint64)


@deploy
def __init__(accounts_: address, models_: address, members_: address):
    accounts = accounts_
    models = models_
    members = members_


@external
def define(name: String[64], rank: uint8, cache_size: uint64):
    """
    @notice Add a tier, or change the recommended cache of one. Its rank is final, since changing it would change who
            may use the models that require it; and no two tiers share one, so that tiers have one order.
    @param rank 1 to 255, higher may do more.
    @param cache_size Recommended bytes of model cache.
    """
    self._require_admin()
    assert text.is_name(name), "tier must match [a-z0-9][a-z0-9._-]{0,63}"
    assert rank > 0, "rank is zero"
    assert cache_size > 0, "cache_size is zero"
    if self.rank_of[name] == 0:
        assert len(self.tier_at[rank]) == 0, "rank belongs to another tier"
        self.rank_of[name] = rank
        self.tier_at[rank] = name
    assert self.rank_of[name] == rank, "the rank of a tier cannot change"
    self.cache_size_of[name] = cache_size
    log TierDefined(name=name, rank=rank, cache_size=cache_size)


@external
def grant(account: address, tier: String[64], until: uint64):
    """
    @notice Let an account hold a tier, replacing what it holds.
    @param until The second at which it ends (Unix time); the tier is held before it, not at it.
    """
    self._require_admin()
    assert account != empty(address), "account is zero"
    assert self.rank_of[tier] > 0, "unknown tier"
    assert convert(until, uint256) > block.timestamp, "until is not in the future"
    self.grant_of[account] = Grant(tier=tier, until=until)
    log TierGranted(account=account, tier=tier, until=until)


@external
def revoke(account: address):
    """
    @notice Take an account's tier, expired or not. Decisions already recorded hold until their own end.
    """
    self._require_admin()
    assert self.grant_of[account].until > 0, "account holds no tier"
    self.grant_of[account] = empty(Grant)
    log TierRevoked(account=account)


@external
def set_check_period(period_s: uint64):
    """
    @notice How long a decision recorded by `check` holds, 1 second to 366 days.
    """
    self._require_admin()
    assert period_s > 0, "period_s is zero"
    assert period_s <= CHECK_PERIOD_MAX, "period_s is over 366 days"
    self.check_period_s = period_s
    log CheckPeriodSet(period_s=period_s)


@external
def check(account: address, model_id: String[64], version: String[64]):
    """
    @notice Record whether an account may use a model: what it holds, what is required, the decision and until when
            the decision holds. Sent by an operator of a member node, or by the account about itself.
    """
    assert staticcall Accounts(accounts).is_enrolled(msg.sender), "sender is not enrolled"
    if msg.sender != account:
        assert staticcall Members(members).is_operator(msg.sender), "sender operates no node and is not the account"
    assert account != empty(address), "account is zero"
    assert self.check_period_s > 0, "check period is not set"
    required: String[64] = staticcall Models(models).required_tier(model_id, version)
    held: String[64] = self._held(account)
    granted: bool = self.rank_of[held] >= self.rank_of[required]
    until: uint64 = convert(block.timestamp, uint64) + self.check_period_s
    if granted:
        until = min(until, self.grant_of[account].until)
    log TierChecked(
        account=account,
        model_id=model_id,
        version=version,
        held=held,
        required=required,
        granted=granted,
        until=until,
        checker=msg.sender,
    )


@external
@view
def held(account: address) -> String[64]:
    """
    @notice The tier an account holds now, "" when it has none or its time is over.
    """
    return self._held(account)


@external
@view
def is_tier(name: String[64]) -> bool:
    """
    @notice Whether a tier of this name is defined.
    """
    return self.rank_of[name] > 0


@internal
@view
def _held(account: address) -> String[64]:
    if convert(self.grant_of[account].until, uint256) > block.timestamp:
        return self.grant_of[account].tier
    return ""


@internal
@view
def _require_admin():
    assert staticcall Accounts(accounts).is_admin(msg.sender), "sender is not an admin"
