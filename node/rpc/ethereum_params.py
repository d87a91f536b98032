"""The params of Ethereum's methods, checked at the door: positions, quantities, data, block references, calls, filters.

Strict where the specification is: a quantity has no leading zeros and is never a JSON number, data is whole bytes, an
unknown member is refused. Knows no ledger.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from contracts.errors import BadInput
from contracts.types import Address, TransactionHash
from ledger.history import Criteria
from ledger.transactions import TRANSACTION_BYTES_MAX
from ledger.view import AccessList
from node.rpc.params import raw_transaction, shown

QUANTITY_PATTERN = re.compile(r"0x(0|[1-9a-fA-F][0-9a-fA-F]{0,63})")
DATA_PATTERN = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
SLOT_PATTERN = re.compile(r"0x[0-9a-fA-F]{1,64}")

Tag = Literal["latest", "safe", "finalized", "earliest", "pending"]
TAGS = get_args(Tag)

TOPICS_MAX = 4
"""Topics a log can have."""

ALTERNATIVES_MAX = 128
"""Addresses in a filter, or values of one topic."""

PROOF_SLOTS_MAX = 256
"""Storage slots proved at once."""

ACCESS_LIST_SLOTS_MAX = 1024
"""Addresses and slots of an access list together."""

PERCENTILES_MAX = 100

HASH_SIZE = 32
ADDRESS_SIZE = 20

FEES = ("gasPrice", "maxFeePerGas", "maxPriorityFeePerGas")
CALL_MEMBERS = frozenset(
    {"from", "to", "gas", "value", "data", "input", "nonce", "type", "chainId", "accessList", *FEES}
)

JSON_KINDS = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "a number",
    list: "an array",
    type(None): "null",
}
"""What a decoded value is called where it has no place."""

REQUIRED: Any = object()
"""The default of a param that has none."""


@dataclass(frozen=True)
class Param:
    """One position: what it is called in messages, how it is read, and what it is when it is left out or null."""

    name: str
    read: Callable[[str, Any], Any]
    default: Any = REQUIRED


@dataclass(frozen=True)
class CallObject:
    """What is to be tried: a transaction without its signature. `gas` is None when the caller leaves it to the node."""

    sender: Address
    to: Address | None
    data: bytes
    gas: int | None
    chain_id: int | None
    access_list: AccessList


@dataclass(frozen=True)
class LogFilter:
    """Which logs of which blocks: from and to, or one block's by its hash."""

    criteria: Criteria
    start: int | Tag
    stop: int | Tag
    block_hash: bytes | None


def decode(method: str, takes: Sequence[Param], args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The values of one call's params. Raises BadInput naming the method, the param and what it is."""
    if named:
        raise BadInput(f"{method} takes its params by position, in an array")
    if len(args) > len(takes):
        names = ", ".join(param.name for param in takes) or "none"
        raise BadInput(f"{method} takes at most {len(takes)} params ({names}), {len(args)} were given")
    values = []
    for position, param in enumerate(takes):
        given = args[position] if position < len(args) else None
        if given is not None:
            values.append(param.read(f"{method}: {param.name}", given))
        elif param.default is REQUIRED:
            raise BadInput(f"{method}: {param.name} is missing")
        else:
            values.append(param.default)
    return values


# Single values


def text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise BadInput(f"{name} is {_brief(given)}; it is a string")
    return given


def boolean(name: str, given: Any) -> bool:
    if not isinstance(given, bool):
        raise BadInput(f"{name} is {_brief(given)}; it is true or false")
    return given


def quantity(name: str, given: Any) -> int:
    if not isinstance(given, str) or QUANTITY_PATTERN.fullmatch(given) is None:
        raise BadInput(f"{name} is {_brief(given)}; it is a quantity: 0x and hex digits without leading zeros")
    return int(given, 16)


def data(name: str, given: Any) -> bytes:
    if not isinstance(given, str) or DATA_PATTERN.fullmatch(given) is None:
        raise BadInput(f"{name} is {_brief(given)}; it is data: 0x and an even number of hex digits")
    return bytes.fromhex(given[2:])


def _sized(name: str, given: Any, size: int) -> bytes:
    value = data(name, given)
    if len(value) != size:
        raise BadInput(f"{name} has {len(value)} bytes; it has {size}")
    return value


def address(name: str, given: Any) -> Address:
    return Address(_sized(name, given, ADDRESS_SIZE))


def hash32(name: str, given: Any) -> bytes:
    return _sized(name, given, HASH_SIZE)


def transaction_hash(name: str, given: Any) -> TransactionHash:
    return TransactionHash(hash32(name, given))


def signed_transaction(name: str, given: Any) -> bytes:
    return raw_transaction(name, text(name, given))


def slot(name: str, given: Any) -> int:
    """A storage slot: as a quantity or as data of up to 32 bytes; both are in use."""
    if not isinstance(given, str) or SLOT_PATTERN.fullmatch(given) is None:
        raise BadInput(f"{name} is {_brief(given)}; it is 0x and 1 to 64 hex digits")
    return int(given, 16)


def slots(name: str, given: Any) -> tuple[str, ...]:
    """Storage slots, as they were written."""
    for entry in _bounded(name, given, PROOF_SLOTS_MAX):
        slot(name, entry)
    return tuple(given)


def percentiles(name: str, given: Any) -> tuple[float, ...]:
    values = _bounded(name, given, PERCENTILES_MAX)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise BadInput(f"{name} has {_brief(value)}; a percentile is a number from 0 to 100")
    if list(values) != sorted(values):
        raise BadInput(f"{name} are not in ascending order")
    return tuple(values)


# Blocks


def block_number(name: str, given: Any) -> int | Tag:
    if isinstance(given, str) and given in TAGS:
        return cast(Tag, given)
    if not isinstance(given, str) or QUANTITY_PATTERN.fullmatch(given) is None:
        raise BadInput(f"{name} is {_brief(given)}; it is a quantity or one of {', '.join(TAGS)}")
    return int(given, 16)


def block(name: str, given: Any) -> int | Tag | bytes:
    """A number, a tag or a hash; also as the object of EIP-1898."""
    if isinstance(given, dict):
        _check_members(name, given, frozenset({"blockNumber", "blockHash", "requireCanonical"}))
        if ("blockNumber" in given) == ("blockHash" in given):
            raise BadInput(f"{name} has a blockNumber or a blockHash, one of them")
        # Every block here is final and so canonical: the answer is the same whether it is required or not.
        boolean(f"{name}.requireCanonical", given.get("requireCanonical", False))
        if "blockHash" in given:
            return hash32(f"{name}.blockHash", given["blockHash"])
        return block_number(f"{name}.blockNumber", given["blockNumber"])
    if isinstance(given, str) and len(given) == 2 + 2 * HASH_SIZE:
        return hash32(name, given)
    return block_number(name, given)


# Calls


def call(name: str, given: Any) -> CallObject:
    """A call object. Raises BadInput for what no transaction of this ledger can have: a fee, a value."""
    if not isinstance(given, dict):
        raise BadInput(f"{name} is {_brief(given)}; it is an object")
    members = {key: value for key, value in given.items() if value is not None}
    _check_members(name, members, CALL_MEMBERS)
    for fee in FEES:
        if fee in members and quantity(f"{name}.{fee}", members[fee]):
            raise BadInput(f"{name}.{fee} is {members[fee]}: this ledger has no coin, set every fee to 0x0")
    if "value" in members and quantity(f"{name}.value", members["value"]):
        raise BadInput(f"{name}.value is {members['value']}: this ledger has no coin, set it to 0x0")
    for ignored in ("nonce", "type"):
        if ignored in members:
            quantity(f"{name}.{ignored}", members[ignored])
    contents = {data(f"{name}.{key}", members[key]) for key in ("data", "input") if key in members}
    if len(contents) > 1:
        raise BadInput(f"{name} has data and input, and they differ: give one of them")
    content = contents.pop() if contents else b""
    if len(content) > TRANSACTION_BYTES_MAX:
        raise BadInput(f"{name} has {len(content)} bytes of data, at most {TRANSACTION_BYTES_MAX} are taken")
    return CallObject(
        sender=address(f"{name}.from", members["from"]) if "from" in members else Address(bytes(ADDRESS_SIZE)),
        to=address(f"{name}.to", members["to"]) if "to" in members else None,
        data=content,
        gas=quantity(f"{name}.gas", members["gas"]) if "gas" in members else None,
        chain_id=quantity(f"{name}.chainId", members["chainId"]) if "chainId" in members else None,
        access_list=_access_list(f"{name}.accessList", members.get("accessList", [])),
    )


def _access_list(name: str, given: Any) -> AccessList:
    found = []
    size = 0
    for entry in _bounded(name, given, ACCESS_LIST_SLOTS_MAX):
        if not isinstance(entry, dict) or entry.keys() != {"address", "storageKeys"}:
            raise BadInput(f"{name} has {_brief(entry)}; an entry has an address and storageKeys")
        keys = _bounded(f"{name}.storageKeys", entry["storageKeys"], ACCESS_LIST_SLOTS_MAX)
        size += 1 + len(keys)
        if size > ACCESS_LIST_SLOTS_MAX:
            raise BadInput(f"{name} has more than {ACCESS_LIST_SLOTS_MAX} addresses and slots together")
        numbers = tuple(int.from_bytes(hash32(f"{name}.storageKeys", key), "big") for key in keys)
        found.append((address(f"{name}.address", entry["address"]), numbers))
    return tuple(found)


# Logs


def log_filter(name: str, given: Any) -> LogFilter:
    """A filter with its range of blocks."""
    members = _filter_members(name, given, {"fromBlock", "toBlock", "blockHash"})
    if "blockHash" in members and ("fromBlock" in members or "toBlock" in members):
        raise BadInput(f"{name} has a blockHash and a range of blocks: give one of them")
    return LogFilter(
        criteria=_criteria(name, members),
        start=block_number(f"{name}.fromBlock", members.get("fromBlock", "latest")),
        stop=block_number(f"{name}.toBlock", members.get("toBlock", "latest")),
        block_hash=hash32(f"{name}.blockHash", members["blockHash"]) if "blockHash" in members else None,
    )


def log_criteria(name: str, given: Any) -> Criteria:
    """A filter of logs to come: it has no blocks."""
    return _criteria(name, _filter_members(name, given, set()))


def _filter_members(name: str, given: Any, blocks: set[str]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise BadInput(f"{name} is {_brief(given)}; it is an object")
    members = {key: value for key, value in given.items() if value is not None}
    _check_members(name, members, frozenset({"address", "topics", *blocks}))
    return members


def _criteria(name: str, members: Mapping[str, Any]) -> Criteria:
    addresses = members.get("address", [])
    if not isinstance(addresses, list):
        addresses = [addresses]
    topics = _bounded(f"{name}.topics", members.get("topics", []), TOPICS_MAX)
    return Criteria(
        addresses=frozenset(
            address(f"{name}.address", entry) for entry in _bounded(f"{name}.address", addresses, ALTERNATIVES_MAX)
        ),
        topics=tuple(_topic(f"{name}.topics", wanted) for wanted in topics),
    )


def _topic(name: str, wanted: Any) -> frozenset[bytes] | None:
    """The values a topic may have; null, and an empty list, stand for any."""
    if wanted is None or wanted == []:
        return None
    values = wanted if isinstance(wanted, list) else [wanted]
    return frozenset(hash32(name, value) for value in _bounded(name, values, ALTERNATIVES_MAX))


# Shared


def _check_members(name: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := given.keys() - known:
        raise BadInput(f"{name} has {shown(min(unknown))}, which is none of {', '.join(sorted(known))}")


def _bounded(name: str, given: Any, count_max: int) -> list[Any]:
    if not isinstance(given, list):
        raise BadInput(f"{name} is {_brief(given)}; it is an array")
    if len(given) > count_max:
        raise BadInput(f"{name} has {len(given)} elements, at most {count_max} are taken")
    return given


def _brief(given: Any) -> str:
    """A client's value for one line of a message."""
    return shown(given) if isinstance(given, str) else JSON_KINDS[type(given)]
