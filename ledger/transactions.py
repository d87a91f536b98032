"""Signed Ethereum transactions: made, decoded and checked one by one. Knows no chain state but what it is handed.

Two kinds are taken: legacy with a chain id (EIP-155) and dynamic fee (EIP-1559). There is no coin, so fee and value
are zero, and the only destinations are the ledger's own contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import rlp
from eth.constants import GAS_TX, GAS_TXDATAZERO
from eth.vm.forks.berlin.constants import ACCESS_LIST_ADDRESS_COST_EIP_2930, ACCESS_LIST_STORAGE_KEY_COST_EIP_2930
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth.vm.forks.istanbul.constants import GAS_TXDATANONZERO_EIP2028
from eth_account import Account
from eth_hash.auto import keccak
from rlp.codec import encode_raw

from contracts.addresses import CONTRACT_AT
from contracts.errors import BadInput, NotAllowed
from contracts.types import Address, TransactionHash
from ledger.keys import HALF_ORDER, Key, recover

TRANSACTION_BYTES_MAX = 131_072
"""What a transaction may weigh; a registration of 1,024 shard hashes takes about 35 kB."""

CALL_GAS = 8_000_000
"""Enough for the largest call, a registration of 1,024 shards; gas costs nothing here, it only bounds the work."""

DYNAMIC_FEE_TYPE = 2

RLP_STRING, RLP_LIST = 0x80, 0xC0
"""The first byte of an RLP list is at least the latter: a legacy transaction's; types are below the former."""

CHAIN_ID_OFFSET: Final = 35
"""A legacy transaction's v is this, twice the chain id and the y parity together (EIP-155)."""

WORD_MAX: Final = (1 << 256) - 1
NONCE_MAX: Final = (1 << 64) - 2


AccessList = tuple[tuple[bytes, tuple[int, ...]], ...]
"""Accounts and slots of theirs (EIP-2930)."""


@dataclass(frozen=True)
class Transaction:
    """A signed transaction that passed every check that needs no chain state."""

    raw: bytes
    type: int
    """0 for a legacy one."""
    nonce: int
    gas: int
    to: Address
    data: bytes
    access_list: AccessList
    sender: Address

    @cached_property
    def hash(self) -> TransactionHash:
        return TransactionHash(keccak(self.raw))

    @property
    def intrinsic_gas(self) -> int:
        """What it costs before it does anything (Yellow Paper, 6.2)."""
        zeros = self.data.count(0)
        cost = GAS_TX + GAS_TXDATAZERO * zeros + GAS_TXDATANONZERO_EIP2028 * (len(self.data) - zeros)
        slots = sum(len(slots) for _, slots in self.access_list)
        return (
            cost
            + ACCESS_LIST_ADDRESS_COST_EIP_2930 * len(self.access_list)
            + ACCESS_LIST_STORAGE_KEY_COST_EIP_2930 * slots
        )

    @cached_property
    def signed(self) -> Any:
        """py-evm's own object (eth.abc.SignedTransactionAPI; it is not typed strictly)."""
        signed = CancunTransactionBuilder.decode(self.raw)
        signed.sender = self.sender  # where py-evm would keep what it finds when it asks
        return signed


class _Content(NamedTuple):
    """The fields of a transaction, `fee` being the highest of its fees, and what its sender signed."""

    nonce: int
    fee: int
    gas: int
    to: bytes
    value: int
    data: bytes
    access_list: AccessList
    chain_id: int | None
    parity: int
    r: int
    s: int
    message: bytes


_MALFORMED = (rlp.exceptions.RLPException, ValueError, TypeError, RecursionError)
"""What rlp and reading its items raise for bytes that are no transaction, among them lists nested without end."""


def decode(raw: bytes, chain_id: int, gas_limit: int) -> Transaction:
    """Decode and check a raw transaction. Raises BadInput with the first check it fails."""
    if len(raw) > TRANSACTION_BYTES_MAX:
        raise BadInput(f"the transaction has {len(raw)} bytes, at most {TRANSACTION_BYTES_MAX} are taken")
    kind = _kind(raw)
    try:
        # rlp takes one encoding of a list only. A transaction that anyone can encode in a second way has a second
        # hash, under which nobody finds it.
        content = _dynamic(rlp.decode(raw[1:])) if kind else _legacy(rlp.decode(raw))
    except _MALFORMED as error:
        raise BadInput(f"not a signed Ethereum transaction: {error}") from error
    for check in (_check_canonical, _check_free, _check_destination):
        check(content)
    if content.chain_id != chain_id:
        raise BadInput(f"the transaction is signed for chain id {content.chain_id}, this ledger has {chain_id}")
    signature = content.r.to_bytes(32) + content.s.to_bytes(32) + bytes([content.parity])
    sender = recover(keccak(content.message), signature)
    to = Address(content.to)
    transaction = Transaction(raw, kind, content.nonce, content.gas, to, content.data, content.access_list, sender)
    _check_gas(transaction, gas_limit)
    return transaction


def _kind(raw: bytes) -> int:
    """The type (EIP-2718), 0 for a legacy transaction."""
    first = raw[0] if raw else RLP_STRING
    if first >= RLP_LIST:
        return 0
    if first >= RLP_STRING:
        raise BadInput("not a signed Ethereum transaction: it begins with neither a type nor a list")
    if first != DYNAMIC_FEE_TYPE:
        raise BadInput(
            f"not a signed Ethereum transaction of type 2 (EIP-1559) or a legacy one (EIP-155): it is of type {first}"
        )
    return first


def _dynamic(fields: list[Any]) -> _Content:
    """EIP-1559. Raises one of _MALFORMED."""
    chain_id, nonce, tip, fee, gas, to, value, data, listed, parity, r, s = fields
    access_list = tuple((_bytes(account, 20), tuple(map(_slot, _list(slots)))) for account, slots in _list(listed))
    message = bytes([DYNAMIC_FEE_TYPE]) + encode_raw(fields[:9])
    highest = max(_number(tip), _number(fee))
    return _Content(
        _nonce(nonce),
        highest,
        _number(gas),
        _bytes(to),
        _number(value),
        _bytes(data),
        access_list,
        _number(chain_id),
        _number(parity, 1),
        _number(r),
        _number(s),
        message,
    )


def _legacy(fields: list[Any]) -> _Content:
    """With the chain id in v (EIP-155), None where there is none. Raises one of _MALFORMED."""
    nonce, fee, gas, to, value, data, v, r, s = fields
    chain_id, parity = divmod(_number(v) - CHAIN_ID_OFFSET, 2)
    message = encode_raw([*fields[:6], encode_number(max(chain_id, 0)), b"", b""])
    return _Content(
        _nonce(nonce),
        _number(fee),
        _number(gas),
        _bytes(to),
        _number(value),
        _bytes(data),
        (),
        chain_id if chain_id >= 0 else None,
        parity,
        _number(r),
        _number(s),
        message,
    )


def _number(field: Any, value_max: int = WORD_MAX) -> int:
    value = int.from_bytes(_bytes(field))
    if value > value_max or field[:1] == b"\0":
        raise ValueError(f"a number is 0x{field.hex()}, at most {value_max} is taken and no zeros in front")
    return value


def encode_number(value: int) -> bytes:
    """As RLP has it: without leading zeros."""
    return value.to_bytes((value.bit_length() + 7) // 8)


def _nonce(field: Any) -> int:
    """EIP-2681."""
    return _number(field, NONCE_MAX)


def _bytes(field: Any, size: int | None = None) -> bytes:
    if not isinstance(field, bytes) or (size is not None and len(field) != size):
        raise TypeError(f"there are no {'' if size is None else f'{size} '}bytes where some are to be")
    return field


def _list(field: Any) -> list[Any]:
    if not isinstance(field, list):
        raise TypeError("there are bytes where a list is to be")
    return field


def _slot(field: Any) -> int:
    return int.from_bytes(_bytes(field, 32))


def _check_canonical(content: _Content) -> None:
    if content.s > HALF_ORDER:
        raise BadInput("the signature is not canonical: its s lies in the upper half of the order (EIP-2)")


def _check_free(content: _Content) -> None:
    if content.fee:
        raise BadInput(f"the fee per gas is {content.fee}: this ledger has no coin, set every fee to 0")
    if content.value:
        raise BadInput(f"the value is {content.value}: this ledger has no coin, set it to 0")


def _check_destination(content: _Content) -> None:
    if content.to not in CONTRACT_AT:
        shown = f"0x{content.to.hex()}" if content.to else "a contract creation"
        raise BadInput(f"the destination {shown} is none of this ledger's contracts")


def _check_gas(transaction: Transaction, gas_limit: int) -> None:
    if transaction.gas > gas_limit:
        raise BadInput(f"the gas of {transaction.gas} is above a block's {gas_limit}")
    if transaction.gas < transaction.intrinsic_gas:
        raise BadInput(f"the gas of {transaction.gas} is below the intrinsic {transaction.intrinsic_gas}")


def check_enrolled(transaction: Transaction, is_enrolled: Callable[[Address], bool]) -> None:
    """Raise NotAllowed unless the sender is enrolled."""
    if not is_enrolled(transaction.sender):
        sender = f"0x{transaction.sender.hex()}"
        raise NotAllowed(f"account {sender} is not enrolled: an admin runs `aigen account enrol {sender}`")


def sign(key: Key, chain_id: int, nonce: int, to: Address, data: bytes, gas: int) -> bytes:
    """A raw EIP-1559 transaction without fee or value, signed by `key`."""
    signed = Account.sign_transaction(
        {
            "type": DYNAMIC_FEE_TYPE,
            "chainId": chain_id,
            "nonce": nonce,
            "to": to,
            "value": 0,
            "gas": gas,
            "maxFeePerGas": 0,
            "maxPriorityFeePerGas": 0,
            "data": data,
        },
        key.secret,
    )
    return bytes(signed.raw_transaction)
