"""The ledger as the node sees it: submit transactions, import blocks, wait for the head, read what is final.

Whatever executes or syncs to disk runs in a worker thread, one at a time, under `_writer`. The head and the pool change
on trio's thread only, once the thread has written: between two awaits nothing moves under a reader, and a cancelled
caller loses nothing, because the thread is waited for and no await lies between its end and the change.
Reads are answered at once; those of final blocks may also be made from a thread. Knows no sockets: `node.network` moves
the bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from contracts.errors import BadInput, Conflict, NotAllowed, NotFound
from contracts.types import Address, TransactionHash
from genesis.block import build
from genesis.config import GenesisConfig
from ledger import seal, snapshot
from ledger.answers import Account, Head, LedgerStatistics, Receipt
from ledger.block import earliest_timestamp
from ledger.chain import Chain, Tip
from ledger.execution import Executed
from ledger.fastsync import FastSync
from ledger.history import History
from ledger.keys import Key
from ledger.pool import Pool
from ledger.proof import Proof
from ledger.prover import Shows, prove
from ledger.record import BlockRecord
from ledger.simplex import Ballot
from ledger.staging import Staging
from ledger.store import Store
from ledger.timing import Clock, in_thread
from ledger.transactions import Transaction, check_enrolled
from ledger.votes import Evidence


@dataclass(frozen=True)
class _Final:
    """What a worker thread wrote and trio's thread has yet to adopt."""

    tip: Tip
    stale: dict[int, Transaction]
    ballots_done: tuple[int, ...]


class Ledger:
    """Use `Ledger.open(...)`; close when done. `opened_from`: the snapshot up to which no block was folded again."""

    def __init__(self, chain: Chain, clock: Clock, opened_from: snapshot.Snapshot | None = None) -> None:
        self._chain = chain
        self.opened_from = opened_from
        self.path = chain.store.path
        self._clock = clock
        self._writer = trio.Lock()
        self._moved = trio.Event()
        self._pool_grew = trio.Event()
        self._disk_failed = trio.Event()
        self._pool = Pool()
        self.ballots = chain.store.ballots()
        """What this node's authority has said in the iterations after the head's, as it is on disk."""
        self.evidence = chain.store.evidence()
        """The first proof of each authority that was seen to lie."""
        self._undecided: dict[bytes, Executed] = {}
        self._blocks_decided = self._blocks_imported = 0
        self.history = History(chain, self._next_timestamp)
        self.fast_sync = FastSync(chain, clock, self._writing, self._end_staging)
        self._recover_journal()

    @staticmethod
    def open(path: Path, config: GenesisConfig, clock: Clock = time.time) -> Ledger:
        """Open or create the ledger in the folder `path`. Raises Conflict or Corrupt; see ledger.store."""
        store = Store(path)
        try:
            genesis = build(config)
            found = snapshot.load(store, genesis.hash)
            return Ledger(Chain(store, config, genesis, snapshot=found), clock, found)
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

    def number_of(self, block_hash: bytes) -> int:
        """Raises NotFound for a hash that is no final block's."""
        number = self._chain.store.number_of(block_hash)
        if number is None or number > self._chain.tip.number:
            raise NotFound(f"no final block 0x{block_hash.hex()}")
        return number

    def receipt(self, transaction_hash: TransactionHash) -> Receipt | None:
        """None while the transaction is not in a final block."""
        place = self._chain.store.place_of(transaction_hash)
        if place is None or place[0] > self._chain.tip.number:
            return None
        record = self._chain.store.record(place[0])
        return Receipt(record.transactions[place[1]], place[1], record.number, record.hash, record.timestamp)

    def prove(self, shows: Shows) -> Proof:
        """A proof of the newest event that `shows` picks; see ledger.prover."""
        return prove(self._chain.store, self._chain.tip.number, shows)

    def account(self, address: Address) -> Account:
        accounts = self._chain.tip.accounts
        roles = (address in accounts.enrolled, address in accounts.admins, address in accounts.authorities)
        return Account(address, self._pool.next_nonce(address, self._chain.nonce(address)), *roles)

    def is_pending(self, transaction_hash: TransactionHash) -> bool:
        return transaction_hash in self._pool

    def pending_transaction(self, transaction_hash: TransactionHash) -> Transaction | None:
        return self._pool.find(transaction_hash)

    def statistics(self) -> LedgerStatistics:
        return LedgerStatistics(self._chain.tip.number, len(self._pool), self._blocks_decided, self._blocks_imported)

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
            transaction, is_new = await in_thread(self._accept, raw, sequence, simulated_at)
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

    async def import_blocks(self, sealed: Iterable[bytes]) -> None:
        """Check, execute and write the next blocks, many in a batch; those that are here already change nothing. Raises
        BadPeer, or Conflict when blocks before one are missing; nothing is kept then of that block's batch."""
        waiting = deque(sealed)
        while waiting:
            async with self._writing():
                final = await in_thread(self._import, waiting, self._clock())
                if final is not None:
                    self._blocks_imported += final.tip.number - self._chain.tip.number
                    self._adopt(final)

    def _import(self, waiting: deque[bytes], now: float) -> _Final | None:
        tip, certificates = self._chain.execute_sealed(waiting, now, self._undecided)
        return self._write(tip, certificates) if certificates else None

    def _write(self, tip: Tip, certificates: Sequence[seal.Certificate]) -> _Final:
        """Commit final blocks, and with them forget what can no longer enter one, and votes that no longer matter."""
        sent = (transaction for executed in tip.unwritten for transaction in executed.transactions)
        final = self._final(tip, {transaction.sender: transaction.nonce + 1 for transaction in sent})
        written = self._chain.write(tip, certificates, tuple(final.stale), final.ballots_done)
        return replace(final, tip=written)

    def _final(self, tip: Tip, nonces: Mapping[Address, int]) -> _Final:
        """What `tip` makes stale as the head; `nonces` are the next ones of the accounts that sent."""
        is_new_epoch, iteration = tip.epoch != self._chain.tip.epoch, seal.iteration_of(tip.header)
        ballots_done = tuple(n for n in self.ballots if is_new_epoch or n <= iteration)
        return _Final(tip, self._pool.stale(nonces, tip.accounts.enrolled), ballots_done)

    def _end_staging(self, staging: Staging) -> Callable[[], None]:
        """Make the newest staged block the head on disk; what is returned makes it so here, on trio's thread."""
        tip = staging.tip
        final = self._final(tip, {sender: self._chain.nonce(sender, tip) for sender in self._pool.senders})
        staging.end(tuple(final.stale), final.ballots_done)
        return partial(self._adopt, final)

    def _adopt(self, final: _Final) -> None:
        self._chain.tip = final.tip
        self._pool.remove(final.stale)
        for iteration in final.ballots_done:
            del self.ballots[iteration]
        self._moved.set()
        self._moved = trio.Event()

    def _next_timestamp(self) -> int:
        return max(int(self._clock()), earliest_timestamp(self._chain.tip.header, self.config))

    # What deciding on blocks needs; for ledger.consensus

    @property
    def tip(self) -> Tip:
        """The head, as a block to build on."""
        return self._chain.tip

    def seconds_until_child(self, parent: Tip) -> float:
        """How long until the first second that a child of `parent` may bear; not positive once it is there."""
        return earliest_timestamp(parent.header, self.config) - self._clock()

    def has_waiting(self, parent: Tip) -> bool:
        """Whether there is a transaction to put into a child of `parent`."""
        return len(self._pool) > len(parent.transaction_hashes() & self._pool.hashes)

    async def propose(
        self, key: Key, iteration: int, parent: Tip, is_full: Callable[[], bool], is_empty: bool
    ) -> Executed | None:
        """A sealed child of `parent`, of what waits unless it is to be empty; None when nothing that waits may enter
        any block, which is forgotten then."""
        async with self._writing():
            timestamp = max(int(self._clock()), earliest_timestamp(parent.header, self.config))
            final, executed = await in_thread(self._propose, key, iteration, parent, timestamp, is_full, is_empty)
            if final is not None:
                self._adopt(final)
        return executed

    def _propose(
        self, key: Key, iteration: int, parent: Tip, timestamp: int, is_full: Callable[[], bool], is_empty: bool
    ) -> tuple[_Final | None, Executed | None]:
        done = parent.transaction_hashes()
        waiting = [] if is_empty else [t for t in self._pool.in_turns() if t.hash not in done]
        executed, stuck = self._chain.propose(
            key, waiting, timestamp, iteration=iteration, parent=parent, is_full=is_full
        )
        if not stuck or parent.unwritten:
            return None, executed
        # Cannot be while the pool's rules hold; should it be, one account's transactions must not end the chain.
        stale = self._pool.stale({}, set(self._pool.senders) - stuck)
        self._chain.store.forget_journal(tuple(stale))
        return _Final(self._chain.tip, stale, ()), executed if executed.transactions else None

    async def execute(self, header: Any, raws: Sequence[bytes], parent: Tip) -> Executed:
        """Check and execute a proposal. Raises BadPeer, or Busy when it is of a time our clock has not reached."""
        async with self._writing():
            return await in_thread(self._chain.execute_proposal, header, raws, self._clock(), parent)

    def set_undecided(self, tips: Iterable[Tip]) -> None:
        """The children of the head that were executed, so that an import need not do it again."""
        self._undecided = {tip.hash: tip.unwritten[0] for tip in tips if len(tip.unwritten) == 1}

    async def cast(self, ballots: Mapping[int, Ballot], epoch: bytes) -> bool:
        """Journal what this node's authority says; on disk when this returns. False, and nothing is written, when the
        epoch is over: in the next one it would bind this authority to what it never said there."""
        async with self._writing():
            if epoch != self._chain.tip.epoch:
                return False
            await in_thread(self._chain.store.write_ballots, ballots)
            self.ballots |= ballots
            return True

    async def keep_evidence(self, liar: Address, evidence: Evidence) -> None:
        """Keep the first proof of each liar."""
        async with self._writing():
            if liar not in self.evidence:
                await in_thread(self._chain.store.write_evidence, liar, evidence)
                self.evidence[liar] = evidence

    async def finalise(self, decided: Tip, certificates: Sequence[seal.Certificate]) -> None:
        """Write what is unwritten of a tip that became final; what was imported meanwhile changes nothing."""
        async with self._writing():
            left = decided
            for header in (executed.header for executed in decided.unwritten):
                if (number := header.block_number) <= self._chain.tip.number:
                    assert self._chain.store.record(number).hash == header.hash, f"two final blocks {number}"
                    left = left.over(header.hash)
            if left.unwritten:
                self._adopt(await in_thread(self._finalise, left, certificates[-len(left.unwritten) :]))
                self._blocks_decided += len(left.unwritten)

    def _finalise(self, decided: Tip, certificates: Sequence[seal.Certificate]) -> _Final:
        epoch, authorities = self._chain.tip.epoch, tuple(self._chain.tip.accounts.authorities)
        for executed, certificate in zip(decided.unwritten, certificates, strict=True):
            seal.check_certificate(certificate, executed.header, epoch, authorities)
        return self._write(decided, certificates)
