"""Accepted transactions waiting for a block. In memory; the ledger journals each before it is acknowledged.

Each account's transactions are contiguous from its next nonce and bounded in number. Knows no execution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from contracts.errors import Busy, Conflict
from contracts.types import Address, TransactionHash
from ledger.transactions import Transaction

POOL_TRANSACTIONS_MAX = 8192
POOL_SENDER_TRANSACTIONS_MAX = 64


class Pool:
    def __init__(self) -> None:
        self._by_sender: dict[Address, dict[int, tuple[int, Transaction]]] = {}
        self._known: set[TransactionHash] = set()
        self.sequence = 0
        """Of the newest transaction taken in; grows by one with each."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, transaction_hash: TransactionHash) -> bool:
        return transaction_hash in self._known

    def next_nonce(self, sender: Address, state_nonce: int) -> int:
        """The nonce after the account's waiting transactions."""
        return state_nonce + sum(nonce >= state_nonce for nonce in self._by_sender.get(sender, ()))

    def check(self, transaction: Transaction, state_nonce: int) -> None:
        """Raise Conflict or Busy unless `transaction` may wait here."""
        waiting = self._by_sender.get(transaction.sender, {})
        expected = self.next_nonce(transaction.sender, state_nonce)
        if transaction.nonce != expected:
            why = "is used" if transaction.nonce < expected else "leaves a gap"
            raise Conflict(f"nonce {transaction.nonce} {why}: the next of 0x{transaction.sender.hex()} is {expected}")
        if len(waiting) >= POOL_SENDER_TRANSACTIONS_MAX:
            raise Busy(f"{len(waiting)} transactions of this account wait already, at most {POOL_SENDER_TRANSACTIONS_MAX}")
        if len(self) >= POOL_TRANSACTIONS_MAX:
            raise Busy(f"the pool is full with {len(self)} transactions: send it again later")

    def add(self, transaction: Transaction, sequence: int) -> None:
        """Take in a checked and journalled transaction."""
        assert sequence > self.sequence
        self._by_sender.setdefault(transaction.sender, {})[transaction.nonce] = (sequence, transaction)
        self._known.add(transaction.hash)
        self.sequence = sequence

    def in_turns(self) -> Iterator[Transaction]:
        """Everything waiting, each account's in nonce order, the accounts taking turns so that none crowds out the rest."""
        queues = [
            iter([transaction for _, (_, transaction) in sorted(waiting.items())])
            for waiting in sorted(self._by_sender.values(), key=lambda waiting: min(waiting.values(), key=_sequence)[0])
        ]
        while queues:
            turn = [(queue, next(queue, None)) for queue in queues]
            yield from (transaction for _, transaction in turn if transaction is not None)
            queues = [queue for queue, transaction in turn if transaction is not None]

    def since(self, sequence: int) -> list[Transaction]:
        """Transactions taken in after `sequence`, in that order."""
        entries = (entry for waiting in self._by_sender.values() for entry in waiting.values() if entry[0] > sequence)
        return [transaction for _, transaction in sorted(entries, key=_sequence)]

    def stale(self, is_stale: Callable[[Transaction], bool]) -> dict[int, Transaction]:
        """Waiting transactions that can no longer enter a block, by sequence number: `is_stale`, or behind one of the same
        account that is and whose nonce is not used."""
        found: dict[int, Transaction] = {}
        for waiting in self._by_sender.values():
            for sequence, transaction in waiting.values():
                if is_stale(transaction):
                    found[sequence] = transaction
        return found

    def remove(self, transactions: dict[int, Transaction]) -> None:
        for transaction in transactions.values():
            waiting = self._by_sender[transaction.sender]
            del waiting[transaction.nonce]
            if not waiting:
                del self._by_sender[transaction.sender]
            self._known.discard(transaction.hash)


def _sequence(entry: tuple[int, Transaction]) -> int:
    return entry[0]
