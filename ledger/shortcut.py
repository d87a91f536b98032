"""The same results as `ledger.execution` sooner, for blocks whose results are known: a final block's header has them.

Contract code runs as Python functions (`ledger.computation`), and a block changes its own state, whose tries are made
anew once at its end (`ledger.state`). Whoever executes so compares header with header: state root, receipt root, bloom
filter and gas of the block were made by py-evm, on the machines of two thirds of the authorities, so what is equal to
them is right however it was come by. What differs, and what raises HandOver, is executed again by py-evm. Nothing is
proposed or voted on by this.
"""

from __future__ import annotations

from collections.abc import Sequence

from eth.exceptions import OutOfGas, Revert
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.forks.london.constants import EIP3529_MAX_REFUND_QUOTIENT

from ledger.computation import executed
from ledger.execution import Executed, events_of, reason_of, record_of
from ledger.receipts import EncodedReceipt, RawLog, encode_receipt
from ledger.record import TransactionRecord
from ledger.runs import HandOver
from ledger.state import BlockState
from ledger.transactions import Transaction
from ledger.trie import ReadNode, list_root


def execute(header: CancunBlockHeader, transactions: Sequence[Transaction], read: ReadNode) -> Executed:
    """The child of the parent whose `child_header` this is. Raises HandOver when py-evm has to execute it."""
    block = _Block(header, read)
    for transaction in transactions:
        block.apply(transaction)
    state_root, nodes = block.state.finish()
    finished = header.copy(
        state_root=state_root,
        transaction_root=list_root([transaction.raw for transaction in transactions]),
        receipt_root=list_root([receipt.encode() for receipt in block.receipts]),
        bloom=block.bloom,
        gas_used=block.gas_used,
    )
    return Executed(finished, tuple(transactions), tuple(block.receipts), tuple(block.records), nodes)


class _Block:
    """A block on its way."""

    def __init__(self, header: CancunBlockHeader, read: ReadNode) -> None:
        self.state = BlockState(read, header.state_root)
        self.receipts: list[EncodedReceipt] = []
        self.records: list[TransactionRecord] = []
        self.bloom = self.gas_used = 0
        self._timestamp, self._gas_limit = int(header.timestamp), int(header.gas_limit)

    def apply(self, transaction: Transaction) -> None:
        if transaction.nonce != self.state.nonce(transaction.sender):
            raise HandOver
        if transaction.gas > self._gas_limit - self.gas_used:
            raise HandOver
        used, reason, logs = self._execute(transaction)
        self.gas_used += used
        receipt = encode_receipt(transaction.type, reason is None, self.gas_used, logs)
        self.bloom |= receipt.bloom
        self.receipts.append(receipt)
        self.records.append(record_of(transaction, used, reason, events_of(logs)))

    def _execute(self, transaction: Transaction) -> tuple[int, str | None, Sequence[RawLog]]:
        """The gas it used, why it failed if it did, and its logs."""
        to, sender = transaction.to, transaction.sender
        warm: set[tuple[bytes, int | None]] = {(to, None)}
        for address, slots in transaction.access_list:
            warm |= {(address, slot) for slot in (None, *slots)}
        gas = transaction.gas - transaction.intrinsic_gas
        frame = executed(
            self.state, self._timestamp, lambda *place: place in warm, to, sender, 0, transaction.data, gas
        )
        self.state.use_nonce(sender)
        used = transaction.gas - frame.gas
        if frame.is_starved or frame.is_reverted:
            return used, reason_of(frame.output, OutOfGas if frame.is_starved else Revert), ()
        for slot, value in frame.written():
            self.state.set_storage(to, slot, value)
        # Capped as EIP-3529 has it.
        return used - min(frame.scope.refund, used // EIP3529_MAX_REFUND_QUOTIENT), None, frame.scope.logs
