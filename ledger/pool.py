"""Accepted transactions waiting for a block. In memory; the ledger journals each before it is acknowledged.

Each account's transactions are contiguous from its next nonce; their number and size are bounded. Knows no execution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Set

from contracts.errors import Busy, Conflict
from contracts.types import Address, TransactionHash
from ledger.transactions import Transaction

POOL_TRANSACTIONS_MAX = 8192
POOL_SENDER_TRANSACTIONS_MAX = 64
POOL_BYTES_MAX = 64 << 20


class Pool:
    def __init__(self) -> None:
        self._by_sender: dict[Address, dict[int, tuple[int, Transaction]]] = {}
        """Of each account the sequence number and transaction by nonce, in nonce order."""
        self._known: dict[TransactionHash, Transaction] = {}
        self._size_bytes = 0
        self.sequence = 0
        """Of the newest transaction taken in; grows with each."""

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, transaction_hash: TransactionHash) -> bool:
        return transaction_hash in self._known

    def find(self, transaction_hash: TransactionHash) -> Transaction | None:
        return self._known.get(transaction_hash)

    @property
    def hashes(self) -> Set[TransactionHash]:
        """Of everything waiting."""
        return self._known.keys()

    @property
    def senders(self) -> Collection[Address]:
        return self._by_sender.keys()

    def next_nonce(self, sender: Address, state_nonce: int) -> int:
        """The nonce after the account's waiting transactions."""
        return max(state_nonce, *(nonce + 1 for nonce in self._by_sender.get(sender, ())), 0)

    def check(self, transaction: Transaction, state_nonce: int) -> None:
        """Raise Conflict or Busy unless `transaction` may wait here."""
        waiting = len(self._by_sender.get(transaction.sender, ()))
        expected = self.next_nonce(transaction.sender, state_nonce)
        if transaction.nonce != expected:
            # Ethereum's libraries look for "nonce too low" and "nonce too high".
            why = "low: {} is used" if transaction.nonce < expected else "high: {} leaves a gap"
            wrong = f"nonce too {why.format(transaction.nonce)}"
            raise Conflict(f"{wrong}: the next of 0x{transaction.sender.hex()} is {expected}")
        if waiting >= POOL_SENDER_TRANSACTIONS_MAX:
            raise Busy(
                f"{waiting} transactions of this account wait already, at most {POOL_SENDER_TRANSACTIONS_MAX} do: "
                "send it again when some are final"
            )
        if len(self) >= POOL_TRANSACTIONS_MAX or self._size_bytes + len(transaction.raw) > POOL_BYTES_MAX:
            raise Busy(
                f"the pool is full: {len(self)} transactions of {self._size_bytes} bytes wait, at most "
                f"{POOL_TRANSACTIONS_MAX} of {POOL_BYTES_MAX} do: send it again later"
            )

    def add(self, transaction: Transaction, sequence: int) -> None:
        """Take in a checked and journalled transaction."""
        assert sequence > self.sequence
        assert transaction.nonce not in self._by_sender.get(transaction.sender, ())
        self._by_sender.setdefault(transaction.sender, {})[transaction.nonce] = (sequence, transaction)
        self._known[transaction.hash] = transaction
        self._size_bytes += len(transaction.raw)
        self.sequence = sequence

    def in_turns(self) -> Iterator[Transaction]:
        """Everything waiting, each account's in nonce order; they take turns, so that none crowds out the rest."""
        eldest_first = sorted(self._by_sender.values(), key=lambda waiting: next(iter(waiting.values()))[0])
        queues = [iter([transaction for _, transaction in waiting.values()]) for waiting in eldest_first]
        while queues:
            turn = [(queue, next(queue, None)) for queue in queues]
            yield from (transaction for _, transaction in turn if transaction is not None)
            queues = [queue for queue, transaction in turn if transaction is not None]

    def in_order(self) -> list[Transaction]:
        """Everything waiting, in the order it was taken in."""
        entries = [entry for waiting in self._by_sender.values() for entry in waiting.values()]
        return [transaction for _, transaction in sorted(entries, key=lambda entry: entry[0])]

    def stale(self, nonces: Mapping[Address, int], may_send: Collection[Address]) -> dict[int, Transaction]:
        """What can no longer enter a block, by sequence number, once the next nonces of some accounts are `nonces` and
        only the accounts in `may_send` may send: what stays is contiguous from the next nonce again."""
        found: dict[int, Transaction] = {}
        for sender, waiting in self._by_sender.items():
            if sender not in may_send:
                found |= dict(waiting.values())
            elif sender in nonces:
                expected = nonces[sender]
                for nonce, (sequence, transaction) in waiting.items():
                    if nonce == expected:
                        expected += 1
                    else:
                        found[sequence] = transaction
        return found

    def remove(self, transactions: Mapping[int, Transaction]) -> None:
        for transaction in transactions.values():
            waiting = self._by_sender[transaction.sender]
            del waiting[transaction.nonce]
            if not waiting:
                del self._by_sender[transaction.sender]
            del self._known[transaction.hash]
            self._size_bytes -= len(transaction.raw)
