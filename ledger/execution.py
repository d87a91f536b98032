"""Transactions run by py-evm over a parent's state; what changed is collected, nothing is written.

Cancun rules with a base fee of zero, and nothing between py-evm and them: what is proposed, voted on and audited is
executed here. Knows no storage but a function that reads one state node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from eth.consensus.context import ConsensusContext
from eth.db.atomic import AtomicDB
from eth.db.backends.base import BaseDB
from eth.db.chain import ChainDB
from eth.exceptions import VMError
from eth.vm.chain_context import ChainContext
from eth.vm.forks.cancun import CancunVM
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth_utils.exceptions import ValidationError

from contracts.calls import revert_reason
from contracts.errors import BadInput
from contracts.events import ContractEvent, decode_log
from contracts.types import Address
from ledger.receipts import RawLog
from ledger.record import TransactionRecord
from ledger.seal import EXTRA_DATA_SIZE
from ledger.transactions import Transaction
from ledger.trie import ReadNode, list_root


def _no_node(key: bytes) -> None:
    return None


class Overlay(BaseDB):
    """Writes kept in memory over a read-only store of state nodes."""

    def __init__(self, read: ReadNode) -> None:
        self._read = read
        self.written: dict[bytes, bytes] = {}

    def close(self) -> None:
        self._read = _no_node
        self.written = {}

    def __getitem__(self, key: bytes) -> bytes:
        value = self.written.get(key)
        if value is None:
            value = self._read(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.written[key] = value

    def __delitem__(self, key: bytes) -> None:
        raise AssertionError("state nodes are content-addressed and never deleted")

    def _exists(self, key: bytes) -> bool:
        return key in self.written or self._read(key) is not None


class LedgerVM(CancunVM):
    """Cancun with room for the seal in extra_data and ancestors read from our own store."""

    extra_data_max_bytes = EXTRA_DATA_SIZE
    ancestors: Iterable[bytes] = ()

    @property
    def previous_hashes(self) -> Iterable[bytes]:
        return self.ancestors


@dataclass(frozen=True)
class Executed:
    """An executed block: its header (complete but for the seal), receipts, records and the state nodes it adds."""

    header: CancunBlockHeader
    transactions: tuple[Transaction, ...]
    receipts: tuple[Any, ...]
    records: tuple[TransactionRecord, ...]
    state_nodes: dict[bytes, bytes]

    def events(self) -> Iterator[ContractEvent]:
        """The block's events in order."""
        return (event for record in self.records for event in record.events)


class Execution:
    """One block being executed: `apply` its transactions in order, then `finish`."""

    def __init__(self, header: CancunBlockHeader, chain_id: int, read: ReadNode, ancestors: Iterable[bytes]) -> None:
        """`header` is the child_header of the parent whose state is the start."""
        self._overlay = Overlay(read)
        database = AtomicDB(self._overlay)
        self._vm = LedgerVM(header, ChainDB(database), ChainContext(chain_id), ConsensusContext(database))
        self._vm.ancestors = ancestors
        self._header = header
        self._transactions: list[Transaction] = []
        self._receipts: list[Any] = []
        self._records: list[TransactionRecord] = []

    def nonce(self, account: Address) -> int:
        """The nonce the account's next transaction must bear."""
        return int(self._vm.state.get_nonce(account))

    @property
    def count(self) -> int:
        """How many transactions were applied."""
        return len(self._transactions)

    def gas_left(self) -> int:
        return int(self._header.gas_limit - self._header.gas_used)

    def apply(self, transaction: Transaction) -> TransactionRecord:
        """Run one transaction. Raises BadInput, with nothing changed, when it cannot stand here in the block."""
        gas_before = self._header.gas_used
        try:
            receipt, computation = self._vm.apply_transaction(self._header, transaction.signed)
        except ValidationError as error:
            raise BadInput(f"transaction 0x{transaction.hash.hex()} cannot be applied here: {error}") from error
        self._header = self._vm.add_receipt_to_header(self._header, receipt)
        reason = reason_of(bytes(computation.output), type(computation.error)) if computation.is_error else None
        events = events_of((bytes(log.address), tuple(log.topics), bytes(log.data)) for log in receipt.logs)
        record = record_of(transaction, receipt.gas_used - gas_before, reason, events)
        self._transactions.append(transaction)
        self._receipts.append(receipt)
        self._records.append(record)
        return record

    def close(self) -> None:
        """Let go of the store and of what was written: a cache of the trie library outlives us and holds it."""
        self._overlay.close()

    def finish(self) -> Executed:
        """The roots and the new state nodes; the execution is over."""
        self._vm.state.persist()
        header = self._header.copy(
            state_root=self._vm.state.state_root,
            transaction_root=list_root([transaction.raw for transaction in self._transactions]),
            receipt_root=list_root([receipt.encode() for receipt in self._receipts]),
        )
        return Executed(
            header,
            tuple(self._transactions),
            tuple(self._receipts),
            tuple(self._records),
            self._overlay.written,
        )


def record_of(
    transaction: Transaction, gas_used: int, reason: str | None, events: tuple[ContractEvent, ...]
) -> TransactionRecord:
    """How a transaction ended."""
    return TransactionRecord(
        hash=transaction.hash,
        sender=transaction.sender,
        nonce=transaction.nonce,
        to=transaction.to,
        gas_used=gas_used,
        reason=reason,
        events=events,
    )


def reason_of(output: bytes, error: type[VMError]) -> str:
    """Why a transaction failed."""
    # Of py-evm's own errors the kind only: their texts may change with its version, and a record is kept for ever.
    return revert_reason(output) if output else f"the call failed: {error.__name__}"


def events_of(logs: Iterable[RawLog]) -> tuple[ContractEvent, ...]:
    decoded = (
        decode_log(address, [topic.to_bytes(32, "big") for topic in topics], data) for address, topics, data in logs
    )
    return tuple(event for event in decoded if event is not None)
