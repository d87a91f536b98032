"""`aigen ledger verify`: the whole chain checked and executed again from genesis, beside what the store holds.

Every block goes through the very checks an import makes (seal, certificate, header, transactions, execution); then its
stored record and receipts are compared with what execution gave, and at last head and accounts with the store's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from contracts.errors import BadPeer, Corrupt
from genesis.block import build
from genesis.config import GenesisConfig
from ledger.chain import Chain
from ledger.store import Store

FAR_FUTURE = float(1 << 62)
"""The clock of an audit: blocks were checked against the clock when they came in."""


@dataclass(frozen=True)
class Audit:
    blocks: int
    transactions: int
    head_hash: bytes
    state_root: bytes


@contextmanager
def _scratch_chain(config: GenesisConfig, beside: Path) -> Iterator[Chain]:
    """An empty chain in a temporary folder: its state may be as large as the ledger's, so it is not kept in memory."""
    with TemporaryDirectory(prefix="audit-", dir=beside) as folder, Store(Path(folder) / "ledger") as store:
        yield Chain(store, config, build(config))


def verify(path: Path, config: GenesisConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> Audit:
    """Re-execute the ledger in `path` from genesis. Raises Corrupt with the first block that differs.

    `progress` gets the number of blocks done and in all.
    """
    with Store(path) as store, _scratch_chain(config, path.parent) as again:
        kept = Chain(store, config, build(config))
        transactions = 0
        for number in range(1, kept.tip.number + 1):
            transactions += _verify_block(store, again, number)
            progress(number, kept.tip.number)
        if again.tip != kept.tip:
            raise Corrupt(f"{path}: executing every block ends in other accounts than the ledger's")
        return Audit(kept.tip.number, transactions, kept.tip.hash, bytes(kept.tip.header.state_root))


def _verify_block(store: Store, again: Chain, number: int) -> int:
    try:
        found = again.execute_sealed(store.sealed_bytes(number), FAR_FUTURE)
    except BadPeer as error:
        raise Corrupt(f"{store.path}: {error}") from error
    assert found is not None
    executed, certificate = found
    record = again.finalise(executed, certificate, ())
    if record != store.record(number):
        raise Corrupt(f"{store.path}: the event record of block {number} is not what executing the block gives")
    if [receipt.encode() for receipt in executed.receipts] != store.receipts(number):
        raise Corrupt(f"{store.path}: the receipts of block {number} are not what executing the block gives")
    if any(store.state_node(key) != node for key, node in executed.state_nodes.items()):
        raise Corrupt(f"{store.path}: state nodes of block {number} are missing or damaged")
    return len(record.transactions)
