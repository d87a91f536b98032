"""Who may send, administer and seal: a fold over the Accounts contract's events. Pure; no I/O, clock or randomness."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from contracts import events
from contracts.types import Address


class Accounts(msgspec.Struct, frozen=True):
    """The ledger's own view of its accounts after some block."""

    enrolled: frozenset[Address] = frozenset()
    admins: frozenset[Address] = frozenset()
    authorities: frozenset[Address] = frozenset()


class Standing(msgspec.Struct, frozen=True):
    """The accounts after some block, and the epoch that the authorities among them stand for."""

    accounts: Accounts = Accounts()
    epoch: bytes = b""
    """The hash of the block that set the authorities: genesis', until they change."""

    def after(self, block_hash: bytes, sequence: Iterable[events.ContractEvent]) -> Standing:
        """The standing after the next block and its events."""
        accounts = fold(self.accounts, sequence)
        return Standing(accounts, self.epoch if accounts.authorities == self.accounts.authorities else block_hash)


def apply(state: Accounts, event: events.ContractEvent) -> Accounts:
    """The state after one event; events of other contracts change nothing."""
    replace = msgspec.structs.replace
    match event:
        case events.Enrolled(account):
            return replace(state, enrolled=state.enrolled | {account})
        case events.Expelled(account):
            return replace(state, enrolled=state.enrolled - {account})
        case events.AdminAdded(account):
            return replace(state, admins=state.admins | {account})
        case events.AdminRemoved(account):
            return replace(state, admins=state.admins - {account})
        case events.AuthorityAdded(account):
            return replace(state, authorities=state.authorities | {account})
        case events.AuthorityRemoved(account, _):
            return replace(state, authorities=state.authorities - {account})
        case _:
            return state


def fold(state: Accounts, sequence: Iterable[events.ContractEvent]) -> Accounts:
    for event in sequence:
        state = apply(state, event)
    return state


def authorities_before(after: frozenset[Address], sequence: Iterable[events.ContractEvent]) -> frozenset[Address]:
    """The authorities before these events, from those after them: the contract tells of real changes only."""
    for event in reversed(tuple(sequence)):
        match event:
            case events.AuthorityAdded(account):
                after -= {account}
            case events.AuthorityRemoved(account, _):
                after |= {account}
            case _:
                pass
    return after
