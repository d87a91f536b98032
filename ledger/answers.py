"""What the ledger answers: frozen values. Knows nothing of how they are found."""

from __future__ import annotations

from dataclasses import dataclass

from contracts.types import Address
from ledger.record import TransactionRecord


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
    blocks_decided: int
    """Final blocks that this node saw the votes for."""
    blocks_imported: int
    """Final blocks that came from a peer with their certificate."""
