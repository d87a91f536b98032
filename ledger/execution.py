"""Transactions run over a parent's state; what changed is collected, nothing is written.

Cancun rules with a base fee of zero. Knows no storage but a function that reads one state node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from eth.consensus.context import ConsensusContext
from eth.db.atomic import AtomicDB
from eth.db.backends.base import BaseDB
from eth.db.chain import ChainDB
from eth.exceptions import OutOfGas, Revert, VMError
from eth.vm.chain_context import ChainContext
from eth.vm.forks.cancun import CancunVM
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.forks.cancun.state import CancunState
from eth.vm.forks.london.constants import EIP3529_MAX_REFUND_QUOTIENT
from eth_utils.exceptions import ValidationError

from contracts.calls import revert_reason
from contracts.errors import BadInput
from contracts.events import ContractEvent, decode_log
from contracts.types import Address
from ledger.computation import LedgerComputation, executed
from ledger.receipts import EncodedReceipt, RawLog, encode_receipt
from ledger.record import TransactionRecord
from ledger.roots import list_root
from ledger.seal import EXTRA_DATA_SIZE
from ledger.state import BlockState
from ledger.transactions import Transaction
from ledger.trie import ReadNode


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

    def read(self, key: bytes) -> bytes | None:
        value = self.written.get(key)
        return self._read(key) if value is None else value

    def __getitem__(self, key: bytes) -> bytes:
        value = self.read(key)
        if value is None:
            raise KeyError(key)
        return value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.written[key] = value

    def __delitem__(self, key: bytes) -> None:
        raise AssertionError("state nodes are content-addressed and never deleted")

    def _exists(self, key: bytes) -> bool:
        return self.read(key) is not None


class LedgerState(CancunState):
    """Cancun's state with our computation of a call."""

    computation_class = LedgerComputation


class LedgerVM(CancunVM):
    """Cancun with room for the seal in extra_data and ancestors read from our own store."""

    _state_class = LedgerState
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


@dataclass(frozen=True)
class _Ended:
    """How a transaction ended. `reason` is None when it succeeded."""

    gas_used: int
    reason: str | None
    logs: Sequence[RawLog] = ()


class Execution:
    """One block being executed: `apply` its transactions in order, then `finish`."""

    def __init__(self, header: CancunBlockHeader, chain_id: int, read: ReadNode, ancestors: Iterable[bytes]) -> None:
        """`header` is the child_header of the parent whose state is the start."""
        self._overlay = Overlay(read)
        self._chain_id = chain_id
        self._ancestors = ancestors
        self._header = header
        self._timestamp = int(header.timestamp)
        self._gas_limit, self._gas_used, self._bloom = int(header.gas_limit), 0, 0
        self._state = BlockState(self._overlay.read, header.state_root)
        self._transactions: list[Transaction] = []
        self._receipts: list[EncodedReceipt] = []
        self._records: list[TransactionRecord] = []

    def nonce(self, account: Address) -> int:
        """The nonce the account's next transaction must bear."""
        return self._state.nonce(account)

    @property
    def count(self) -> int:
        """How many transactions were applied."""
        return len(self._transactions)

    def gas_left(self) -> int:
        return self._gas_limit - self._gas_used

    def apply(self, transaction: Transaction) -> TransactionRecord:
        """Run one transaction. Raises BadInput, with nothing changed, when it cannot stand here in the block."""
        self._check(transaction)
        ended = self._execute(transaction) or self._execute_by_py_evm(transaction)
        self._gas_used += ended.gas_used
        receipt = encode_receipt(transaction.type, ended.reason is None, self._gas_used, ended.logs)
        self._bloom |= receipt.bloom
        record = TransactionRecord(
            hash=transaction.hash,
            sender=transaction.sender,
            nonce=transaction.nonce,
            to=transaction.to,
            gas_used=ended.gas_used,
            reason=ended.reason,
            events=_events(ended.logs),
        )
        self._transactions.append(transaction)
        self._receipts.append(receipt)
        self._records.append(record)
        return record

    def _check(self, transaction: Transaction) -> None:
        """Raise BadInput unless the block has the gas for it and it is its sender's next: all that
        ledger.transactions does not see to."""
        nonce, left = self.nonce(transaction.sender), self.gas_left()
        if transaction.gas > left:
            raise _misplaced(transaction, f"it asks for {transaction.gas} gas, the block has {left} left")
        if transaction.nonce != nonce:
            raise _misplaced(transaction, f"its nonce is {transaction.nonce}, its sender's next is {nonce}")

    def _execute(self, transaction: Transaction) -> _Ended | None:
        """None, with nothing changed, when py-evm has to do it."""
        to, sender = transaction.to, transaction.sender
        warm: set[tuple[bytes, int | None]] = {(to, None)}
        for address, slots in transaction.access_list:
            warm |= {(address, slot) for slot in (None, *slots)}
        gas = transaction.gas - transaction.intrinsic_gas
        frame = executed(
            self._state, self._timestamp, lambda *place: place in warm, to, sender, 0, transaction.data, gas
        )
        if frame is None:
            return None
        self._state.use_nonce(sender)
        used = transaction.gas - frame.gas
        if frame.is_starved or frame.is_reverted:
            return _Ended(used, _reason(frame.output, OutOfGas if frame.is_starved else Revert))
        for slot, value in frame.written():
            self._state.set_storage(to, slot, value)
        # Capped as EIP-3529 has it.
        return _Ended(used - min(frame.scope.refund, used // EIP3529_MAX_REFUND_QUOTIENT), None, frame.scope.logs)

    def _execute_by_py_evm(self, transaction: Transaction) -> _Ended:
        """The same by py-evm alone, over what the transactions before it left."""
        header = self._header.copy(state_root=self._put_state(), gas_used=self._gas_used)
        database = AtomicDB(self._overlay)
        vm = LedgerVM(header, ChainDB(database), ChainContext(self._chain_id), ConsensusContext(database))
        vm.ancestors = self._ancestors
        try:
            receipt, computation = vm.apply_transaction(header, transaction.signed)
        except ValidationError as error:
            raise _misplaced(transaction, str(error)) from error
        vm.state.persist()
        self._state = BlockState(self._overlay.read, vm.state.state_root)
        reason = _reason(bytes(computation.output), type(computation.error)) if computation.is_error else None
        logs = [(bytes(log.address), tuple(log.topics), bytes(log.data)) for log in receipt.logs]
        return _Ended(receipt.gas_used - self._gas_used, reason, logs)

    def _put_state(self) -> bytes:
        """The root of the state as it is now, whose new nodes are in the overlay then."""
        root, nodes = self._state.finish()
        self._overlay.written.update(nodes)
        return root

    def close(self) -> None:
        """Let go of the store and of what was written: a cache of the trie library outlives us and holds it."""
        self._overlay.close()

    def finish(self) -> Executed:
        """The roots and the new state nodes; the execution is over."""
        header = self._header.copy(
            state_root=self._put_state(),
            transaction_root=list_root([transaction.raw for transaction in self._transactions]),
            receipt_root=list_root([receipt.encode() for receipt in self._receipts]),
            bloom=self._bloom,
            gas_used=self._gas_used,
        )
        return Executed(
            header,
            tuple(self._transactions),
            tuple(self._receipts),
            tuple(self._records),
            self._overlay.written,
        )


def _misplaced(transaction: Transaction, why: str) -> BadInput:
    return BadInput(f"transaction 0x{transaction.hash.hex()} cannot be applied here: {why}")


def _reason(output: bytes, error: type[VMError]) -> str:
    """Why a transaction failed."""
    # Of py-evm's own errors the kind only: their texts may change with its version, and a record is kept for ever.
    return revert_reason(output) if output else f"the call failed: {error.__name__}"


def _events(logs: Sequence[RawLog]) -> tuple[ContractEvent, ...]:
    decoded = (
        decode_log(address, [topic.to_bytes(32, "big") for topic in topics], data) for address, topics, data in logs
    )
    return tuple(event for event in decoded if event is not None)
