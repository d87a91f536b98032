"""A chain taken in without executing it: every block with its receipts, then the state after the newest of them.

Every block is checked as for an import: seal, certificate, header, senders. What execution would have told, two thirds
of the authorities are believed for: transactions and receipts have the roots in the header that they signed, and the
state is every node that is named below its state root. Events come out of the receipts. The head stays at genesis until
all of it is on disk, so that nobody sees half a chain; what is there is gone on from after a crash. Synchronous; knows
no peers.
"""

from __future__ import annotations

from collections.abc import Sequence

import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth_hash.auto import keccak

from contracts.errors import BadInput, BadPeer, Conflict
from contracts.events import decode_log
from ledger import block as blocks
from ledger import witness
from ledger.accounts import Standing
from ledger.block import SealedBlock
from ledger.chain import Chain, Tip, blaming, check_final
from ledger.execution import record_of
from ledger.receipts import TransactionReceipt, decode_receipts
from ledger.record import NOT_EXECUTED, BlockRecord, TransactionRecord
from ledger.store import EncodedBlock
from ledger.transactions import Transaction, decode
from ledger.trie import list_root
from ledger.walk import StateWalk
from ledger.witness import Witness

Parcel = tuple[bytes, bytes]
"""An encoded sealed block, and its receipts in an RLP list."""


class Staging:
    """`stage` blocks to the newest; then `wanted` and `give` until `is_whole`; then `end`."""

    def __init__(self, chain: Chain) -> None:
        """Go on from what is staged already. Raises Corrupt."""
        self._chain = chain
        self._store = chain.store
        staged = chain.store.staged()
        self.tip = chain.tip if staged is None else chain.load(staged, Standing(), 0)
        """The newest staged block, or genesis."""
        self._walk: StateWalk | None = None
        self._epochs: list[int] = []

    # Blocks

    def stage(self, parcels: Sequence[Parcel], now: float) -> None:
        """Check blocks and write those that are new, all or none. Raises BadPeer or Busy as an import does, and
        Conflict when blocks before them are missing."""
        found: list[EncodedBlock] = []
        tip = self.tip
        for data, receipts_rlp in parcels:
            sealed = blocks.decode(data)
            header = sealed.header()
            if header.block_number <= self.tip.number:
                self._chain.check_known(header)
                continue
            if header.block_number != tip.number + 1:
                raise Conflict(f"block {header.block_number} came after block {tip.number}")
            check_final(sealed, header, tip, self._chain.config, now)
            with blaming(header):
                record = self._record(sealed, header, receipts_rlp, tip)
            found.append((sealed, record, receipts_rlp))
            standing = Standing(tip.accounts, tip.epoch).after(record.hash, record.events())
            tip = Tip(header, standing.accounts, standing.epoch)
        if found:
            self._store.stage(found)
            self.tip, self._walk = tip, None

    def _record(self, sealed: SealedBlock, header: CancunBlockHeader, receipts_rlp: bytes, parent: Tip) -> BlockRecord:
        """What the block did, as its receipts say. Raises BadPeer or BadInput unless the header names just these
        transactions and receipts."""
        number = int(header.block_number)
        if list_root(sealed.transactions) != header.transaction_root:
            raise BadPeer(f"block {number}: its transactions have another root than its header says")
        encoded = _decode_list(receipts_rlp, number)
        if list_root(encoded) != header.receipt_root:
            raise BadPeer(f"block {number}: its receipts have another root than its header says")
        transactions = [decode(raw, self._chain.chain_id, parent.header.gas_limit) for raw in sealed.transactions]
        blocks.check_transactions(transactions, parent.accounts)
        receipts = decode_receipts(encoded)
        if len(receipts) != len(transactions):
            raise BadPeer(f"block {number}: {len(receipts)} receipts of {len(transactions)} transactions")
        records = tuple(map(_transaction_record, transactions, receipts))
        return BlockRecord(number, bytes(header.hash), int(header.timestamp), records)

    # The state after the newest

    @property
    def is_whole(self) -> bool:
        """Whether every node of the newest staged block's state is here."""
        return self._walk is not None and not self._epochs and self._walk.is_done

    @property
    def nodes_seen(self) -> int:
        """State nodes that were found or came so far."""
        return 0 if self._walk is None else self._walk.nodes_seen

    def wanted(self, count_max: int) -> list[bytes]:
        """Hashes of state nodes to ask a peer for. Empty: all others are asked for, or all are here.

        First those that name the authorities of each epoch: whoever proves something to an outsider leads him through
        these (ledger.prover), however old they are.
        """
        if self._walk is None:
            self._walk = StateWalk(self._store.state_node, bytes(self.tip.header.state_root))
            self._epochs = self._epochs_begun()
        while self._epochs:
            if (missing := self._lacks_authorities(self._epochs[-1])) is not None:
                return [missing]
            self._epochs.pop()
        return self._walk.wanted(count_max)

    def give(self, asked: Sequence[bytes], nodes: Sequence[bytes]) -> None:
        """Write what a peer answered to `asked`, the first of them at least; newer blocks may have come since. Raises
        BadPeer for anything else."""
        found = {bytes(keccak(node)): node for node in nodes}
        if list(found) != list(asked[: len(nodes)]):
            raise BadPeer(f"asked for {len(asked)} state nodes it sent {len(nodes)} others")
        self._store.write_nodes(found)
        if self._walk is not None:
            self._walk.give(found)
        self.put_back(asked)

    def put_back(self, asked: Sequence[bytes]) -> None:
        """Somebody else has to be asked for these."""
        if self._walk is not None:
            self._walk.put_back(asked)

    def _epochs_begun(self) -> list[int]:
        """The blocks before the newest that began the epochs after the first."""
        found: list[int] = []
        number = self.tip.number
        while number and (epoch := self._store.sealed(number).certificate.epoch) != self._chain.genesis_hash:
            begun = self._store.number_of(epoch)
            assert begun is not None, "every epoch began with a final block"
            found.append(begun)
            number = begun
        return found

    def _lacks_authorities(self, number: int) -> bytes | None:
        """The first node on the way to the authorities after a block that is not here."""
        missing: list[bytes] = []

        def read(key: bytes) -> bytes | None:
            node = self._store.state_node(key)
            if node is None:
                missing.append(key)
            return node

        try:
            witness.authorities(Witness(read), bytes(self._store.sealed(number).header().state_root))
        except BadInput:
            if not missing:
                raise
        return missing[0] if missing else None

    def end(self, journal_done: tuple[int, ...], ballots_done: tuple[int, ...]) -> None:
        """Make the newest staged block the head."""
        assert self.is_whole
        self._store.end_staging(journal_done, ballots_done)


def _decode_list(receipts_rlp: bytes, number: int) -> list[bytes]:
    try:
        found = rlp.decode(receipts_rlp)
    except (rlp.exceptions.RLPException, RecursionError) as error:
        raise BadPeer(f"block {number}: its receipts are no list: {error}") from error
    if not isinstance(found, list) or not all(isinstance(item, bytes) for item in found):
        raise BadPeer(f"block {number}: its receipts are no list of byte strings")
    return found


def _transaction_record(transaction: Transaction, receipt: TransactionReceipt) -> TransactionRecord:
    decoded = (decode_log(log.address, log.topics, log.data) for log in receipt.logs)
    events = tuple(event for event in decoded if event is not None)
    gas_used = receipt.gas_used_after - receipt.gas_used_before
    return record_of(transaction, gas_used, None if receipt.succeeded else NOT_EXECUTED, events)
