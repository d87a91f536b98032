"""How the contracts come to be: which init code, in which order, at which addresses. Knows no chain that runs it.

Each contract has the others' addresses as immutables, so the same code runs on any EVM network. All addresses are known
before the first deployment (fixed on a network of our own; derived from the deployer's nonce elsewhere), which is why
Tiers and Models can name one another without a call that connects them afterwards. What follows construction is
ordinary calls by the first admin (contracts.calls).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from contracts.abi import init_code
from contracts.addresses import ADDRESSES, CONTRACT_NAMES, ContractName
from contracts.types import Address


@dataclass(frozen=True, slots=True)
class Deploy:
    """One contract creation."""

    contract: ContractName
    address: Address
    init_code: bytes


def deployment(first_admin: Address, addresses: Mapping[ContractName, Address] = ADDRESSES) -> tuple[Deploy, ...]:
    """All creations in order. Raises BadInput when `first_admin` is no address."""
    arguments: dict[ContractName, tuple[Address, ...]] = {
        "Accounts": (first_admin,),
        "Tiers": (addresses["Accounts"], addresses["Models"], addresses["Members"]),
        "Models": (addresses["Accounts"], addresses["Tiers"]),
        "Members": (addresses["Accounts"],),
        "Shards": (addresses["Accounts"], addresses["Models"], addresses["Members"]),
    }
    return tuple(Deploy(name, addresses[name], init_code(name, arguments[name])) for name in CONTRACT_NAMES)
