"""Signed Ethereum transactions: made, decoded and checked one by one. Knows no chain state but what it is handed.

Two kinds are taken: legacy with a chain id (EIP-155) and dynamic fee (EIP-1559). There is no coin, so fee and value
are zero, and the only destinations are the ledger's own contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import rlp
from eth.exceptions import PyEVMError
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth_account import Account
from eth_hash.auto import keccak
from eth_utils.exceptions import ValidationError

from contracts.addresses import CONTRACT_AT
from contracts.errors import BadInput, NotAllowed
from contracts.types import Address, TransactionHash
from ledger.keys import HALF_ORDER, Key, recover

TRANSACTION_BYTES_MAX = 131_072
"""What a transaction may weigh; a registration of 1,024 shard hashes takes about 35 kB."""

CALL_GAS = 8_000_000
"""Enough for the largest call, a registration of 1,024 shards; gas costs nothing here, it only bounds the work."""

DYNAMIC_FEE_TYPE = 2


@dataclass(frozen=True)
class Transaction:
    """A signed transaction that passed every check that needs no chain state."""

    raw: bytes
    signed: Any  # eth.abc.SignedTransactionAPI; py-evm is not typed strictly
    sender: Address

    @cached_property
    def hash(self) -> TransactionHash:
        return TransactionHash(bytes(self.signed.hash))

    @property
    def nonce(self) -> int:
        return int(self.signed.nonce)

    @property
    def gas(self) -> int:
        return int(self.signed.gas)

    @property
    def to(self) -> Address:
        return Address(bytes(self.signed.to))

    @property
    def data(self) -> bytes:
        return bytes(self.signed.data)


_MALFORMED = (
    rlp.exceptions.RLPException,
    ValidationError,
    PyEVMError,
    ValueError,
    TypeError,
    IndexError,
    RecursionError,
)
"""What rlp and py-evm raise for bytes that are no transaction, among them lists nested without end."""


def decode(raw: bytes, chain_id: int, gas_limit: int) -> Transaction:
    """Decode and check a raw transaction. Raises BadInput with the first check it fails."""
    if len(raw) > TRANSACTION_BYTES_MAX:
        raise BadInput(f"the transaction has {len(raw)} bytes, at most {TRANSACTION_BYTES_MAX} are taken")
    try:
        signed = CancunTransactionBuilder.decode(raw)
        signed.validate()
    except _MALFORMED as error:
        raise BadInput(f"not a signed Ethereum transaction: {error}") from error
    _check_encoding(signed, raw)
    for check in (_check_kind, _check_canonical, _check_free, _check_destination):
        check(signed)
    _check_chain_id(signed, chain_id)
    _check_gas(signed, gas_limit)
    sender = _sender(signed)
    signed.sender = sender  # where py-evm would keep what it finds when it asks, which it does for every execution
    return Transaction(raw, signed, sender)


def _sender(signed: Any) -> Address:
    """Who signed. `validate` and `_check_canonical` were there before: the numbers are in their ranges."""
    signature = signed.r.to_bytes(32, "big") + signed.s.to_bytes(32, "big") + bytes([signed.y_parity])
    return recover(keccak(signed.get_message_for_signing()), signature)


def _check_encoding(signed: Any, raw: bytes) -> None:
    # py-evm takes an empty list for the number 0. A transaction that anyone can encode in a second way has a second
    # hash, under which nobody finds it. With its sedes named, rlp does not take the bytes it remembers from decoding.
    typed = signed.type_id is not None
    fields = signed._inner if typed else signed
    encoded = rlp.encode(fields, sedes=type(fields))
    if (bytes([signed.type_id]) + encoded if typed else encoded) != raw:
        raise BadInput("the transaction's bytes are not the canonical encoding of what they say: encode it again")


def _check_kind(signed: Any) -> None:
    kind = signed.type_id
    if kind not in (None, DYNAMIC_FEE_TYPE):
        raise BadInput(f"transactions of type {kind} are not taken: send a legacy (EIP-155) or a type 2 (EIP-1559) one")


def _check_canonical(signed: Any) -> None:
    if signed.s > HALF_ORDER:
        raise BadInput("the signature is not canonical: its s lies in the upper half of the order (EIP-2)")


def _check_free(signed: Any) -> None:
    if signed.max_fee_per_gas or signed.max_priority_fee_per_gas:
        raise BadInput(f"the fee per gas is {signed.max_fee_per_gas}: this ledger has no coin, set every fee to 0")
    if signed.value:
        raise BadInput(f"the value is {signed.value}: this ledger has no coin, set it to 0")


def _check_destination(signed: Any) -> None:
    if bytes(signed.to) not in CONTRACT_AT:
        shown = f"0x{bytes(signed.to).hex()}" if signed.to else "a contract creation"
        raise BadInput(f"the destination {shown} is none of this ledger's contracts")


def _check_chain_id(signed: Any, chain_id: int) -> None:
    if signed.chain_id != chain_id:
        raise BadInput(f"the transaction is signed for chain id {signed.chain_id}, this ledger has {chain_id}")


def _check_gas(signed: Any, gas_limit: int) -> None:
    if signed.gas > gas_limit:
        raise BadInput(f"the gas of {signed.gas} is above a block's {gas_limit}")
    if signed.gas < signed.intrinsic_gas:
        raise BadInput(f"the gas of {signed.gas} is below the intrinsic {signed.intrinsic_gas}")


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
