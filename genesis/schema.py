"""What a genesis config consists of. Owns the schema; knows no TOML, no rule beyond types, and no EVM.

Sizes are bytes, times are Unix seconds, a duration ends in `_s`.
"""

from typing import Final

import msgspec

from contracts.types import SHARD_SIZE_DEFAULT, Address, ManifestHash, ModelId, ShardHash, Version

UNTIL_NEVER: Final = 2**53 - 1
"""The end of a grant without one: the latest second that every JSON client can hold."""

PERIOD_S_DEFAULT: Final = 1
CHECK_PERIOD_S_DEFAULT: Final = 24 * 3600
GAS_LIMIT_DEFAULT: Final = 60_000_000
REDUNDANCY_DEFAULT: Final = 3
LEASE_S_DEFAULT: Final = 2 * 3600
CONCURRENT_ANSWERS_DEFAULT: Final = 4
TOKENS_PER_MINUTE_DEFAULT: Final = 40_000


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chain itself. `period_s` is the least time between two blocks; 0: as soon as something is pending."""

    name: str
    chain_id: int
    timestamp: int
    period_s: int = PERIOD_S_DEFAULT
    gas_limit: int = GAS_LIMIT_DEFAULT


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tier: a higher rank may use more models. `cache_size` is the recommended model cache.

    An account that holds it may have `concurrent_answers` under way or waiting on a node, and use `tokens_per_minute`
    there, prompts and answers together; 0 is no limit. A tier that is defined later, on the ledger, has the defaults.
    """

    name: str
    rank: int
    cache_size: int
    concurrent_answers: int = CONCURRENT_ANSWERS_DEFAULT
    tokens_per_minute: int = TOKENS_PER_MINUTE_DEFAULT


class Account(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An account enrolled from block 0, and the tier it holds: before `until`, or for ever without one."""

    address: Address
    tier: str | None = None
    until: int | None = None


class Shards(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How models are cut and how many copies of each shard are kept. A node that has not renewed its lease for
    `lease_s` counts as gone, and its copies with it."""

    size: int = SHARD_SIZE_DEFAULT
    redundancy: int = REDUNDANCY_DEFAULT
    lease_s: int = LEASE_S_DEFAULT


class GenesisModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model registered from block 0: the arguments of a registration."""

    model_id: ModelId
    version: Version
    total_size: int
    shard_size: int
    shard_count: int
    shard_hashes: tuple[ShardHash, ...]
    manifest_hash: ManifestHash
    minimum_tier: str
    core: bool = False
    architecture: str = ""
    metadata: str = ""


class CatalogueEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model the network is meant for, registered or not yet. `parameters` counts weights."""

    model_id: ModelId
    title: str
    minimum_tier: str
    approximate_size: int
    architecture: str
    parameters: int
    source: str


class GenesisConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole genesis file."""

    network: Network
    admins: tuple[Address, ...]
    authorities: tuple[Address, ...]
    tiers: tuple[Tier, ...]
    check_period_s: int = CHECK_PERIOD_S_DEFAULT
    accounts: tuple[Account, ...] = ()
    shards: Shards = msgspec.field(default_factory=Shards)
    models: tuple[GenesisModel, ...] = ()
    catalogue: tuple[CatalogueEntry, ...] = ()
