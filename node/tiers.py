"""The tier table: which tiers exist, who holds which until when, and the checks made. A pure fold.

Times are seconds since the epoch, block timestamps in what is folded; the caller brings the time it asks about.
"""

from __future__ import annotations

import msgspec
from immutables import Map

from contracts import events
from contracts.types import Address, ModelId, TransactionHash, Version


class Tier(msgspec.Struct, frozen=True):
    name: str
    rank: int
    cache_size: int


class Grant(msgspec.Struct, frozen=True):
    tier: str
    until: int


class TierCheck(msgspec.Struct, frozen=True):
    """A decision on the ledger: may `account` use the model, until when does that stand."""

    account: Address
    model_id: ModelId
    version: Version
    held: str
    required: str
    granted: bool
    until: int
    transaction_hash: TransactionHash


class Tiers(msgspec.Struct, frozen=True):
    tiers: Map[str, Tier] = Map()
    grants: Map[Address, Grant] = Map()
    check_period_s: int = 0
    checks: Map[Address, Map[tuple[ModelId, Version], TierCheck]] = Map()

    def held(self, account: Address, now: float) -> Grant | None:
        """The account's tier, None when it has none or it ran out."""
        grant = self.grants.get(account)
        return grant if grant is not None and grant.until > now else None

    def weight(self, name: str) -> int:
        """How much of a node a tier has beside others: 1 for the lowest, or for none, and 1 more for each above it."""
        rank = self.tiers[name].rank if name in self.tiers else 0
        return 1 + sum(tier.rank < rank for tier in self.tiers.values())

    def standing_check(self, account: Address, model_id: ModelId, version: Version, now: float) -> TierCheck | None:
        """The check that still decides, None when a new one is due. A grant or a revocation ends earlier checks."""
        check = self.checks.get(account, Map[tuple[ModelId, Version], TierCheck]()).get((model_id, version))
        return check if check is not None and check.until > now else None


def apply(state: Tiers, event: events.ContractEvent, transaction_hash: TransactionHash) -> Tiers:
    replace = msgspec.structs.replace
    match event:
        case events.TierDefined():
            tier = Tier(event.name, event.rank, event.cache_size)
            return replace(state, tiers=state.tiers.set(tier.name, tier))
        case events.CheckPeriodSet():
            return replace(state, check_period_s=event.period_s)
        case events.TierGranted():
            grants = state.grants.set(event.account, Grant(event.tier, event.until))
            return replace(_without_checks(state, event.account), grants=grants)
        case events.TierRevoked():
            return replace(_without_checks(state, event.account), grants=state.grants.delete(event.account))
        case events.TierChecked():
            check = TierCheck(
                account=event.account,
                model_id=ModelId(event.model_id),
                version=Version(event.version),
                held=event.held,
                required=event.required,
                granted=event.granted,
                until=event.until,
                transaction_hash=transaction_hash,
            )
            of_account = state.checks.get(check.account, Map[tuple[ModelId, Version], TierCheck]())
            of_account = of_account.set((check.model_id, check.version), check)
            return replace(state, checks=state.checks.set(check.account, of_account))
        case _:
            return state


def _without_checks(state: Tiers, account: Address) -> Tiers:
    if account not in state.checks:
        return state
    return msgspec.structs.replace(state, checks=state.checks.delete(account))
