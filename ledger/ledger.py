"""The ledger as the node sees it: submit transactions, import blocks, wait for the head, read what is final.

Reads are answered at once from the store. Whatever executes or syncs to disk runs in a worker thread, one at a time.
Knows no sockets: `node.network` moves the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from contracts.errors import BadInput, NotAllowed, NotFound
from contracts.types import Address, TransactionHash
from genesis.block import build
from genesis.config import GenesisConfig
from ledger import seal
from ledger.block import check_transactions, earliest_timestamp
from ledger.chain import Chain
from ledger.execution import Executed
from ledger.keys import Key
from ledger.pool import Pool
from ledger.record import BlockRecord, TransactionRecord
from ledger.store import Store
from ledger.transactions import Transaction, check_enrolled

Clock = Callable[[], float]
"""Seconds since the epoch."""


@dataclass(frozen=True)
class Head:
    """The newest final block."""

    number: int
    hash: bytes
    timestamp: int
    state_root: bytes


@dataclass(frozen=True)
class Receipt:
    """Where a transaction stands in the chain and how it ended."""

    transaction: TransactionRecord
    index: int
    block_number: int
    block_hash: bytes
    timestamp: int


@dataclass(frozen=True)
class Account:
    """An account as of the head; `next_nonce` counts its transactions that wait in the pool."""

    address: Address
    next_nonce: int
    enrolled: bool
    admin: bool
    authority: bool


@dataclass(frozen=True)
class LedgerStatistics:
    head_number: int
    pool_transactions: int
    blocks_sealed: int
    blocks_imported: int


class Ledger:
    """Use `Ledger.open(...)`; close when done."""

    def __init__(self, chain: Chain, clock: Clock) -> None:
        self._chain = chain
        self._clock = clock
        self._writer = trio.Lock()
        self._head_moved = trio.Event()
        self._pool_grew = trio.Event()
        self._pool = Pool()
        self._blocks_sealed = 0
        self._blocks_imported = 0
        self._recover_journal()

    @staticmethod
    def open(path: Path, config: GenesisConfig, clock: Clock = time.time) -> Ledger:
        """Open or create the ledger in the folder `path`. Raises Conflict or Corrupt; see ledger.store."""
        store = Store(path)
        try:
            return Ledger(Chain(store, config, build(config)), clock)
        except BaseException:
            store.close()
            raise

    def close(self) -> None:
        self._chain.store.close()

    def _recover_journal(self) -> None:
        """Take back what was acknowledged before a crash and is in no block yet."""
        for sequence, raw in self._chain.store.journal():
            self._pool.add(self._chain.decode(raw), sequence)
        self._drop_stale()

    # What is final

    @property
    def config(self) -> GenesisConfig:
        return self._chain.config

    @property
    def chain_id(self) -> int:
        return self._chain.chain_id

    @property
    def genesis_hash(self) -> bytes:
        return self._chain.genesis_hash

    @property
    def head(self) -> Head:
        header = self._chain.tip.header
        return Head(header.block_number, bytes(header.hash), header.timestamp, bytes(header.state_root))

    @property
    def admins(self) -> frozenset[Address]:
        return self._chain.tip.accounts.admins

    @property
    def authorities(self) -> frozenset[Address]:
        return self._chain.tip.accounts.authorities

    async def wait_head(self, after: int) -> Head:
        """The head, once its number is above `after`."""
        while self._chain.tip.number <= after:
            await self._head_moved.wait()
        return self.head

    def records(self, start: int) -> Iterator[BlockRecord]:
        """Records of the final blocks from number `start` to the head, in order."""
        return self._chain.store.records(start, self._chain.tip.number + 1)

    def record(self, number: int) -> BlockRecord:
        """Raises NotFound above the head."""
        if not 0 <= number <= self._chain.tip.number:
            raise NotFound(f"no block {number}: the head is {self._chain.tip.number}")
        return self._chain.store.record(number)

    def header(self, number: int) -> Any:
        """The Cancun header of a final block. Raises NotFound above the head."""
        self.record(number)
        return self._chain.store.sealed(number).header()

    def signers(self, number: int) -> tuple[Address, ...]:
        """The authorities whose votes make a final block's certificate; none for genesis."""
        return seal.voters(self._chain.store.sealed(number).certificate, self.genesis_hash)

    def number_of(self, block_hash: bytes) -> int:
        """Raises NotFound for a hash that is no final block's."""
        number = self._chain.store.number_of(block_hash)
        if number is None:
            raise NotFound(f"no final block 0x{block_hash.hex()}")
        return number

    def sealed_blocks(self, start: int, count_max: int, bytes_max: int) -> list[bytes]:
        """Encoded blocks from `start` on: at most `count_max`, and no more than `bytes_max` after the first."""
        found: list[bytes] = []
        for number in range(max(start, 1), min(start + count_max, self._chain.tip.number + 1)):
            data = self._chain.store.sealed_bytes(number)
            if found and sum(map(len, found)) + len(data) > bytes_max:
                break
            found.append(data)
        return found

    def receipt(self, transaction_hash: TransactionHash) -> Receipt | None:
        """None while the transaction is not in a final block."""
        place = self._chain.store.place_of(transaction_hash)
        if place is None:
            return None
        record = self._chain.store.record(place[0])
        return Receipt(record.transactions[place[1]], place[1], record.number, record.hash, record.timestamp)

    def account(self, address: Address) -> Account:
        accounts = self._chain.tip.accounts
        return Account(
            address,
            self._pool.next_nonce(address, self._chain.nonce(address)),
            address in accounts.enrolled,
            address in accounts.admins,
            address in accounts.authorities,
        )

    def is_pending(self, transaction_hash: TransactionHash) -> bool:
        return transaction_hash in self._pool

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(self._chain.tip.number, len(self._pool), self._blocks_sealed, self._blocks_imported)

    # Transactions

    def decode(self, raw: bytes) -> Transaction:
        """A raw transaction with every check that needs no state. Raises BadInput."""
        return self._chain.decode(raw)

    async def submit(self, raw: bytes) -> TransactionHash:
        """Check a raw transaction, journal it and take it into the pool; on disk when this returns.

        A transaction that is known is answered with its hash again. One that its contract would refuse as things stand
        is refused here, so that it costs neither a nonce nor a place in a block. Raises BadInput, NotAllowed,
        Conflict or Busy.
        """
        async with self._writer:
            transaction, is_new = await trio.to_thread.run_sync(self._accept, raw)
            if is_new:
                self._pool.add(transaction, self._pool.sequence + 1)
                self._pool_grew.set()
                self._pool_grew = trio.Event()
        return transaction.hash

    def _accept(self, raw: bytes) -> tuple[Transaction, bool]:
        chain = self._chain
        transaction = chain.decode(raw)
        if transaction.hash in self._pool or chain.store.place_of(transaction.hash) is not None:
            return transaction, False
        check_enrolled(transaction, chain.tip.accounts.enrolled.__contains__)
        state_nonce = chain.nonce(transaction.sender)
        self._pool.check(transaction, state_nonce)
        if transaction.nonce == state_nonce:
            outcome = chain.simulate(transaction, self._next_timestamp())
            if outcome.reason is not None:
                raise NotAllowed(f"the contract refuses this transaction: {outcome.reason}")
        chain.store.append_journal(self._pool.sequence + 1, raw)
        return transaction, True

    def pending(self) -> list[bytes]:
        """Raw transactions of the pool, in the order they came."""
        return [transaction.raw for transaction in self._pool.since(0)]

    async def wait_pending(self, after: int) -> int:
        """The pool's sequence number, once it is above `after`."""
        while self._pool.sequence <= after:
            await self._pool_grew.wait()
        return self._pool.sequence

    async def wait_receipt(self, transaction_hash: TransactionHash) -> Receipt:
        """The receipt, once the transaction is in a final block."""
        while True:
            number = self._chain.tip.number
            receipt = self.receipt(transaction_hash)
            if receipt is not None:
                return receipt
            await self.wait_head(number)

    # Blocks

    async def import_sealed(self, data: bytes) -> None:
        """Check, execute and write the next block; one that is ours already changes nothing. Raises BadPeer, or
        Conflict when the blocks before it are missing."""
        async with self._writer:
            if await trio.to_thread.run_sync(self._import, data):
                self._blocks_imported += 1
                self._announce_head()

    def _import(self, data: bytes) -> bool:
        found = self._chain.execute_sealed(data, self._clock())
        if found is None:
            return False
        self._write(*found)
        return True

    def _write(self, executed: Executed, certificate: seal.Certificate) -> None:
        """Commit a final block and clear the pool of what can no longer enter one."""
        included = {transaction.hash for transaction in executed.transactions}
        done = self._pool.stale(lambda transaction: transaction.hash in included)
        self._chain.finalise(executed, certificate, tuple(done))
        self._pool.remove(done)
        self._drop_stale()

    def _drop_stale(self) -> None:
        """Forget waiting transactions whose nonce is used or whose sender is no longer enrolled."""
        enrolled = self._chain.tip.accounts.enrolled
        nonces: dict[Address, int] = {}

        def is_stale(transaction: Transaction) -> bool:
            sender = transaction.sender
            if sender not in nonces:
                nonces[sender] = self._chain.nonce(sender)
            return transaction.nonce < nonces[sender] or sender not in enrolled

        self._drop(self._pool.stale(is_stale))

    def _drop(self, stale: dict[int, Transaction]) -> None:
        self._pool.remove(stale)
        self._chain.store.forget_journal(tuple(stale))

    def _announce_head(self) -> None:
        self._head_moved.set()
        self._head_moved = trio.Event()

    def _next_timestamp(self) -> int:
        return max(int(self._clock()), earliest_timestamp(self._chain.tip.header, self.config))

    async def seal(self, key: Key) -> None:
        """Make blocks of what is pending, for as long as it runs. `key` is the only authority's.

        Raises NotAllowed when it is no authority, and BadInput when there are others: their votes would be needed.
        """
        while True:
            while not len(self._pool):
                await self._pool_grew.wait()
            await trio.sleep(max(0.0, earliest_timestamp(self._chain.tip.header, self.config) - self._clock()))
            async with self._writer:
                if await trio.to_thread.run_sync(self._seal_once, key):
                    self._blocks_sealed += 1
                    self._announce_head()

    def _seal_once(self, key: Key) -> bool:
        self._check_sole_authority(key)
        executed, impossible = self._chain.propose(key, self._pool.in_turns(), self._next_timestamp())
        gone = {transaction.hash for transaction in impossible}
        self._drop(self._pool.stale(lambda transaction: transaction.hash in gone))
        if executed is None:
            return False
        check_transactions(executed.transactions, self._chain.tip.accounts)
        self._write(executed, seal.certify(self.genesis_hash, executed.header, [key]))
        return True

    def _check_sole_authority(self, key: Key) -> None:
        authorities = self.authorities
        if key.address not in authorities:
            raise NotAllowed(f"0x{key.address.hex()} is no authority of this ledger: start without `authority = true`")
        if len(authorities) > 1:
            raise BadInput(f"this ledger has {len(authorities)} authorities: this version seals with exactly one")
