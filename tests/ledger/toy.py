"""A stand-in for the EVM in simulations of agreement, where thousands of blocks are executed.

Everything around it is the ledger's own: transactions, headers, seals, pool, store. It knows nonces and the calls that
change the authorities; other calls only use up their nonce. Its state is one node, named by its hash as all are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from eth.vm.forks.cancun.blocks import CancunBlockHeader

from contracts import events
from contracts.calls import AddAuthority, RemoveAuthority, decode_call
from contracts.errors import BadInput
from contracts.types import Address
from ledger.execution import Executed, ReadNode
from ledger.record import TransactionRecord
from ledger.transactions import Transaction

MARK = b"toy state"
GAS = 21_000


@dataclass(frozen=True)
class Receipt:
    """A receipt's bytes."""

    data: bytes

    def encode(self) -> bytes:
        return self.data


class ToyExecution:
    """The part of ledger.execution.Execution that the chain uses."""

    def __init__(self, header: CancunBlockHeader, chain_id: int, read: ReadNode, ancestors: Iterable[bytes]) -> None:
        node = read(header.state_root) or b""
        self._nonces: dict[bytes, int] = {}
        if node.startswith(MARK):
            self._nonces = dict(msgspec.msgpack.decode(node.removeprefix(MARK), type=list[tuple[bytes, int]]))
        self._header = header
        self._transactions: list[Transaction] = []
        self._records: list[TransactionRecord] = []

    def nonce(self, account: Address) -> int:
        return self._nonces.get(account, 0)

    @property
    def count(self) -> int:
        return len(self._transactions)

    def gas_left(self) -> int:
        return int(self._header.gas_limit - GAS * self.count)

    def apply(self, transaction: Transaction) -> TransactionRecord:
        if transaction.nonce != self.nonce(transaction.sender):
            raise BadInput(f"nonce {transaction.nonce}, not {self.nonce(transaction.sender)}")
        self._nonces[transaction.sender] = transaction.nonce + 1
        record = TransactionRecord(
            transaction.hash, transaction.sender, transaction.nonce, transaction.to, GAS, None, _events(transaction)
        )
        self._transactions.append(transaction)
        self._records.append(record)
        return record

    def close(self) -> None:
        """Nothing is held."""

    def finish(self) -> Executed:
        node = MARK + msgspec.msgpack.encode(sorted(self._nonces.items()))
        root = hashlib.sha256(node).digest()
        hashes = [transaction.hash for transaction in self._transactions]
        root_of_transactions = hashlib.sha256(b"".join(hashes)).digest()
        header = self._header.copy(
            state_root=root,
            transaction_root=root_of_transactions,
            receipt_root=root_of_transactions,
            gas_used=GAS * self.count,
        )
        receipts = tuple(Receipt(transaction_hash) for transaction_hash in hashes)
        return Executed(header, tuple(self._transactions), receipts, tuple(self._records), {root: node})


def _events(transaction: Transaction) -> tuple[events.ContractEvent, ...]:
    match decode_call(transaction.to, transaction.data):
        case AddAuthority(account):
            return (events.AuthorityAdded(account),)
        case RemoveAuthority(account):
            return (events.AuthorityRemoved(account),)
        case _:
            return ()
