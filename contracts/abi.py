"""Reads artifacts.json and speaks the EVM's ABI: selectors, topics, argument bytes. Knows no rule of any contract.

Values on this side are plain Python: an address or hash is `bytes`, a list is a `tuple`, a text is `str`.
The encoding itself is eth-abi's (https://docs.soliditylang.org/en/stable/abi-spec.html).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Final

import msgspec
from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError, EncodingError
from eth_hash.auto import keccak

from contracts.addresses import CONTRACT_NAMES, ContractName
from contracts.errors import BadInput

SELECTOR_BYTES: Final = 4


class _Parameter(msgspec.Struct, frozen=True):
    name: str
    type: str
    indexed: bool = False
    components: tuple["_Parameter", ...] = ()

    @property
    def canonical_type(self) -> str:
        """The type as eth-abi and selectors spell it: a struct is its fields in brackets."""
        if not self.type.startswith("tuple"):
            return self.type
        return f"({','.join(c.canonical_type for c in self.components)}){self.type.removeprefix('tuple')}"


class _Entry(msgspec.Struct, frozen=True):
    type: str
    name: str = ""
    inputs: tuple[_Parameter, ...] = ()
    outputs: tuple[_Parameter, ...] = ()


class _Artifact(msgspec.Struct, frozen=True):
    abi: tuple[_Entry, ...]
    init_code: str


class _Artifacts(msgspec.Struct, frozen=True):
    vyper: str
    contracts: dict[str, _Artifact]


@dataclass(frozen=True, slots=True)
class FunctionAbi:
    """A function: its 4 byte selector, its arguments' names and types, its results' types."""

    name: str
    selector: bytes
    arguments: tuple[str, ...]
    types: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EventAbi:
    """An event: its 32 byte topic and its fields in order, each with its type and whether it is a topic."""

    name: str
    topic: bytes
    fields: tuple[str, ...]
    types: tuple[str, ...]
    indexed: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ContractAbi:
    """What the compiler made of one contract."""

    init_code: bytes
    constructor_types: tuple[str, ...]
    functions: Mapping[str, FunctionAbi]
    events: Mapping[str, EventAbi]


def _signature(entry: _Entry) -> bytes:
    return f"{entry.name}({','.join(p.canonical_type for p in entry.inputs)})".encode()


def _contract(artifact: _Artifact) -> ContractAbi:
    functions: dict[str, FunctionAbi] = {}
    events: dict[str, EventAbi] = {}
    constructor_types: tuple[str, ...] = ()
    for entry in artifact.abi:
        names = tuple(p.name for p in entry.inputs)
        types = tuple(p.canonical_type for p in entry.inputs)
        match entry.type:
            case "function":
                results = tuple(p.canonical_type for p in entry.outputs)
                selector = keccak(_signature(entry))[:SELECTOR_BYTES]
                functions[entry.name] = FunctionAbi(entry.name, selector, names, types, results)
            case "event":
                indexed = tuple(p.indexed for p in entry.inputs)
                events[entry.name] = EventAbi(entry.name, keccak(_signature(entry)), names, types, indexed)
            case "constructor":
                constructor_types = types
            case other:
                raise AssertionError(f"the ABI has an entry of type {other}")
    init_code = bytes.fromhex(artifact.init_code.removeprefix("0x"))
    return ContractAbi(init_code, constructor_types, MappingProxyType(functions), MappingProxyType(events))


@cache
def contracts() -> Mapping[ContractName, ContractAbi]:
    """All contracts as compiled; read once from the package's artifacts.json."""
    raw = msgspec.json.decode(files("contracts").joinpath("artifacts.json").read_bytes(), type=_Artifacts)
    assert tuple(raw.contracts) == CONTRACT_NAMES, f"artifacts.json has {tuple(raw.contracts)}"
    return MappingProxyType({name: _contract(raw.contracts[name]) for name in CONTRACT_NAMES})


def encode_values(types: Sequence[str], values: Sequence[object]) -> bytes:
    """ABI bytes of values. Raises BadInput for one that its type cannot hold."""
    try:
        return encode(types, values)
    except (EncodingError, UnicodeEncodeError) as error:
        raise BadInput(f"a value does not fit its type in the contract: {error}; correct it") from error


def decode_values(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """Values of ABI bytes. Raises BadInput when they are not an encoding of these types."""
    try:
        values = decode(types, data)
    except (DecodingError, OverflowError, UnicodeDecodeError) as error:
        raise BadInput(f"{len(data)} bytes are no ABI encoding of ({','.join(types)}): {error}") from error
    return tuple(_plain(t, v) for t, v in zip(types, values, strict=True))


def _plain(abi_type: str, value: Any) -> Any:
    """eth-abi gives addresses as hexadecimal text; everything else is plain already."""
    if abi_type == "address":
        return bytes.fromhex(value.removeprefix("0x"))
    if abi_type == "address[]":
        return tuple(_plain("address", item) for item in value)
    return value


def encode_function(contract: ContractName, function: str, values: Sequence[object]) -> bytes:
    """Call data: selector and arguments. Also for the views, which have no typed call."""
    abi = contracts()[contract].functions[function]
    return abi.selector + encode_values(abi.types, values)


def decode_result(contract: ContractName, function: str, output: bytes) -> tuple[Any, ...]:
    """What a view returned. Raises BadInput when the output is not of the view's types."""
    return decode_values(contracts()[contract].functions[function].results, output)


def init_code(contract: ContractName, arguments: Sequence[object]) -> bytes:
    """What is executed to deploy a contract: its code with the constructor's arguments after it."""
    abi = contracts()[contract]
    return abi.init_code + encode_values(abi.constructor_types, arguments)
