"""What a final block did, as it is kept and replayed: its transactions, how they ended, and their decoded events.

Replaying projections reads these and nothing else; receipts and re-execution are for proofs, sync and audit.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from contracts.events import ContractEvent

NOT_EXECUTED = "it failed; why, only nodes know that executed it"
"""The reason of a failed transaction that came with its receipt: receipts tell that it failed, not why."""


class TransactionRecord(msgspec.Struct, frozen=True, array_like=True):
    """How one transaction ended. `reason` is None when it succeeded, else why the contract refused, or NOT_EXECUTED."""

    hash: bytes
    sender: bytes
    nonce: int
    to: bytes
    gas_used: int
    reason: str | None
    events: tuple[ContractEvent, ...]


class BlockRecord(msgspec.Struct, frozen=True, array_like=True):
    """One final block. Genesis is block 0: a single record without a sender, under the genesis hash."""

    number: int
    hash: bytes
    timestamp: int
    transactions: tuple[TransactionRecord, ...]

    def events(self) -> Iterator[ContractEvent]:
        """The block's events in order."""
        for transaction in self.transactions:
            yield from transaction.events


_decoder = msgspec.msgpack.Decoder(BlockRecord)
_encoder = msgspec.msgpack.Encoder()


def encode(record: BlockRecord) -> bytes:
    return _encoder.encode(record)


def decode(data: bytes) -> BlockRecord:
    """Raises msgspec.DecodeError (a ValidationError is one) for anything else."""
    return _decoder.decode(data)
