"""A genesis config as TOML text and back. Knows the schema; judges no value beyond its type, and no file.

Addresses and hashes are 0x-hexadecimal in TOML and bytes in the config.
"""

import json
import re
import tomllib
from typing import Any, Final

import msgspec
from eth_utils.address import is_checksum_address, to_checksum_address

from contracts.errors import BadInput
from genesis.schema import GenesisConfig

GENESIS_BYTES_MAX: Final = 8 << 20
"""The largest genesis file that is read."""

_HEADER: Final = """\
# An AIGEN genesis file: what all nodes of this network agree on before block 1.
# The genesis hash covers every value in it; nodes whose files differ in one never talk. Sizes are bytes, times Unix
# seconds, durations end in _s.
"""


def parse(data: bytes) -> GenesisConfig:
    """The config in TOML bytes by its schema alone, its values not yet checked. Raises BadInput naming the key."""
    if len(data) > GENESIS_BYTES_MAX:
        raise BadInput(f"the genesis file has {len(data)} bytes, at most {GENESIS_BYTES_MAX} are read")
    try:
        tree = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, or an integer of thousands of digits
        raise BadInput(f"the genesis file is not TOML: {error}; correct it there") from error
    try:
        return msgspec.convert(_with_bytes(tree, ""), GenesisConfig, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        key = path.strip("`").removeprefix("$").lstrip(".") or "the top level"
        raise BadInput(f"genesis: {key}: {what}") from error


def dump(config: GenesisConfig) -> str:
    """A checked config as TOML text: what `parse` reads back as the same config."""
    values: list[str] = []
    tables: list[str] = []
    for key in config.__struct_fields__:
        value = getattr(config, key)
        if isinstance(value, msgspec.Struct):
            tables.append(f"[{key}]\n{_fields(value)}")
        elif value and isinstance(value, tuple) and isinstance(value[0], msgspec.Struct):
            tables += [f"[[{key}]]\n{_fields(item)}" for item in value]
        else:
            values.append(f"{key} = {_value(value)}\n")
    # TOML has top-level values before the first table.
    return "\n".join([_HEADER, "".join(values), *tables])


def _fields(table: msgspec.Struct) -> str:
    pairs = ((key, getattr(table, key)) for key in table.__struct_fields__)
    return "".join(f"{key} = {_value(value)}\n" for key, value in pairs if value is not None)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str():
            # JSON's escapes are TOML's as long as all other characters stay as they are; control characters, which
            # TOML would have escaped differently, do not pass the checks.
            return json.dumps(value, ensure_ascii=False)
        case bytes():
            return f'"{to_checksum_address(value) if len(value) == 20 else "0x" + value.hex()}"'
        case tuple():
            items = [_value(item) for item in value]
            return f"[{', '.join(items)}]" if len(items) < 2 else "[\n    " + ",\n    ".join(items) + ",\n]"
        case other:
            raise AssertionError(f"a genesis config holds no {type(other).__name__}")


_HEX_BYTES: Final = {"admins": 20, "authorities": 20, "address": 20, "shard_hashes": 32, "manifest_hash": 32}
"""The keys whose texts are bytes in hexadecimal, and how many bytes."""


def _with_bytes(value: Any, key: str) -> Any:
    """The TOML tree with hexadecimal texts turned into bytes; all else as it is, for the schema to judge."""
    match value:
        case dict():
            return {k: _with_bytes(v, f"{key}.{k}" if key else k) for k, v in value.items()}
        case list():
            return [_with_bytes(item, f"{key}[{i}]") for i, item in enumerate(value)]
        case str():
            size = _HEX_BYTES.get(re.sub(r"\[\d+\]$", "", key).rpartition(".")[2])
            return value if size is None else _hex(value, key, size)
    return value


def _hex(text: str, key: str, size: int) -> bytes:
    if not re.fullmatch(f"0x[0-9a-fA-F]{{{2 * size}}}", text):
        raise BadInput(f"genesis: {key}: {text[:80]!r} is not 0x and {2 * size} hexadecimal digits")
    digits = text[2:]
    mixed = digits != digits.lower() and digits != digits.upper()
    if size == 20 and mixed and not is_checksum_address(text):
        raise BadInput(f"genesis: {key}: the checksum (EIP-55) of {text} is wrong: a digit is mistyped")
    return bytes.fromhex(digits)
