"""The chain of final blocks over the store: genesis, import, proposal, simulation. Synchronous; one writer at a time.

Blocks that are not final yet are executed here too, one over the other, and live in memory: see Tip. Knows the rules
and their order, no pool, no clock of its own and no concurrency: `ledger.ledger` puts those around it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.interrupt import EVMMissingData
from trie.exceptions import MissingTrieNode

from contracts.errors import BadInput, BadPeer, Conflict, NotAllowed
from contracts.types import Address, TransactionHash
from genesis.block import GenesisBlock
from genesis.config import GenesisConfig
from ledger import block as blocks
from ledger import seal, shortcut
from ledger.accounts import Accounts, Standing
from ledger.block import SealedBlock
from ledger.execution import Executed, Execution
from ledger.keys import Key
from ledger.record import BlockRecord, TransactionRecord
from ledger.runs import HandOver
from ledger.snapshot import Snapshot
from ledger.state import Nodes
from ledger.store import EncodedBlock, Store
from ledger.transactions import Transaction, decode
from ledger.trie import ReadNode

ANCESTORS_MAX = 256
"""How far back BLOCKHASH sees."""

BATCH_MAX = 128
"""Blocks and transactions in one batch to disk: it waits for the disk once, and all of it is in memory until then."""

Shortcut = Callable[[CancunBlockHeader, Sequence[Transaction], ReadNode], Executed]
"""ledger.shortcut.execute, or what a test has instead."""

NOBODY = Address(bytes(20))
"""Proposes the block that a simulation imagines."""


@dataclass(frozen=True)
class Tip:
    """A block that another can be built on: the newest final one, or an undecided one over it."""

    header: CancunBlockHeader
    accounts: Accounts
    epoch: bytes
    """Names the time of the authorities after this block (see ledger.seal): the hash of the block that set them."""
    unwritten: tuple[Executed, ...] = ()
    """The blocks up to this one that are in no store yet, oldest first."""

    @property
    def number(self) -> int:
        return int(self.header.block_number)

    @property
    def hash(self) -> bytes:
        return bytes(self.header.hash)

    def after(self, executed: Executed) -> Tip:
        """The tip that an executed child of this one makes, as long as it is not written."""
        now = Standing(self.accounts, self.epoch).after(bytes(executed.header.hash), executed.events())
        return Tip(executed.header, now.accounts, now.epoch, (*self.unwritten, executed))

    def over(self, written: bytes) -> Tip:
        """This tip once the block of this hash and those before it are written; unchanged when it is not over it."""
        hashes = [executed.header.hash for executed in self.unwritten]
        return replace(self, unwritten=self.unwritten[hashes.index(written) + 1 :]) if written in hashes else self

    def transaction_hashes(self) -> frozenset[TransactionHash]:
        """Of the blocks that are not written."""
        return frozenset(transaction.hash for executed in self.unwritten for transaction in executed.transactions)


class Chain:
    """`tip` is set by whoever writes, after the write; see ledger.ledger for when."""

    def __init__(
        self,
        store: Store,
        config: GenesisConfig,
        genesis: GenesisBlock,
        engine: type[Execution] = Execution,
        snapshot: Snapshot | None = None,
        shortcut: Shortcut | None = shortcut.execute,
    ) -> None:
        """Open the chain in `store`, writing genesis into an empty one. Raises Conflict if it grew from another.

        The accounts are folded from `snapshot` on, one of this very chain, or else from genesis. Without a `shortcut`
        the engine executes the blocks from others, too.
        """
        self.store = store
        self._engine = engine
        self._shortcut = shortcut
        self.config = config
        self.chain_id = config.network.chain_id
        self.genesis_hash = genesis.hash
        if store.head() is None:
            self._write_genesis(genesis)
        elif store.record(0).hash != genesis.hash:
            raise Conflict(
                f"the ledger in {store.path} grew from genesis 0x{store.record(0).hash.hex()}, "
                f"the configured one is 0x{genesis.hash.hex()}: use its genesis file, or another --data-dir"
            )
        self._nodes = Nodes(store.state_node)
        self.tip = self._load_tip(snapshot)

    def _write_genesis(self, genesis: GenesisBlock) -> None:
        certificate = seal.Certificate(genesis.hash, genesis.hash, 0, ())
        block = SealedBlock(rlp.encode(genesis.header), (), certificate)
        self.store.commit([(block, genesis_record(genesis), rlp.encode([]))], genesis.state_nodes, ())

    def _load_tip(self, snapshot: Snapshot | None) -> Tip:
        head = self.store.head()
        assert head is not None
        standing, start = (Standing(), 0) if snapshot is None else (snapshot.standing, snapshot.number + 1)
        self.store.check_records(start)
        return self.load(head, standing, start)

    def load(self, newest: tuple[int, bytes], standing: Standing, start: int) -> Tip:
        """The tip that the block of this number and hash makes. `standing` is the one before block `start`. Raises
        Corrupt."""
        header = self.store.sealed(newest[0]).header()
        if (header.block_number, header.hash) != newest:
            raise self.store.corrupt(f"block {newest[0]} is not 0x{newest[1].hex()}, which is named as the newest")
        for record in self.store.records(start, newest[0] + 1):
            standing = standing.after(record.hash, record.events())
        return Tip(header, standing.accounts, standing.epoch)

    def _ancestors(self, parent: Tip) -> Iterator[bytes]:
        yield from (bytes(executed.header.hash) for executed in reversed(parent.unwritten))
        newest = parent.number - len(parent.unwritten)
        for number in range(newest, max(-1, parent.number - ANCESTORS_MAX), -1):
            yield self.store.record(number).hash

    def _reader(self, parent: Tip) -> ReadNode:
        """Reads state nodes as of `parent`."""
        if not parent.unwritten:
            return self._nodes.get
        newer: dict[bytes, bytes] = {}
        for executed in parent.unwritten:
            newer |= executed.state_nodes

        def read(key: bytes) -> bytes | None:
            node = newer.get(key)
            return self._nodes.get(key) if node is None else node

        return read

    @contextmanager
    def _execution(self, header: CancunBlockHeader, parent: Tip) -> Iterator[Execution]:
        """Run transactions in a child of `parent`. Raises Corrupt when its state is not all there."""
        execution = self._engine(header, self.chain_id, self._reader(parent), self._ancestors(parent))
        try:
            yield execution
        except (EVMMissingData, MissingTrieNode) as error:
            raise self.store.corrupt(f"its state lacks a node: {error}") from error
        finally:
            execution.close()

    def decode(self, raw: bytes) -> Transaction:
        """Raises BadInput; see ledger.transactions."""
        return decode(raw, self.chain_id, self.tip.header.gas_limit)

    def nonce(self, account: Address, at: Tip | None = None) -> int:
        """The nonce of the account's next transaction as of a final block, by default the head."""
        at = at or self.tip
        with self._execution(self._imagined(at.header.timestamp + 1, at), at) as execution:
            return execution.nonce(account)

    @staticmethod
    def _imagined(timestamp: int, parent: Tip) -> CancunBlockHeader:
        """The header of a block that nobody will seal."""
        return blocks.child_header(parent.header, timestamp, NOBODY, seal.unsealed_extra_data(parent.epoch, 0))

    def simulate(self, transaction: Transaction, timestamp: int) -> TransactionRecord:
        """How `transaction` would end in a block made now; nothing is kept."""
        with self._execution(self._imagined(timestamp, self.tip), self.tip) as execution:
            return execution.apply(transaction)

    # Blocks made here

    def propose(
        self,
        key: Key,
        waiting: Iterable[Transaction],
        timestamp: int,
        *,
        iteration: int | None = None,
        parent: Tip | None = None,
        is_full: Callable[[], bool] = lambda: False,
    ) -> tuple[Executed, frozenset[Address]]:
        """Execute what fits of `waiting` into a sealed child of `parent`, by default of the head; in the next iteration
        that `key` leads unless another is named. It ends early once `is_full` says so.

        Returns the executed block, and the accounts whose next transaction can never be applied.
        """
        parent = parent or self.tip
        epoch, authorities = self.tip.epoch, tuple(self.tip.accounts.authorities)
        if iteration is None:
            iteration = seal.next_led(authorities, key.address, seal.iteration_of(parent.header))
        extra_data = seal.unsealed_extra_data(epoch, iteration)
        header = blocks.child_header(parent.header, timestamp, key.address, extra_data)
        with self._execution(header, parent) as execution:
            stuck = self._fill(execution, waiting, parent.accounts, is_full)
            executed = execution.finish()
        return replace(executed, header=seal.seal(executed.header, key)), stuck

    @staticmethod
    def _fill(
        execution: Execution, waiting: Iterable[Transaction], accounts: Accounts, is_full: Callable[[], bool]
    ) -> frozenset[Address]:
        """Apply what fits into one block; the accounts whose next transaction can never be applied."""
        taken: Counter[Address] = Counter()
        stuck: set[Address] = set()
        size_bytes = 0
        for transaction in waiting:
            sender = transaction.sender
            if sender in stuck or taken[sender] == blocks.BLOCK_SENDER_TRANSACTIONS_MAX:
                continue
            size_bytes += len(transaction.raw)
            if (
                size_bytes > blocks.PROPOSED_TRANSACTIONS_BYTES_MAX
                or execution.count == blocks.BLOCK_TRANSACTIONS_MAX
                or transaction.gas > execution.gas_left()
                or (execution.count and is_full())
            ):
                break  # what is left begins the next block, oldest first: nothing large waits for ever
            try:
                if sender not in accounts.enrolled:
                    raise BadInput(f"0x{sender.hex()} is not enrolled")
                execution.apply(transaction)
            except BadInput:
                stuck.add(sender)
                continue
            taken[sender] += 1
        return frozenset(stuck)

    # What becomes final

    def write(
        self,
        final: Tip,
        certificates: Sequence[seal.Certificate],
        journal_done: tuple[int, ...] = (),
        ballots_done: tuple[int, ...] = (),
    ) -> Tip:
        """Put what is unwritten of `final` on disk, each block with its certificate, all or none. Returns the tip that
        the caller sets `tip` to then."""
        found: list[EncodedBlock] = []
        nodes: dict[bytes, bytes] = {}
        for executed, certificate in zip(final.unwritten, certificates, strict=True):
            header = executed.header
            sealed = SealedBlock(rlp.encode(header), tuple(t.raw for t in executed.transactions), certificate)
            record = BlockRecord(header.block_number, bytes(header.hash), header.timestamp, executed.records)
            found.append((sealed, record, rlp.encode([receipt.encode() for receipt in executed.receipts])))
            nodes |= executed.state_nodes
        self.store.commit(found, nodes, journal_done, ballots_done)
        self._nodes.keep(nodes)
        return final.over(final.hash)

    # Blocks from others

    def execute_sealed(
        self, waiting: deque[bytes], now: float, undecided: Mapping[bytes, Executed] = MappingProxyType({})
    ) -> tuple[Tip, list[seal.Certificate]]:
        """Take the blocks that follow on the head out of `waiting`, as many as one batch holds; check and execute them.
        Those that are here already are passed over.

        Returns the tip that they make and their certificates. What is in `undecided`, by hash, was executed as a child
        of the head before. Raises BadPeer for any block that is not the one final child of the block before, and
        Conflict when blocks before it are missing.
        """
        tip, certificates, weight = self.tip, list[seal.Certificate](), 0
        while waiting and weight < BATCH_MAX:
            sealed = blocks.decode(waiting.popleft())
            header = sealed.header()
            if header.block_number <= self.tip.number:
                self.check_known(header)
                continue
            if header.block_number != tip.number + 1:
                raise Conflict(
                    f"block {header.block_number} does not follow on block {tip.number}: send the blocks in their order"
                )
            check_final(sealed, header, tip, self.config, now)
            known = undecided.get(bytes(header.hash))
            tip = tip.after(known or self._execute(header, sealed.transactions, tip, is_final=True))
            certificates.append(sealed.certificate)
            weight += 1 + len(sealed.transactions)
        return tip, certificates

    def check_known(self, header: CancunBlockHeader) -> None:
        """Raise BadPeer unless the block with this header's number, which is here, is this very block."""
        ours = self.store.record(header.block_number).hash
        if ours != header.hash:
            raise BadPeer(f"block {header.block_number} is final as 0x{ours.hex()}, the peer has 0x{header.hash.hex()}")

    def execute_proposal(self, header: CancunBlockHeader, raws: Sequence[bytes], now: float, parent: Tip) -> Executed:
        """Check and execute a child of `parent` that nobody has voted on yet. Raises BadPeer, or Busy when it is of a
        time that our clock has not reached."""
        with blaming(header):
            blocks.check_header(header, parent.header, self.tip.epoch, self.tip.accounts, self.config, now)
        return self._execute(header, raws, parent)

    def _execute(
        self, header: CancunBlockHeader, raws: Sequence[bytes], parent: Tip, *, is_final: bool = False
    ) -> Executed:
        """Every check on a block whose header may be right, the cheap ones first, then its execution."""
        with blaming(header):
            transactions = [self.decode(raw) for raw in raws]
            blocks.check_transactions(transactions, parent.accounts)
            start = blocks.child_header(parent.header, header.timestamp, header.coinbase, header.extra_data)
            if is_final and (executed := self._short_cut(start, transactions, parent, header)) is not None:
                return executed
            with self._execution(start, parent) as execution:
                for transaction in transactions:
                    execution.apply(transaction)
                executed = execution.finish()
        if executed.header != header:
            raise BadPeer(f"block {header.block_number}: its roots, bloom or gas are not what executing it gives")
        return executed

    def _short_cut(
        self, start: CancunBlockHeader, transactions: Sequence[Transaction], parent: Tip, header: CancunBlockHeader
    ) -> Executed | None:
        """A final block executed the short way, if that gives the header that two thirds of the authorities signed."""
        if self._shortcut is None:
            return None
        try:
            executed = self._shortcut(start, transactions, self._reader(parent))
        except HandOver:
            return None
        except MissingTrieNode as error:
            raise self.store.corrupt(f"its state lacks a node: {error}") from error
        return executed if executed.header == header else None


@contextmanager
def blaming(header: CancunBlockHeader) -> Iterator[None]:
    """What is wrong with a block's parts is its sender's fault: BadPeer."""
    try:
        yield
    except (BadInput, NotAllowed) as error:
        raise BadPeer(f"block {header.block_number}: {error}") from error


def check_final(sealed: SealedBlock, header: CancunBlockHeader, parent: Tip, config: GenesisConfig, now: float) -> None:
    """Raise BadPeer unless header and certificate are a final child's of `parent`, Busy when its time is to come."""
    with blaming(header):
        blocks.check_header(header, parent.header, parent.epoch, parent.accounts, config, now)
        seal.check_certificate(sealed.certificate, header, parent.epoch, tuple(parent.accounts.authorities))


def genesis_record(genesis: GenesisBlock) -> BlockRecord:
    """Block 0 as a record: the set-up calls' events under the genesis hash."""
    setup = TransactionRecord(genesis.hash, bytes(20), 0, bytes(20), 0, None, tuple(genesis.events))
    return BlockRecord(0, genesis.hash, genesis.header.timestamp, (setup,))
