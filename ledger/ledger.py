"""The ledger as the node sees it: submit transactions, import blocks, wait for the head, read what is final.

Whatever executes or syncs to disk runs in a worker thread, one at a time, under `_writer`. The head and the pool change
on trio's thread only, once the thread has written: between two awaits nothing moves under a reader, and a cancelled
caller loses nothing, because the thread is waited for and no await lies between its end and the change.
Reads are answered at once; those of final blocks may also be made from a thread. Knows no sockets: `node.network` moves
the bytes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from contracts.calls import AddAuthority, decode_call
from contracts.errors import BadInput, Conflict, NotAllowed, NotFound
from contracts.types import Address, TransactionHash
from genesis.block import build
from genesis.config import GenesisConfig
from ledger import seal
from ledger.block import earliest_timestamp
from ledger.chain import Chain, Tip
from ledger.execution import Executed
from ledger.history import History
from ledger.keys import Key
from ledger.pool import Pool
from ledger.record import BlockRecord, TransactionRecord
from ledger.store import Store
from ledger.transactions import Transaction, check_enrolled

Clock = Callable[[], float]
"""Seconds since the epoch. Read on trio's thread only."""

CLOCK_LOOK_S = 1.0
"""How often the sealer looks at the clock again while it waits for the next second: the clock may be set."""


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


@dataclass(frozen=True)
class _Final:
    """What a worker thread wrote and trio's thread has yet to adopt."""

    tip: Tip
    stale: dict[int, Transaction]


class Ledger:
    """Use `Ledger.open(...)`; close when done."""

    def __init__(self, chain: Chain, clock: Clock) -> None:
        self._chain = chain
        self._clock = clock
        self._writer = trio.Lock()
        self._moved = trio.Event()
        self._pool_grew = trio.Event()
        self._disk_failed = trio.Event()
        self._pool = Pool()
        self.history = History(chain, self._next_timestamp)
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
        """Take back what was acknowledged before the ledger was closed or killed and is in no block yet."""
        chain, pool = self._chain, self._pool
        for sequence, raw in chain.store.journal():
            try:
                pool.add(chain.decode(raw), sequence)
            except BadInput as error:
                raise chain.store.corrupt(f"number {sequence} of its accepted transactions: {error}") from error
        nonces = {sender: chain.nonce(sender) for sender in pool.senders}
        stale = pool.stale(nonces, chain.tip.accounts.enrolled)
        chain.store.forget_journal(tuple(stale))
        pool.remove(stale)

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
            await self._moved.wait()
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
        """The authorities whose votes make a final block's certificate; none for genesis. Raises NotFound above the
        head."""
        self.record(number)
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
        size_bytes = 0
        for number in range(max(start, 1), min(start + count_max, self._chain.tip.number + 1)):
            data = self._chain.store.sealed_bytes(number)
            size_bytes += len(data)
            if found and size_bytes > bytes_max:
                break
            found.append(data)
        return found

    def receipt(self, transaction_hash: TransactionHash) -> Receipt | None:
        """None while the transaction is not in a final block."""
        place = self._chain.store.place_of(transaction_hash)
        if place is None or place[0] > self._chain.tip.number:
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

    def pending_transaction(self, transaction_hash: TransactionHash) -> Transaction | None:
        return self._pool.find(transaction_hash)

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(self._chain.tip.number, len(self._pool), self._blocks_sealed, self._blocks_imported)

    # Transactions

    def decode(self, raw: bytes) -> Transaction:
        """A raw transaction with every check that needs no state. Raises BadInput."""
        return self._chain.decode(raw)

    async def submit(self, raw: bytes, simulate: bool = True) -> TransactionHash:
        """Check a raw transaction, journal it and take it into the pool; on disk when this returns.

        A transaction that is known is answered with its hash again. One that its contract would refuse as things stand
        is refused here, so that it costs neither a nonce nor a place in a block: where it enters the network, that is.
        One that another node has acknowledged is taken without that look (`simulate` False); refused here, its account
        could never send again through that node. Raises BadInput, NotAllowed, Conflict or Busy.
        """
        async with self._writing():
            sequence = self._pool.sequence + 1
            simulated_at = self._next_timestamp() if simulate else None
            transaction, is_new = await trio.to_thread.run_sync(self._accept, raw, sequence, simulated_at)
            if is_new:
                self._pool.add(transaction, sequence)
                self._pool_grew.set()
                self._pool_grew = trio.Event()
        return transaction.hash

    def _accept(self, raw: bytes, sequence: int, simulated_at: int | None) -> tuple[Transaction, bool]:
        chain = self._chain
        transaction = chain.decode(raw)
        if transaction.hash in self._pool or chain.store.place_of(transaction.hash) is not None:
            return transaction, False
        check_enrolled(transaction, chain.tip.accounts.enrolled.__contains__)
        state_nonce = chain.nonce(transaction.sender)
        self._pool.check(transaction, state_nonce)
        _check_sealable(transaction)
        if simulated_at is not None and transaction.nonce == state_nonce:
            outcome = chain.simulate(transaction, simulated_at)
            if outcome.reason is not None:
                raise NotAllowed(f"the contract refuses this transaction: {outcome.reason}")
        chain.store.append_journal(sequence, raw)
        return transaction, True

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        """The right to execute and write; tells `watch_disk` of a write that failed."""
        async with self._writer:
            try:
                yield
            finally:
                if self._chain.store.failure is not None:
                    self._disk_failed.set()

    async def watch_disk(self) -> None:
        """Raise what the disk refused, once a write has failed: nothing more is written then, so the node has to stop.

        LevelDB would go on, but behind a torn or doubtful record; see Store.
        """
        await self._disk_failed.wait()
        failure = self._chain.store.failure
        assert failure is not None
        raise failure

    def pending(self) -> list[bytes]:
        """Raw transactions of the pool, in the order they came."""
        return [transaction.raw for transaction in self._pool.in_order()]

    async def wait_pending(self, after: int) -> int:
        """The pool's sequence number, once it is above `after`."""
        while self._pool.sequence <= after:
            await self._pool_grew.wait()
        return self._pool.sequence

    async def wait_receipt(self, transaction_hash: TransactionHash) -> Receipt:
        """The receipt, once the transaction is in a final block. It may be one that arrives later; of one that waits in
        the pool here, Conflict is raised once it can no longer enter a block."""
        was_pending = False
        while (receipt := self.receipt(transaction_hash)) is None:
            is_pending = transaction_hash in self._pool
            if was_pending and not is_pending:
                raise Conflict(
                    f"transaction 0x{transaction_hash.hex()} can no longer enter a block: its account used the nonce "
                    "for another one, or is no longer enrolled"
                )
            was_pending = is_pending
            await self._moved.wait()
        return receipt

    # Blocks

    async def import_sealed(self, data: bytes) -> None:
        """Check, execute and write the next block; one that is ours already changes nothing. Raises BadPeer, or
        Conflict when the blocks before it are missing."""
        async with self._writing():
            final = await trio.to_thread.run_sync(self._import, data, self._clock())
            if final is not None:
                self._blocks_imported += 1
                self._adopt(final)

    def _import(self, data: bytes, now: float) -> _Final | None:
        found = self._chain.execute_sealed(data, now)
        return None if found is None else self._write(*found)

    def _write(self, executed: Executed, certificate: seal.Certificate) -> _Final:
        """Commit a final block, and with it forget what can no longer enter one."""
        tip = self._chain.tip_after(executed)
        nonces = {transaction.sender: transaction.nonce + 1 for transaction in executed.transactions}
        stale = self._pool.stale(nonces, tip.accounts.enrolled)
        self._chain.write(executed, certificate, tuple(stale))
        return _Final(tip, stale)

    def _adopt(self, final: _Final) -> None:
        self._chain.tip = final.tip
        self._pool.remove(final.stale)
        self._moved.set()
        self._moved = trio.Event()

    def _next_timestamp(self) -> int:
        return max(int(self._clock()), earliest_timestamp(self._chain.tip.header, self.config))

    async def seal(self, key: Key) -> None:
        """Make blocks of what is pending, for as long as it runs. `key` is the only authority's.

        Raises NotAllowed when it is no authority, and BadInput when there are others: their votes would be needed.
        """
        self._check_sole_authority(key)
        while True:
            while not len(self._pool):
                await self._pool_grew.wait()
            await self._wait_for_second()
            async with self._writing():
                self._check_sole_authority(key)
                final, is_sealed = await trio.to_thread.run_sync(self._seal_once, key, self._next_timestamp())
                self._blocks_sealed += is_sealed
                self._adopt(final)

    async def _wait_for_second(self) -> None:
        """Return once the clock has reached the first second that the next block may bear."""
        earliest = earliest_timestamp(self._chain.tip.header, self.config)
        while (wait_s := earliest - self._clock()) > 0:  # noqa: ASYNC110 - a clock sends no event
            await trio.sleep(min(wait_s, CLOCK_LOOK_S))

    def _seal_once(self, key: Key, timestamp: int) -> tuple[_Final, bool]:
        chain, pool = self._chain, self._pool
        executed, stuck = chain.propose(key, pool.in_turns(), timestamp)
        if stuck:
            # Cannot be while the pool's rules hold; should it be, one account's transactions must not end the chain.
            stale = pool.stale({}, set(pool.senders) - stuck)
            chain.store.forget_journal(tuple(stale))
            return _Final(chain.tip, stale), False
        assert executed is not None, "the first of the waiting transactions fits any block"
        return self._write(executed, seal.certify(self.genesis_hash, executed.header, [key])), True

    def _check_sole_authority(self, key: Key) -> None:
        authorities = self.authorities
        if key.address not in authorities:
            raise NotAllowed(f"0x{key.address.hex()} is no authority of this ledger: it cannot seal blocks")
        if len(authorities) > 1:
            raise BadInput(f"this ledger has {len(authorities)} authorities: this version seals with exactly one")


def _check_sealable(transaction: Transaction) -> None:
    """Raise NotAllowed for the one call that would end this ledger: a second authority, whose votes nobody collects."""
    if isinstance(decode_call(transaction.to, transaction.data), AddAuthority):
        raise NotAllowed("this version seals with exactly one authority: a second one would stop the ledger for good")
