"""The chain of final blocks over the store: genesis, import, proposal, simulation. Synchronous; one writer at a time.

Knows the rules and their order, no pool, no clock of its own and no concurrency: `ledger.ledger` puts those around it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.interrupt import EVMMissingData
from trie.exceptions import MissingTrieNode

from contracts.errors import BadInput, BadPeer, Conflict, NotAllowed
from contracts.types import Address
from genesis.block import GenesisBlock
from genesis.config import GenesisConfig
from ledger import accounts as accounts_fold
from ledger import block as blocks
from ledger import seal
from ledger.accounts import Accounts
from ledger.block import SealedBlock
from ledger.execution import Executed, Execution
from ledger.keys import Key
from ledger.record import BlockRecord, TransactionRecord
from ledger.state import Nodes
from ledger.store import Store
from ledger.transactions import Transaction, decode

ANCESTORS_MAX = 256
"""How far back BLOCKHASH sees."""

NOBODY = Address(bytes(20))
"""Proposes the block that a simulation imagines."""


@dataclass(frozen=True)
class Tip:
    """The newest final block and the accounts after it."""

    header: CancunBlockHeader
    accounts: Accounts

    @property
    def number(self) -> int:
        return int(self.header.block_number)

    @property
    def hash(self) -> bytes:
        return bytes(self.header.hash)


class Chain:
    """`tip` is set by whoever writes, after the write; see ledger.ledger for when."""

    def __init__(self, store: Store, config: GenesisConfig, genesis: GenesisBlock) -> None:
        """Open the chain in `store`, writing genesis into an empty one. Raises Conflict if it grew from another."""
        self.store = store
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
        self.tip = self._load_tip()

    def _write_genesis(self, genesis: GenesisBlock) -> None:
        block = SealedBlock(rlp.encode(genesis.header), (), seal.Certificate(genesis.hash, 0, ()))
        self.store.commit(block, genesis_record(genesis), (), genesis.state_nodes, ())

    def _load_tip(self) -> Tip:
        head = self.store.head()
        assert head is not None
        events = (event for record in self.store.records(0, head[0] + 1) for event in record.events())
        header = self.store.sealed(head[0]).header()
        if (header.block_number, header.hash) != head:
            raise self.store.corrupt(f"the newest block is not 0x{head[1].hex()}, which the head names")
        return Tip(header, accounts_fold.fold(Accounts(), events))

    def _ancestors(self) -> Iterator[bytes]:
        for number in range(self.tip.number, max(-1, self.tip.number - ANCESTORS_MAX), -1):
            yield self.store.record(number).hash

    @contextmanager
    def _execution(self, header: CancunBlockHeader) -> Iterator[Execution]:
        """Run transactions in a child of the tip. Raises Corrupt when the tip's state is not all there."""
        execution = Execution(header, self.chain_id, self._nodes.get, self._ancestors())
        try:
            yield execution
        except (EVMMissingData, MissingTrieNode) as error:
            raise self.store.corrupt(f"its state lacks a node: {error}") from error
        finally:
            execution.close()

    def decode(self, raw: bytes) -> Transaction:
        """Raises BadInput; see ledger.transactions."""
        return decode(raw, self.chain_id, self.tip.header.gas_limit)

    def nonce(self, account: Address) -> int:
        """The nonce of the account's next transaction as of the head."""
        with self._execution(self._child(self.tip.header.timestamp + 1, 0)) as execution:
            return execution.nonce(account)

    def _child(self, timestamp: int, iteration: int, proposer: Address = NOBODY) -> CancunBlockHeader:
        return blocks.child_header(self.tip.header, timestamp, proposer, seal.unsealed_extra_data(iteration))

    def simulate(self, transaction: Transaction, timestamp: int) -> TransactionRecord:
        """How `transaction` would end in a block made now; nothing is kept."""
        with self._execution(self._child(timestamp, 0)) as execution:
            return execution.apply(transaction)

    # Blocks made here

    def propose(
        self, key: Key, waiting: Iterable[Transaction], timestamp: int
    ) -> tuple[Executed | None, frozenset[Address]]:
        """Execute what fits of `waiting` into a sealed child of the head.

        Returns the executed block, None when nothing could enter, and the accounts whose next transaction can never
        be applied.
        """
        iteration = self._own_iteration(key.address)
        with self._execution(self._child(timestamp, iteration, key.address)) as execution:
            stuck = self._fill(execution, waiting)
            if not execution.count:
                return None, stuck
            executed = execution.finish()
        return replace(executed, header=seal.seal(executed.header, key)), stuck

    def _fill(self, execution: Execution, waiting: Iterable[Transaction]) -> frozenset[Address]:
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
            ):
                break  # what is left begins the next block, oldest first: nothing large waits for ever
            try:
                if sender not in self.tip.accounts.enrolled:
                    raise BadInput(f"0x{sender.hex()} is not enrolled")
                execution.apply(transaction)
            except BadInput:
                stuck.add(sender)
                continue
            taken[sender] += 1
        return frozenset(stuck)

    def _own_iteration(self, authority: Address) -> int:
        """The next iteration that `authority` leads."""
        authorities = tuple(self.tip.accounts.authorities)
        if authority not in authorities:
            raise NotAllowed(f"0x{authority.hex()} is no authority of this ledger: it cannot seal blocks")
        iteration = seal.iteration_of(self.tip.header) + 1
        while seal.leader(authorities, iteration) != authority:
            iteration += 1
        return iteration

    # What becomes final

    def tip_after(self, executed: Executed) -> Tip:
        """What the tip is once an executed child of it is final."""
        events = (event for record in executed.records for event in record.events)
        return Tip(executed.header, accounts_fold.fold(self.tip.accounts, events))

    def write(self, executed: Executed, certificate: seal.Certificate, journal_done: tuple[int, ...]) -> BlockRecord:
        """Put an executed child of the tip on disk with its certificate. The caller sets `tip` to `tip_after` then."""
        header = executed.header
        seal.check_certificate(certificate, self.genesis_hash, header, tuple(self.tip.accounts.authorities))
        sealed = SealedBlock(rlp.encode(header), tuple(t.raw for t in executed.transactions), certificate)
        record = BlockRecord(header.block_number, bytes(header.hash), header.timestamp, executed.records)
        self.store.commit(sealed, record, executed.receipts, executed.state_nodes, journal_done)
        self._nodes.keep(executed.state_nodes)
        return record

    # Blocks from others

    def execute_sealed(self, data: bytes, now: float) -> tuple[Executed, seal.Certificate] | None:
        """Check and execute the next block; None when it is ours already. Raises BadPeer for any block that is not the
        one final child of the head, and Conflict when blocks before it are missing."""
        sealed = blocks.decode(data)
        header = sealed.header()
        if header.block_number <= self.tip.number:
            self._check_known(header)
            return None
        if header.block_number > self.tip.number + 1:
            raise Conflict(
                f"block {header.block_number} is ahead, the head is {self.tip.number}: send the blocks before it first"
            )
        return self.execute_child(sealed, header, now), sealed.certificate

    def _check_known(self, header: CancunBlockHeader) -> None:
        ours = self.store.record(header.block_number).hash
        if ours != header.hash:
            raise BadPeer(f"block {header.block_number} is final as 0x{ours.hex()}, the peer has 0x{header.hash.hex()}")

    def execute_child(self, sealed: SealedBlock, header: CancunBlockHeader, now: float) -> Executed:
        """Every check on a child of the head, the cheap ones first, then its execution."""
        tip = self.tip
        try:
            blocks.check_header(sealed, header, tip.header, tip.accounts, self.config, self.genesis_hash, now)
            transactions = [self.decode(raw) for raw in sealed.transactions]
            blocks.check_transactions(transactions, tip.accounts)
            start = blocks.child_header(tip.header, header.timestamp, header.coinbase, header.extra_data)
            with self._execution(start) as execution:
                for transaction in transactions:
                    execution.apply(transaction)
                executed = execution.finish()
        except (BadInput, NotAllowed) as error:
            raise BadPeer(f"block {header.block_number}: {error}") from error
        if executed.header != header:
            raise BadPeer(f"block {header.block_number}: its roots, bloom or gas are not what executing it gives")
        return executed


def genesis_record(genesis: GenesisBlock) -> BlockRecord:
    """Block 0 as a record: the set-up calls' events under the genesis hash."""
    setup = TransactionRecord(genesis.hash, bytes(20), 0, bytes(20), 0, None, tuple(genesis.events))
    return BlockRecord(0, genesis.hash, genesis.header.timestamp, (setup,))
