"""The params of every method, as strict values, and the ways to write them. Knows no node.

A method takes `[]`, `{}`, `[{"name": value}]`, `{"name": value}` or plain positions in the order of the fields here.
Unknown names are refused, so that a misspelt limit is not silently ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from contracts.errors import BadInput
from contracts.types import Address, ModelId, TransactionHash, Version
from node.inference.spec import TOKENS_DEFAULT, Message, Parameters, check_prompt

SHOWN_CHARACTERS_MAX = 80
"""How much of a client's value an error message repeats."""

TRANSACTION_HEX_MAX = 1 << 20
"""Characters of a raw transaction; the ledger's own bound is tighter."""


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every set of params is."""


class NoParams(Params, frozen=True):
    pass


class ModelParams(Params, frozen=True):
    model_id: ModelId
    version: Version | None = None


class LoadParams(Params, frozen=True):
    model_id: ModelId
    version: Version | None = None
    wait: bool = False


class LocationsParams(Params, frozen=True):
    model_id: ModelId
    version: Version | None = None
    shard_index: int | None = None


class AccountParams(Params, frozen=True):
    account: str | None = None


class CheckTierParams(Params, frozen=True):
    model_id: ModelId
    version: Version | None = None
    account: str | None = None


class TransactionParams(Params, frozen=True):
    transaction: str


class ReceiptParams(Params, frozen=True):
    transaction_hash: str


class BlockParams(Params, frozen=True):
    number: int | None = None
    hash: str | None = None


class HeldParams(Params, frozen=True):
    model_id: ModelId | None = None


class FreeParams(Params, frozen=True):
    size: int


class ChatParams(Params, frozen=True):
    model_id: ModelId
    messages: tuple[Message, ...]
    version: Version | None = None
    max_tokens: int = TOKENS_DEFAULT
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: dict[str, Any] | None = None
    stream: bool = False

    def parameters(self) -> Parameters:
        """How to answer, with every range checked; the prompt's size too."""
        parameters = Parameters(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop,
            logprobs=self.logprobs,
            json_schema=None if self.json_schema is None else msgspec.json.encode(self.json_schema).decode(),
        )
        parameters.check()
        check_prompt(self.messages)
        return parameters


P = TypeVar("P", bound=Params)


def decode(method: str, kind: type[P], args: Sequence[Any], kwargs: Mapping[str, Any]) -> P:
    """The params of one call. Raises BadInput naming the method, the field and what it takes."""
    names = kind.__struct_fields__
    if len(args) == 1 and isinstance(args[0], dict) and not kwargs:
        kwargs = args[0]
    elif args:
        if len(args) > len(names):
            raise BadInput(f"{method} takes {len(names)} params ({', '.join(names) or 'none'}), {len(args)} were given")
        kwargs = dict(zip(names, args, strict=False))
    try:
        return msgspec.convert(kwargs, kind)
    except msgspec.ValidationError as error:
        takes = ", ".join(names) if names else "no params"
        raise BadInput(f"{method}: {_reason(error)}; it takes {takes}") from error


def _reason(error: msgspec.ValidationError) -> str:
    """msgspec's own line, in the words of a caller who knows fields and not Python."""
    text = str(error).replace("`$.", "`").replace("`", "'")
    return text[:1].lower() + text[1:]


def shown(text: str) -> str:
    """A client's value, quoted and cut, fit for one line of an error message."""
    return repr(text if len(text) <= SHOWN_CHARACTERS_MAX else f"{text[:SHOWN_CHARACTERS_MAX]}…")


def address(name: str, text: str) -> Address:
    """An account or contract address: 0x and 40 hex digits, in any case."""
    return Address(_hex(name, text, 20))


def transaction_hash(name: str, text: str) -> TransactionHash:
    return TransactionHash(_hex(name, text, 32))


def block_hash(name: str, text: str) -> bytes:
    return _hex(name, text, 32)


def raw_transaction(name: str, text: str) -> bytes:
    """A signed transaction of any plausible length; the ledger decides what it is."""
    if len(text) > TRANSACTION_HEX_MAX:
        raise BadInput(f"{name} has {len(text)} characters, at most {TRANSACTION_HEX_MAX} are taken")
    return _hex(name, text, None)


def _hex(name: str, text: str, size: int | None) -> bytes:
    digits = text[2:] if text[:2] in {"0x", "0X"} else None
    try:
        # bytes.fromhex skips white space, which has no place here
        value = None if digits is None or not digits.isalnum() else bytes.fromhex(digits)
    except ValueError:
        value = None
    if value is None or (size is not None and len(value) != size):
        what = "an even number of hex digits" if size is None else f"{2 * size} hex digits"
        raise BadInput(f"{name} is {shown(text)}; it is 0x and {what}")
    return value
