"""Final blocks read back whole: header, transactions, receipts and logs; and the state after each.

Everything here was written with its block and never changes, so it may be read from any thread; only `view_ahead` and
`authorities_of` look at the head. Logs come from the stored receipts, as the contracts wrote them; the bloom filter of
a header tells which blocks need no look (Ethereum's yellow paper, section 4.3.1). Genesis has no transactions and so
no logs. Knows no RPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import rlp
from eth_hash.auto import keccak

from contracts.errors import NotFound
from contracts.types import Address, TransactionHash
from ledger.accounts import authorities_before
from ledger.block import child_header
from ledger.chain import NOBODY, Chain
from ledger.receipts import Log, TransactionReceipt, bloom_bits, decode_receipts
from ledger.record import BlockRecord
from ledger.seal import decode_header, unsealed_extra_data, voters
from ledger.staging import Parcel
from ledger.transactions import RLP_LIST, Transaction, decode
from ledger.view import View

BLOOM_FIELD = 6
"""Where the bloom filter stands among a header's fields."""

RLP_SHORT = 56
"""From so many bytes on, the length of an RLP item has bytes of its own."""


@dataclass(frozen=True)
class FinalBlock:
    """A final block: `header` is py-evm's Cancun header, `record` has hashes and senders of the transactions."""

    header: Any
    size_bytes: int
    record: BlockRecord
    raw_transactions: tuple[bytes, ...]


@dataclass(frozen=True)
class FoundLog:
    """A log and where it stands."""

    log: Log
    block_number: int
    block_hash: bytes
    timestamp: int
    transaction_hash: TransactionHash


@dataclass(frozen=True)
class Criteria:
    """Which logs are meant. No addresses: any. Of each topic, in order, the values it may have; None: any, but it must
    be there."""

    addresses: frozenset[Address] = frozenset()
    topics: tuple[frozenset[bytes] | None, ...] = ()

    def match(self, log: Log) -> bool:
        if self.addresses and log.address not in self.addresses:
            return False
        if len(self.topics) > len(log.topics):
            return False
        return all(wanted is None or topic in wanted for wanted, topic in zip(self.topics, log.topics, strict=False))

    def blooms(self) -> tuple[tuple[int, ...], ...]:
        """For each condition the bits of its alternatives; see `may_hold`."""
        conditions = [self.addresses, *(wanted for wanted in self.topics if wanted is not None)]
        return tuple(tuple(bloom_bits(value) for value in values) for values in conditions if values)


def may_hold(bloom: int, conditions: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a block of this bloom filter can have a log that meets every condition. False is certain."""
    return all(any(bloom & bits == bits for bits in alternatives) for alternatives in conditions)


class _HeaderOnly(msgspec.Struct, array_like=True):
    """The first field of a sealed block; the rest is skipped, not decoded."""

    header_rlp: bytes


class History:
    """Numbers asked for here are those of final blocks: the caller has looked at the head."""

    def __init__(self, chain: Chain, next_timestamp: Callable[[], int]) -> None:
        """`next_timestamp` is the second that a block made now would bear."""
        self._chain = chain
        self._store = chain.store
        self._next_timestamp = next_timestamp

    def view(self, number: int) -> View:
        """The state after a block, looked at from within that block. Raises NotFound when a fast sync passed it by."""
        start = self._store.state_start()
        if 0 < number < start:
            raise NotFound(
                f"the state of block {number} is not here: this node joined at block {start} without executing what "
                'was before; ask a node that did, or begin anew with ledger.sync = "full"'
            )
        header = self.header(number)
        return View(self._store, self._chain.chain_id, bytes(header.state_root), header)

    def view_ahead(self) -> View:
        """The head's state, looked at from within a block made now: there a transaction sent now would run.

        On trio's thread only.
        """
        head, epoch = self._chain.tip.header, self._chain.tip.epoch
        child = child_header(head, self._next_timestamp(), NOBODY, unsealed_extra_data(epoch, 0))
        return View(self._store, self._chain.chain_id, bytes(head.state_root), child)

    def authorities_of(self, epoch: bytes) -> frozenset[Address] | None:
        """Who the authorities of an epoch were: nobody when no epoch began with the block it names, None when this
        chain has no such block. On trio's thread only.

        It goes back from the head, from one change of the authorities to the one before.
        """
        begin, tip = self._store.number_of(epoch), self._chain.tip
        if begin is None or begin > tip.number:  # a block is in the store a moment before it is the head
            return None
        authorities, at = tip.accounts.authorities, tip.epoch
        while at != epoch:
            number = self._store.number_of(at)
            assert number is not None, "an epoch is named by a block of the chain"
            if number <= begin:
                return frozenset()
            authorities = authorities_before(authorities, self._store.record(number).events())
            at = self._store.sealed(number).certificate.epoch
        return authorities

    def header(self, number: int) -> Any:
        """The Cancun header of a final block."""
        return decode_header(self._header_rlp(number))

    def block_hash(self, number: int) -> bytes:
        return bytes(keccak(self._header_rlp(number)))

    def block(self, number: int) -> FinalBlock:
        sealed = self._store.sealed(number)
        return FinalBlock(
            decode_header(sealed.header_rlp),
            _block_size(sealed.header_rlp, sealed.transactions),
            self._store.record(number),
            sealed.transactions,
        )

    def transaction(self, block: FinalBlock, index: int) -> Transaction:
        return decode(block.raw_transactions[index], self._chain.chain_id, block.header.gas_limit)

    def place_of(self, transaction_hash: TransactionHash) -> tuple[int, int] | None:
        """Block number and index of a transaction that is in a block."""
        return self._store.place_of(transaction_hash)

    def receipts(self, number: int) -> tuple[TransactionReceipt, ...]:
        """The receipts of a block in order."""
        return decode_receipts(self._store.receipts(number))

    def logs(self, criteria: Criteria, start: int, stop: int) -> Iterator[tuple[FoundLog, ...]]:
        """The logs meant of each block start <= number < stop, in order: a tuple for every block, often an empty one,
        so that whoever reads can stop between two of them."""
        conditions = criteria.blooms()
        for number in range(start, stop):
            if number == 0 or not may_hold(self._bloom(number), conditions):
                yield ()
                continue
            logs = [log for receipt in self.receipts(number) for log in receipt.logs if criteria.match(log)]
            record = self._store.record(number) if logs else None
            yield () if record is None else tuple(_found(log, record) for log in logs)

    def signers(self, number: int) -> tuple[Address, ...]:
        """The authorities whose votes make a block's certificate; none for genesis."""
        return voters(self._store.sealed(number).certificate)

    # For peers

    def sealed_blocks(self, start: int, count_max: int, bytes_max: int) -> list[bytes]:
        """Encoded blocks from `start` to the head: at most `count_max`, no more than `bytes_max` after the first."""
        return [block for block, _ in self.parcels(start, count_max, bytes_max, with_receipts=False)]

    def parcels(self, start: int, count_max: int, bytes_max: int, with_receipts: bool = True) -> list[Parcel]:
        """The same, each with its receipts, or with nothing for them."""
        found: list[Parcel] = []
        left_bytes = bytes_max
        for number in range(max(start, 1), min(start + count_max, self._chain.tip.number + 1)):
            block = self._store.sealed_bytes(number)
            receipts = self._store.receipts_rlp(number) if with_receipts else b""
            left_bytes -= len(block) + len(receipts)
            if left_bytes < 0 and found:
                break
            found.append((block, receipts))
        return found

    def state_nodes(self, keys: Sequence[bytes], bytes_max: int) -> list[bytes]:
        """State nodes by their hashes: the first ones, up to one that is not here or over `bytes_max`."""
        found: list[bytes] = []
        left_bytes = bytes_max
        for key in keys:
            node = self._store.state_node(key)
            if node is None or (left_bytes := left_bytes - len(node)) < 0:
                break
            found.append(node)
        return found

    def _header_rlp(self, number: int) -> bytes:
        return msgspec.msgpack.decode(self._store.sealed_bytes(number), type=_HeaderOnly).header_rlp

    def _bloom(self, number: int) -> int:
        return int.from_bytes(rlp.decode(self._header_rlp(number))[BLOOM_FIELD], "big")


def _found(log: Log, record: BlockRecord) -> FoundLog:
    transaction_hash = TransactionHash(record.transactions[log.transaction_index].hash)
    return FoundLog(log, record.number, record.hash, record.timestamp, transaction_hash)


def locate(receipt: TransactionReceipt, record: BlockRecord) -> tuple[FoundLog, ...]:
    """A receipt's logs with where they stand."""
    return tuple(_found(log, record) for log in receipt.logs)


def _block_size(header_rlp: bytes, transactions: tuple[bytes, ...]) -> int:
    """Bytes of the block's RLP as Ethereum has it: header, transactions, no uncles, no withdrawals."""
    inside = sum(len(raw) if raw[0] >= RLP_LIST else _with_length(len(raw)) for raw in transactions)
    return _with_length(len(header_rlp) + _with_length(inside) + 2 * _with_length(0))


def _with_length(size: int) -> int:
    """Bytes of an RLP item of more than one byte, its length before it."""
    return size + 1 + (0 if size < RLP_SHORT else (size.bit_length() + 7) // 8)
