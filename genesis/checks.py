"""What a genesis config must hold beyond its schema, as a list of named checks; each names the key it refuses.

The contracts enforce their own rules once more when the block is built. Knows no TOML and no EVM.
"""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Final

from contracts.errors import BadInput
from contracts.limits import (
    ARCHITECTURE_BYTES_MAX,
    AUTHORITIES_MAX,
    CHECK_PERIOD_S_MAX,
    METADATA_BYTES_MAX,
    RANK_MAX,
    UINT64_MAX,
)
from contracts.types import NAME_PATTERN, PIECE_SIZE, SHARDS_PER_MODEL_MAX, Address
from genesis.schema import UNTIL_NEVER, GenesisConfig, GenesisModel

CHAIN_ID_MAX: Final = 2**53 - 1
"""The largest that JavaScript clients hold exactly."""

TIMESTAMP_MAX: Final = 2**40
PERIOD_S_MAX: Final = 3600
GAS_LIMIT_MIN: Final = 30_000_000
"""A block has to hold any one call, such as the registration of a model of 1,024 shards (measured in the tests)."""

GAS_LIMIT_MAX: Final = 10_000_000_000
ADMINS_MAX: Final = 256
ACCOUNTS_MAX: Final = 10_000
MODELS_MAX: Final = 100
CATALOGUE_MAX: Final = 1_000
SHARD_SIZE_MAX: Final = 64 << 30
REDUNDANCY_MAX: Final = 64
LEASE_S_MIN: Final = 4
"""Blocks bear whole seconds, and a lease is renewed halfway."""

LEASE_S_MAX: Final = 366 * 24 * 3600
CONCURRENT_ANSWERS_MAX: Final = 10_000
TOKENS_PER_MINUTE_MAX: Final = 10**12
"""More than any node makes: a larger number is a mistake."""

TEXT_LENGTH_MAX: Final = 200
"""Characters of a title or a source."""


def check(config: GenesisConfig) -> None:
    """Raises BadInput for the first thing that no network could start with."""
    for named_check in (*_TEMPLATE_CHECKS, *_FOUNDING_CHECKS):
        named_check(config)


def check_template(config: GenesisConfig) -> None:
    """The checks of a network that has no founders yet. Raises BadInput."""
    for named_check in _TEMPLATE_CHECKS:
        named_check(config)


def _require(holds: bool, key: str, message: str) -> None:
    if not holds:
        raise BadInput(f"genesis: {key}: {message}")


def _require_range(value: int, low: int, high: int, key: str) -> None:
    _require(low <= value <= high, key, f"{value} is not between {low} and {high}")


def _require_name(text: str, key: str) -> None:
    _require(re.fullmatch(NAME_PATTERN, text) is not None, key, f"{text[:80]!r} does not match {NAME_PATTERN}")


def _require_text(text: str, key: str) -> None:
    fits = 0 < len(text) <= TEXT_LENGTH_MAX and text.isprintable()
    _require(fits, key, f"must be 1 to {TEXT_LENGTH_MAX} printable characters, has {len(text)}")


def _require_printable_ascii(text: str, size_max: int, key: str) -> None:
    fits = len(text) <= size_max and text.isascii() and text.isprintable()
    _require(fits, key, f"must be at most {size_max} printable ASCII characters, has {len(text)}")


def _require_count(items: Sequence[object], low: int, high: int, key: str) -> None:
    _require(low <= len(items) <= high, key, f"has {len(items)} entries, not {low} to {high}")


def _require_distinct(items: Sequence[Hashable], key: str, what: str) -> None:
    seen = set()
    for i, item in enumerate(items):
        _require(item not in seen, f"{key}[{i}]", f"the same {what} is there twice")
        seen.add(item)


def _require_accounts(addresses: Sequence[Address], high: int, key: str) -> None:
    _require_count(addresses, 1, high, key)
    _require_distinct(addresses, key, "address")
    for i, address in enumerate(addresses):
        _require(any(address), f"{key}[{i}]", "the address is zero")


def _require_tier(config: GenesisConfig, tier: str, key: str) -> None:
    names = [t.name for t in config.tiers]
    _require(tier in names, key, f"there is no tier {tier[:80]!r}, only {', '.join(names)}")


def _check_network(config: GenesisConfig) -> None:
    _require_name(config.network.name, "network.name")
    _require_range(config.network.chain_id, 1, CHAIN_ID_MAX, "network.chain_id")
    _require_range(config.network.period_s, 0, PERIOD_S_MAX, "network.period_s")
    _require_range(config.network.gas_limit, GAS_LIMIT_MIN, GAS_LIMIT_MAX, "network.gas_limit")


def _check_tiers(config: GenesisConfig) -> None:
    _require_count(config.tiers, 1, RANK_MAX, "tiers")
    _require_distinct([t.name for t in config.tiers], "tiers", "name")
    _require_distinct([t.rank for t in config.tiers], "tiers", "rank")
    for i, tier in enumerate(config.tiers):
        _require_name(tier.name, f"tiers[{i}].name")
        _require_range(tier.rank, 1, RANK_MAX, f"tiers[{i}].rank")
        _require_range(tier.cache_size, 1, UINT64_MAX, f"tiers[{i}].cache_size")
        _require_range(tier.concurrent_answers, 0, CONCURRENT_ANSWERS_MAX, f"tiers[{i}].concurrent_answers")
        _require_range(tier.tokens_per_minute, 0, TOKENS_PER_MINUTE_MAX, f"tiers[{i}].tokens_per_minute")


def _check_check_period(config: GenesisConfig) -> None:
    _require_range(config.check_period_s, 1, CHECK_PERIOD_S_MAX, "check_period_s")


def _check_accounts(config: GenesisConfig) -> None:
    _require_count(config.accounts, 0, ACCOUNTS_MAX, "accounts")
    _require_distinct([a.address for a in config.accounts], "accounts", "address")
    for i, account in enumerate(config.accounts):
        key = f"accounts[{i}]"
        _require(any(account.address), f"{key}.address", "the address is zero")
        if account.tier is not None:
            _require_tier(config, account.tier, f"{key}.tier")
        if account.until is not None:
            _require(account.tier is not None, f"{key}.until", "there is no tier that could end: add `tier`")
            _require_range(account.until, config.network.timestamp + 1, UNTIL_NEVER, f"{key}.until")


def _check_shards(config: GenesisConfig) -> None:
    _require_shard_size(config.shards.size, "shards.size")
    _require_range(config.shards.redundancy, 1, REDUNDANCY_MAX, "shards.redundancy")
    _require_range(config.shards.lease_s, LEASE_S_MIN, LEASE_S_MAX, "shards.lease_s")


def _require_shard_size(size: int, key: str) -> None:
    _require_range(size, PIECE_SIZE, SHARD_SIZE_MAX, key)
    _require(size % PIECE_SIZE == 0, key, f"{size} is not a multiple of a piece, {PIECE_SIZE} bytes")


def _check_models(config: GenesisConfig) -> None:
    _require_count(config.models, 0, MODELS_MAX, "models")
    _require_distinct([(m.model_id, m.version) for m in config.models], "models", "model_id and version")
    cores = [i for i, m in enumerate(config.models) if m.core]
    _require(len(cores) <= 1, f"models[{cores[-1]}].core" if cores else "models", "only one model can be the core")
    for i, model in enumerate(config.models):
        _check_model(config, model, f"models[{i}]")


def _check_model(config: GenesisConfig, model: GenesisModel, key: str) -> None:
    _require_name(model.model_id, f"{key}.model_id")
    _require_name(model.version, f"{key}.version")
    _require_range(model.total_size, 1, UINT64_MAX, f"{key}.total_size")
    _require_shard_size(model.shard_size, f"{key}.shard_size")
    count = -(-model.total_size // model.shard_size)
    same = model.shard_count == count == len(model.shard_hashes)
    told = f"{model.shard_count}, there are {len(model.shard_hashes)} shard_hashes, and ceil(total_size / shard_size)"
    _require(same, f"{key}.shard_count", f"is {told} is {count}: the three must be equal")
    _require_range(count, 1, SHARDS_PER_MODEL_MAX, f"{key}.shard_count")
    for j, shard_hash in enumerate(model.shard_hashes):
        _require(any(shard_hash), f"{key}.shard_hashes[{j}]", "the hash is zero")
    _require(any(model.manifest_hash), f"{key}.manifest_hash", "the hash is zero")
    _require_tier(config, model.minimum_tier, f"{key}.minimum_tier")
    _require_printable_ascii(model.architecture, ARCHITECTURE_BYTES_MAX, f"{key}.architecture")
    _require_printable_ascii(model.metadata, METADATA_BYTES_MAX, f"{key}.metadata")


def _check_catalogue(config: GenesisConfig) -> None:
    _require_count(config.catalogue, 0, CATALOGUE_MAX, "catalogue")
    _require_distinct([c.model_id for c in config.catalogue], "catalogue", "model_id")
    for i, entry in enumerate(config.catalogue):
        key = f"catalogue[{i}]"
        _require_name(entry.model_id, f"{key}.model_id")
        _require_text(entry.title, f"{key}.title")
        _require_tier(config, entry.minimum_tier, f"{key}.minimum_tier")
        _require_range(entry.approximate_size, 1, UINT64_MAX, f"{key}.approximate_size")
        _require_text(entry.architecture, f"{key}.architecture")
        _require_range(entry.parameters, 1, UINT64_MAX, f"{key}.parameters")
        _require_text(entry.source, f"{key}.source")


def _check_timestamp(config: GenesisConfig) -> None:
    _require_range(config.network.timestamp, 1, TIMESTAMP_MAX, "network.timestamp")


def _check_admins(config: GenesisConfig) -> None:
    _require_accounts(config.admins, ADMINS_MAX, "admins")


def _check_authorities(config: GenesisConfig) -> None:
    _require_accounts(config.authorities, AUTHORITIES_MAX, "authorities")


_Check = Callable[[GenesisConfig], None]

_TEMPLATE_CHECKS: Final[tuple[_Check, ...]] = (
    _check_network,
    _check_tiers,
    _check_check_period,
    _check_accounts,
    _check_shards,
    _check_models,
    _check_catalogue,
)

_FOUNDING_CHECKS: Final[tuple[_Check, ...]] = (_check_timestamp, _check_admins, _check_authorities)
