"""Receipts: how a block's transactions ended, as the receipt root in its header commits to it. Knows no storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import rlp
from eth_bloom.bloom import BloomFilter
from rlp.codec import encode_raw

from contracts.errors import BadInput
from contracts.types import Address
from ledger.transactions import DYNAMIC_FEE_TYPE, RLP_LIST, encode_number

TOPIC_SIZE = 32
BLOOM_SIZE = 256

BLOOM_BITS_MAX = 4_096
"""Addresses and topics whose bits are remembered: there are some 30, and one for each account that is a topic."""

_MALFORMED = (rlp.exceptions.RLPException, ValueError, TypeError, IndexError, RecursionError)


@dataclass(frozen=True)
class Log:
    """What a contract wrote. `index` counts over the block."""

    address: Address
    topics: tuple[bytes, ...]
    data: bytes
    index: int
    transaction_index: int


@dataclass(frozen=True)
class TransactionReceipt:
    """How a transaction ended, as its block's receipt root commits to it. `bloom` is 256 bytes."""

    type: int
    succeeded: bool
    gas_used_before: int
    """Of the block, before this transaction."""
    gas_used_after: int
    bloom: bytes
    logs: tuple[Log, ...]


RawLog = tuple[bytes, tuple[int, ...], bytes]
"""Address, topics and data, as execution gives them."""


@dataclass(frozen=True)
class EncodedReceipt:
    """A receipt as the receipt root commits to it, and its bloom filter."""

    encoded: bytes
    bloom: int

    def encode(self) -> bytes:
        return self.encoded


def encode_receipt(kind: int, succeeded: bool, gas_used_after: int, logs: Sequence[RawLog]) -> EncodedReceipt:
    """The receipt of a transaction of a type; see TransactionReceipt."""
    bloom = 0
    parts = []
    for address, numbers, data in logs:
        topics = [topic.to_bytes(TOPIC_SIZE) for topic in numbers]
        for part in (address, *topics):
            bloom |= bloom_bits(part)
        parts.append([address, topics, data])
    fields = [b"\1" if succeeded else b"", encode_number(gas_used_after), bloom.to_bytes(BLOOM_SIZE), parts]
    return EncodedReceipt((bytes([kind]) if kind else b"") + encode_raw(fields), bloom)


@lru_cache(BLOOM_BITS_MAX)
def bloom_bits(part: bytes) -> int:
    """What an address or a topic sets in a bloom filter."""
    return int(BloomFilter.from_iterable([part]))


def decode_receipts(encoded: Sequence[bytes]) -> tuple[TransactionReceipt, ...]:
    """The receipts of one block in order. Raises BadInput for one that is none."""
    found: list[TransactionReceipt] = []
    logs = gas = 0
    for index, data in enumerate(encoded):
        try:
            receipt = _decode(data, index, logs, gas)
        except _MALFORMED as error:
            raise BadInput(f"receipt {index} is none: {error}") from error
        logs += len(receipt.logs)
        gas = receipt.gas_used_after
        found.append(receipt)
    return tuple(found)


def _decode(data: bytes, index: int, logs_before: int, gas_before: int) -> TransactionReceipt:
    """A receipt of ours: status, gas of the block so far, bloom filter, logs; typed ones after a byte (EIP-2718)."""
    kind, payload = (0, data) if data[0] >= RLP_LIST else (data[0], data[1:])
    if kind not in (0, DYNAMIC_FEE_TYPE):
        raise BadInput(f"receipt {index} is of type {kind}, which no transaction here is of")
    status, gas_after, bloom, logs = rlp.decode(payload)
    return TransactionReceipt(
        type=kind,
        succeeded=status == b"\1",
        gas_used_before=gas_before,
        gas_used_after=int.from_bytes(gas_after, "big"),
        bloom=bloom,
        logs=tuple(
            Log(Address(address), tuple(topics), content, logs_before + at, index)
            for at, (address, topics, content) in enumerate(logs)
        ),
    )
