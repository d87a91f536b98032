"""`aigen ledger verify`: the whole chain checked and executed again from genesis, beside what the store holds.

Every block goes through the very checks an import makes (seal, certificate, header, transactions), and py-evm alone
executes it. Then its stored record and receipts are compared with what execution gave, and at last head and accounts
with the store's own. Of blocks that a fast sync passed by, the store need not have the state, nor why a transaction
failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from contracts.errors import BadPeer, Conflict, Corrupt
from contracts.types import TransactionHash
from genesis.block import GenesisBlock, build
from genesis.config import GenesisConfig
from ledger.chain import Chain
from ledger.record import NOT_EXECUTED, BlockRecord
from ledger.store import WAY_OUT, Store

FAR_FUTURE = float(1 << 62)
"""The clock of an audit: blocks were checked against the clock when they came in."""


@dataclass(frozen=True)
class Audit:
    blocks: int
    transactions: int
    head_hash: bytes
    state_root: bytes


@contextmanager
def _scratch_chain(config: GenesisConfig, genesis: GenesisBlock, beside: Path) -> Iterator[Chain]:
    """An empty chain in a temporary folder: its state may be as large as the ledger's, so it is not kept in memory."""
    with TemporaryDirectory(prefix="audit-", dir=beside) as folder, Store(Path(folder) / "ledger") as store:
        yield Chain(store, config, genesis, shortcut=None)


def verify(path: Path, config: GenesisConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> Audit:
    """Re-execute the ledger in `path` from genesis. Raises Corrupt with the first block that differs.

    `progress` gets the number of blocks done and in all.
    """
    genesis = build(config)
    with Store(path) as store, _scratch_chain(config, genesis, path.parent) as again:
        kept = Chain(store, config, genesis)
        _compare(store, again.store, 0, genesis.state_nodes, is_state_here=True)
        transactions = 0
        for number in range(1, kept.tip.number + 1):
            transactions += _verify_block(store, again, number)
            progress(number, kept.tip.number)
        if again.tip != kept.tip:
            raise Corrupt(f"the ledger in {path}: executing every block ends in another head or other accounts")
        return Audit(kept.tip.number, transactions, kept.tip.hash, bytes(kept.tip.header.state_root))


def _verify_block(store: Store, again: Chain, number: int) -> int:
    """Execute block `number` after those before it, and compare; the number of its transactions."""
    try:
        tip, certificates = again.execute_sealed(deque([store.sealed_bytes(number)]), FAR_FUTURE)
    except (BadPeer, Conflict) as error:
        raise _differs(store, number, f"the block ({error})") from error
    if not certificates:
        raise _differs(store, number, "the block (it is one before it)")
    (executed,) = tip.unwritten
    again.tip = again.write(tip, certificates)
    _compare(store, again.store, number, executed.state_nodes, is_state_here=number >= store.state_start())
    return len(executed.transactions)


def _compare(
    kept: Store, again: Store, number: int, state_nodes: Mapping[bytes, bytes], *, is_state_here: bool
) -> None:
    """Hold everything stored of one block against what executing it stored in the scratch ledger."""
    record = again.record(number)
    if kept.sealed_bytes(number) != again.sealed_bytes(number):
        raise _differs(kept, number, "the block")
    if not _are_same(kept.record(number), record):
        raise _differs(kept, number, "the event record")
    if kept.receipts(number) != again.receipts(number):
        raise _differs(kept, number, "the receipts")
    if kept.number_of(record.hash) != number:
        raise _differs(kept, number, "the index of its hash")
    for transaction in record.transactions:
        if kept.place_of(TransactionHash(transaction.hash)) != again.place_of(TransactionHash(transaction.hash)):
            raise _differs(kept, number, f"the index of transaction 0x{transaction.hash.hex()}")
    for key, node in state_nodes.items():
        found = kept.state_node(key)
        if found != node and (found is not None or is_state_here):
            raise _differs(kept, number, f"state node 0x{key.hex()}")


def _are_same(kept: BlockRecord, executed: BlockRecord) -> bool:
    """Whether a record is what executing gave, but for reasons that came with no receipt."""
    if len(kept.transactions) != len(executed.transactions):
        return False
    transactions = tuple(
        msgspec.structs.replace(ours, reason=NOT_EXECUTED) if theirs.reason == NOT_EXECUTED and ours.reason else ours
        for ours, theirs in zip(executed.transactions, kept.transactions, strict=True)
    )
    return kept == msgspec.structs.replace(executed, transactions=transactions)


def _differs(store: Store, number: int, what: str) -> Corrupt:
    return Corrupt(f"the ledger in {store.path}, block {number}: {what} is not what executing gives: {WAY_OUT}")
