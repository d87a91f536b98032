"""Where the contracts stand on a network of our own. Owns the fixed addresses; knows no contract's insides.

The addresses are chosen, not derived from a deployer: genesis places the contracts. They lie above the range that
Ethereum reserves for precompiles, and `a16e` reads as "aige(n)".
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from contracts.types import Address

ContractName = Literal["Accounts", "Tiers", "Models", "Members", "Shards"]

CONTRACT_NAMES: Final[tuple[ContractName, ...]] = ("Accounts", "Tiers", "Models", "Members", "Shards")
"""All contracts, in the order of deployment."""

ADDRESSES: Final[Mapping[ContractName, Address]] = MappingProxyType(
    {name: Address((0xA16E0001 + i).to_bytes(20)) for i, name in enumerate(CONTRACT_NAMES)}
)
"""Each contract's address, 20 bytes: 0x00..00a16e0001 for Accounts and so on in order."""

CONTRACT_AT: Final[Mapping[Address, ContractName]] = MappingProxyType({a: n for n, a in ADDRESSES.items()})
"""The contract that stands at an address."""
