"""The genesis config of a network: read, checked, and reduced to one hash.

Owns the ready-made networks and the canonical bytes. The schema is in genesis.schema, its TOML form in genesis.toml,
the rules in genesis.checks; `genesis.block` turns a config into a block. What callers need of the first two is also
named here.
"""

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec

from contracts.errors import BadInput, NotFound
from genesis.checks import check, check_template
from genesis.schema import (
    UNTIL_NEVER,
    Account,
    CatalogueEntry,
    GenesisConfig,
    GenesisModel,
    Network,
    Shards,
    Tier,
)
from genesis.toml import GENESIS_BYTES_MAX, dump, parse

__all__ = [
    "UNTIL_NEVER",
    "Account",
    "CatalogueEntry",
    "GenesisConfig",
    "GenesisModel",
    "Network",
    "Shards",
    "Tier",
    "canonical",
    "config_hash",
    "dump",
    "load",
    "template",
]

TEMPLATES: Final = ("aigen", "dev")
"""The ready-made networks in genesis/networks/. They lack only their founders: see genesis.new."""

CANONICAL_FORMAT: Final = "aigen-genesis-1"
"""Stands before the canonical bytes, so that another format can never have the same hash."""


def load(source: Path | str | bytes) -> GenesisConfig:
    """The config of a genesis file, or of its bytes. Raises NotFound, or BadInput naming the key."""
    try:
        config = parse(source if isinstance(source, bytes) else _read(Path(source)))
        check(config)
    except BadInput as error:
        raise error if isinstance(source, bytes) else BadInput(f"{source}: {error}") from error
    return config


def template(name: str) -> GenesisConfig:
    """A ready-made network: checked, but without founders and timestamp. Raises NotFound for another name."""
    if name not in TEMPLATES:
        raise NotFound(f"there is no ready-made network {name!r}: choose one of {', '.join(TEMPLATES)}")
    config = parse(files("genesis").joinpath("networks", f"{name}.toml").read_bytes())
    check_template(config)
    return config


def canonical(config: GenesisConfig) -> bytes:
    """One byte string for each config, whatever its TOML looked like: MessagePack, fields in the schema's order."""
    return msgspec.msgpack.encode((CANONICAL_FORMAT, config))


def config_hash(config: GenesisConfig) -> bytes:
    """SHA-256 of the canonical bytes. The genesis block carries it, so that its hash covers all of the config."""
    return hashlib.sha256(canonical(config)).digest()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(GENESIS_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no genesis file {path}: name another, or make one with `aigen genesis new`"
        ) from error
    except OSError as error:
        raise BadInput(f"the genesis file {path} cannot be read: {error.strerror}") from error
