"""The ledger on disk: LevelDB through plyvel, one synced WriteBatch for each final block. Knows no rules.

Keys (n is a block number, 8 bytes big-endian):
    F            format                      H           head: n and block hash
    b n          sealed block                e n         block record (events in order)
    r n          receipts (RLP list)         h hash      n of the block with this hash
    t hash       n and index (4 bytes)       p seq       raw transaction accepted into the pool, not yet in a block
    s key        a state trie node or contract code
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import plyvel
import rlp

from contracts.errors import Conflict, Corrupt, NoSpace
from contracts.types import TransactionHash
from ledger import record as records
from ledger.block import SealedBlock
from ledger.record import BlockRecord

FORMAT = b"aigen ledger 1"
_NUMBER = struct.Struct(">Q")
_PLACE = struct.Struct(">QI")


class Store:
    """One LevelDB, opened by one process."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises Conflict when another process has it, Corrupt when it is not ours or damaged."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = plyvel.DB(str(path), create_if_missing=True, paranoid_checks=True)
        except plyvel.CorruptionError as error:
            raise self._corrupt(error) from error
        except plyvel.IOError as error:
            if "lock" in str(error).lower():
                raise Conflict(f"{path} is in use by another process: stop that node first") from error
            raise self._corrupt(error) from error
        found = self._db.get(b"F")
        if found is None and self.head() is None:
            self._write({b"F": FORMAT})
        elif found != FORMAT:
            self._db.close()
            raise Corrupt(f"{path} holds no ledger of this version ({found!r}): choose another --data-dir")

    def _corrupt(self, error: Exception) -> Corrupt:
        return Corrupt(
            f"the ledger in {self.path} cannot be read ({error}): move that folder away and start again, "
            "the node fetches the chain from its peers"
        )

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # Reading

    def _get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            raise self._corrupt(error) from error
        return value

    def _must(self, key: bytes, what: str) -> bytes:
        value = self._get(key)
        if value is None:
            raise self._corrupt(KeyError(what))
        return value

    def head(self) -> tuple[int, bytes] | None:
        """Number and hash of the newest final block; None before genesis is written."""
        value = self._get(b"H")
        return None if value is None else (_NUMBER.unpack_from(value)[0], value[8:])

    def state_node(self, key: bytes) -> bytes | None:
        return self._get(b"s" + key)

    def sealed_bytes(self, number: int) -> bytes:
        """The sealed block's encoding, as it travels."""
        return self._must(b"b" + _NUMBER.pack(number), f"block {number}")

    def sealed(self, number: int) -> SealedBlock:
        try:
            return msgspec.msgpack.decode(self.sealed_bytes(number), type=SealedBlock)
        except msgspec.DecodeError as error:
            raise self._corrupt(error) from error

    def record(self, number: int) -> BlockRecord:
        return self._decode_record(self._must(b"e" + _NUMBER.pack(number), f"record {number}"))

    def records(self, start: int, stop: int) -> Iterator[BlockRecord]:
        """Records of the blocks start <= number < stop, in order."""
        try:
            values = self._db.iterator(start=b"e" + _NUMBER.pack(start), stop=b"e" + _NUMBER.pack(stop), include_key=False)
            for value in values:
                yield self._decode_record(value)
        except (plyvel.CorruptionError, plyvel.IOError) as error:
            raise self._corrupt(error) from error

    def _decode_record(self, value: bytes) -> BlockRecord:
        try:
            return records.decode(value)
        except msgspec.DecodeError as error:
            raise self._corrupt(error) from error

    def receipts(self, number: int) -> list[bytes]:
        """The encoded receipts of a block, in order."""
        value: list[bytes] = rlp.decode(self._must(b"r" + _NUMBER.pack(number), f"receipts {number}"))
        return value

    def number_of(self, block_hash: bytes) -> int | None:
        value = self._get(b"h" + block_hash)
        return None if value is None else int(_NUMBER.unpack(value)[0])

    def place_of(self, transaction_hash: TransactionHash) -> tuple[int, int] | None:
        """Block number and index of a transaction that is in a block."""
        value = self._get(b"t" + transaction_hash)
        return None if value is None else _PLACE.unpack(value)

    def journal(self) -> list[tuple[int, bytes]]:
        """The pool's journal: sequence numbers and raw transactions in the order they were accepted."""
        return [(_NUMBER.unpack(key[1:])[0], value) for key, value in self._db.iterator(prefix=b"p")]

    # Writing

    def _write(self, puts: dict[bytes, bytes], deletes: tuple[bytes, ...] = ()) -> None:
        try:
            with self._db.write_batch(sync=True) as batch:
                for key, value in puts.items():
                    batch.put(key, value)
                for key in deletes:
                    batch.delete(key)
        except plyvel.IOError as error:
            raise NoSpace(f"the ledger in {self.path} cannot be written ({error}): free space, then start again") from error

    def append_journal(self, sequence: int, raw: bytes) -> None:
        """On disk when this returns."""
        self._write({b"p" + _NUMBER.pack(sequence): raw})

    def forget_journal(self, sequences: tuple[int, ...]) -> None:
        if sequences:
            self._write({}, tuple(b"p" + _NUMBER.pack(sequence) for sequence in sequences))

    def commit(
        self,
        block: SealedBlock,
        record: BlockRecord,
        receipts: tuple[Any, ...],
        state_nodes: dict[bytes, bytes],
        journal_done: tuple[int, ...],
    ) -> None:
        """Everything of one final block, in one synced batch: after a crash it is there whole or not at all."""
        number = _NUMBER.pack(record.number)
        puts = {
            b"H": number + record.hash,
            b"b" + number: block.encode(),
            b"e" + number: records.encode(record),
            b"r" + number: rlp.encode([receipt.encode() for receipt in receipts]),
            b"h" + record.hash: number,
        }
        for index, transaction in enumerate(record.transactions):
            puts[b"t" + transaction.hash] = _PLACE.pack(record.number, index)
        for key, node in state_nodes.items():
            puts[b"s" + key] = node
        self._write(puts, tuple(b"p" + _NUMBER.pack(sequence) for sequence in journal_done))
