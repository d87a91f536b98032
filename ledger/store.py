"""The ledger on disk: LevelDB through plyvel, final blocks in synced batches, each whole or not at all. Knows no rules.

Keys (n is a block number, 8 bytes big-endian):
    F            format                      H           head: n and block hash
    b n          sealed block                e n         block record (events in order)
    r n          receipts (RLP list)         h hash      n of the block with this hash
    t hash       n and index (4 bytes)       p seq       raw transaction accepted into the pool, not yet in a block
    s key        a state trie node or contract code
    v iteration  ballot: what this authority has said    x address   evidence that an authority lied
    S            n and hash of the newest block of a fast sync that has not reached its end: the head is below
    P            n where a fast sync ended: states of blocks before it are not here
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec
import plyvel
import rlp

from contracts.errors import Conflict, Corrupt, NoSpace, NotAllowed, Refused
from contracts.types import Address, TransactionHash
from ledger import record as records
from ledger.block import SealedBlock
from ledger.record import BlockRecord
from ledger.simplex import Ballot
from ledger.votes import Evidence

FORMAT = b"aigen ledger 1"
_NUMBER = struct.Struct(">Q")
_PLACE = struct.Struct(">QI")
HASH_SIZE = 32
WAY_OUT = "run `aigen ledger resync`, which moves that folder aside, and start again; the chain comes from the peers"
"""What to do about a ledger that is damaged."""

_SHORT_OR_GONE = ("No such file", "Invalid argument", "Not a directory", "Is a directory")
"""How LevelDB reports a file that is missing or shorter than it was, or a CURRENT that names something else."""

_SEQUENCE_END = (1 << 64) - 1

EncodedBlock = tuple[SealedBlock, BlockRecord, bytes]
"""A block with its event record and its receipts in one RLP list: what is kept of each, but for state."""


class Store:
    """One LevelDB, opened by one process. Reads may come from any thread, writes from one at a time."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises Conflict when another process has it, Corrupt when it is not ours or damaged."""
        self.path = path
        self._failure: Refused | None = None
        has_tables = any(path.glob("*.ldb"))
        if _lost_its_index(path):
            raise self.corrupt("it has data but no file CURRENT")
        with self._reported():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = plyvel.DB(str(path), create_if_missing=True, paranoid_checks=True)
        try:
            found = self._get(b"F")
            if found is None and self.head() is None and not has_tables:
                self._write({b"F": FORMAT})
            elif found != FORMAT:
                raise self.corrupt(f"its format is {found!r}, not {FORMAT!r}")
        except BaseException:
            self.close()
            raise

    def corrupt(self, what: object) -> Corrupt:
        """What to raise when the bytes here are not those that were written."""
        text, files = str(what), self._newest_files()
        if not any(name in text for name in files):  # LevelDB often does not say which of its files it means
            text = f"{text}, in a file such as {', '.join(files)}" if files else text
        return Corrupt(f"the ledger in {self.path} is damaged or not of this version ({text}): {WAY_OUT}")

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """LevelDB's errors and the file system's as the ledger's own, which say what to do."""
        try:
            yield
        except (plyvel.Error, OSError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> Refused:
        what = str(error)
        if isinstance(error, plyvel.Error) and error.args and isinstance(error.args[0], bytes):
            what = error.args[0].decode(errors="replace")
        if what.startswith("IO error: lock "):
            return Conflict(f"the ledger in {self.path} is in use by another process: stop that node first")
        if isinstance(error, plyvel.CorruptionError) or any(reason in what for reason in _SHORT_OR_GONE):
            return self.corrupt(what)
        if any(reason in what for reason in ("No space left", "quota exceeded", "File too large")):
            return NoSpace(
                f"the ledger in {self.path} cannot be written ({what}): free space, then start the node again"
            )
        if "Permission denied" in what or "Read-only file system" in what:
            return NotAllowed(
                f"the ledger in {self.path} is closed to this user ({what}): give it the right to write there"
            )
        return Refused(f"the ledger in {self.path} failed ({what}): remove the cause, then start the node again")

    def _newest_files(self) -> list[str]:
        """CURRENT, and the newest of each kind of file that it leads to."""
        kinds = (sorted(self.path.glob(pattern)) for pattern in ("CURRENT", "MANIFEST-*", "*.log", "*.ldb"))
        return [files[-1].name for files in kinds if files]

    @property
    def failure(self) -> Refused | None:
        """Why nothing more is written, once a write has failed."""
        return self._failure

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Reading

    def _get(self, key: bytes) -> bytes | None:
        with self._reported():
            # paranoid_checks concerns what LevelDB does by itself; reads verify checksums only when told to.
            value: bytes | None = self._db.get(key, verify_checksums=True)
        return value

    def _items(self, first: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values for first <= key < end, in order, as they were when it began."""
        # Not plyvel's plain iterator: when the last block that it looks at is damaged, it ends there without a word.
        with self._reported(), self._db.raw_iterator(verify_checksums=True) as found:
            found.seek(first)
            while found.valid() and (key := found.key()) < end:
                yield key, found.value()
                found.next()

    def _scan(self, prefix: bytes, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Numbers and values of the keys prefix n for start <= n < stop."""
        for key, value in self._items(prefix + _NUMBER.pack(start), prefix + _NUMBER.pack(stop)):
            yield _NUMBER.unpack(key[len(prefix) :])[0], value

    def _must(self, key: bytes, what: str) -> bytes:
        value = self._get(key)
        if value is None:
            raise self.corrupt(f"{what} is missing")
        return value

    def head(self) -> tuple[int, bytes] | None:
        """Number and hash of the newest final block; None before genesis is written."""
        return self._numbered(b"H", "head")

    def staged(self) -> tuple[int, bytes] | None:
        """Number and hash of the newest block of a fast sync that has not reached its end."""
        return self._numbered(b"S", "newest staged block")

    def _numbered(self, key: bytes, what: str) -> tuple[int, bytes] | None:
        value = self._get(key)
        if value is None:
            return None
        if len(value) != _NUMBER.size + HASH_SIZE:
            raise self.corrupt(f"its {what} is {value!r}")
        return _NUMBER.unpack_from(value)[0], value[_NUMBER.size :]

    def state_start(self) -> int:
        """The number of the first block after genesis whose state is here: 1 unless a fast sync passed over some."""
        value = self._get(b"P")
        return 1 if value is None else int(_NUMBER.unpack(value)[0])

    def state_node(self, key: bytes) -> bytes | None:
        """A trie node or code by its Keccak hash."""
        return self._get(b"s" + key)

    def sealed_bytes(self, number: int) -> bytes:
        """The sealed block's encoding, as it travels."""
        return self._must(b"b" + _NUMBER.pack(number), f"block {number}")

    def sealed(self, number: int) -> SealedBlock:
        try:
            return msgspec.msgpack.decode(self.sealed_bytes(number), type=SealedBlock)
        except msgspec.DecodeError as error:
            raise self.corrupt(f"block {number}: {error}") from error

    def record(self, number: int) -> BlockRecord:
        return self._decode_record(
            number, self._must(b"e" + _NUMBER.pack(number), f"the event record of block {number}")
        )

    def records(self, start: int, stop: int) -> Iterator[BlockRecord]:
        """Records of the blocks start <= number < stop, in order, none left out."""
        expected = start
        for number, value in self._scan(b"e", start, stop):
            if number != expected:
                break
            yield self._decode_record(number, value)
            expected += 1
        if expected < stop:
            raise self.corrupt(f"the event record of block {expected} is missing")

    def check_records(self, stop: int) -> None:
        """Raise Corrupt unless there is a record of each block below `stop`; decodes none.

        A table file that LevelDB lost sight of takes whole blocks with it and leaves the newer ones.
        """
        expected = 0
        for number, _ in self._scan(b"e", 0, stop):
            if number != expected:
                break
            expected += 1
        if expected < stop:
            raise self.corrupt(f"the event record of block {expected} is missing")

    def _decode_record(self, number: int, value: bytes) -> BlockRecord:
        try:
            record = records.decode(value)
        except msgspec.DecodeError as error:
            raise self.corrupt(f"the event record of block {number}: {error}") from error
        if record.number != number:
            raise self.corrupt(f"the event record of block {number} says that it is block {record.number}'s")
        return record

    def receipts_rlp(self, number: int) -> bytes:
        """The RLP list of a block's encoded receipts, as it travels."""
        return self._must(b"r" + _NUMBER.pack(number), f"the receipts of block {number}")

    def receipts(self, number: int) -> list[bytes]:
        """The encoded receipts of a block, in order."""
        try:
            value: list[bytes] = rlp.decode(self.receipts_rlp(number))
        except rlp.exceptions.RLPException as error:
            raise self.corrupt(f"the receipts of block {number}: {error}") from error
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
        return list(self._scan(b"p", 0, _SEQUENCE_END))

    # Writing

    def _write(self, puts: Mapping[bytes, bytes], deletes: tuple[bytes, ...] = ()) -> None:
        """On disk when this returns. A write that fails is the last one this object tries."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        try:
            with self._reported():
                batch = self._db.write_batch(sync=True)
                for key, value in puts.items():
                    batch.put(key, value)
                for key in deletes:
                    batch.delete(key)
                batch.write()
        except Refused as failure:
            # Whether the batch is in the log is known only to the next start: another one after it could contradict
            # it (a second final block of one number) or lie behind its torn half, where recovery never looks.
            self._failure = failure
            raise

    def append_journal(self, sequence: int, raw: bytes) -> None:
        self._write({b"p" + _NUMBER.pack(sequence): raw})

    def forget_journal(self, sequences: tuple[int, ...]) -> None:
        if sequences:
            self._write({}, tuple(b"p" + _NUMBER.pack(sequence) for sequence in sequences))

    def ballots(self) -> dict[int, Ballot]:
        """What this authority has said in the iterations after the newest final block."""
        try:
            return {n: msgspec.msgpack.decode(value, type=Ballot) for n, value in self._scan(b"v", 0, _SEQUENCE_END)}
        except msgspec.DecodeError as error:
            raise self.corrupt(f"its vote journal: {error}") from error

    def write_ballots(self, ballots: Mapping[int, Ballot]) -> None:
        self._write({b"v" + _NUMBER.pack(n): msgspec.msgpack.encode(ballot) for n, ballot in ballots.items()})

    def evidence(self) -> dict[Address, Evidence]:
        """The first proof of each authority that was seen to lie, by its address."""
        try:
            found = self._items(b"x", b"y")
            return {Address(key[1:]): msgspec.msgpack.decode(value, type=Evidence) for key, value in found}
        except msgspec.DecodeError as error:
            raise self.corrupt(f"its evidence: {error}") from error

    def write_evidence(self, liar: Address, evidence: Evidence) -> None:
        self._write({b"x" + liar: msgspec.msgpack.encode(evidence)})

    def commit(
        self,
        found: Sequence[EncodedBlock],
        state_nodes: Mapping[bytes, bytes],
        journal_done: tuple[int, ...],
        ballots_done: tuple[int, ...] = (),
    ) -> None:
        """Everything of the final blocks that follow on the head, in one synced batch: after a crash they are there
        whole or not at all."""
        head = self.head()
        puts: dict[bytes, bytes] = {}
        for number, (block, record, receipts_rlp) in enumerate(found, 0 if head is None else head[0] + 1):
            assert record.number == number, "a final block is never written over another"
            puts |= _puts(block, record, receipts_rlp)
            puts[b"H"] = _NUMBER.pack(number) + record.hash
        for key, node in state_nodes.items():
            puts[b"s" + key] = node
        self._write(puts, _done(journal_done, ballots_done))

    # A fast sync: final blocks and a state that are here before the head moves to them

    def stage(self, found: Sequence[EncodedBlock]) -> None:
        """Final blocks that follow on the newest staged one, without the states after them."""
        puts: dict[bytes, bytes] = {}
        for block, record, receipts_rlp in found:
            puts |= _puts(block, record, receipts_rlp)
            puts[b"S"] = _NUMBER.pack(record.number) + record.hash
        self._write(puts)

    def write_nodes(self, nodes: Mapping[bytes, bytes]) -> None:
        """State nodes by their hashes."""
        self._write({b"s" + key: node for key, node in nodes.items()})

    def end_staging(self, journal_done: tuple[int, ...], ballots_done: tuple[int, ...]) -> None:
        """Move the head to the newest staged block, whose state is whole."""
        staged = self.staged()
        assert staged is not None
        number = _NUMBER.pack(staged[0])
        self._write({b"H": number + staged[1], b"P": number}, (b"S", *_done(journal_done, ballots_done)))


def _puts(block: SealedBlock, record: BlockRecord, receipts_rlp: bytes) -> dict[bytes, bytes]:
    """A block under its keys."""
    number = _NUMBER.pack(record.number)
    puts = {
        b"b" + number: block.encode(),
        b"e" + number: records.encode(record),
        b"r" + number: receipts_rlp,
        b"h" + record.hash: number,
    }
    for index, transaction in enumerate(record.transactions):
        puts[b"t" + transaction.hash] = _PLACE.pack(record.number, index)
    return puts


def _done(journal_done: tuple[int, ...], ballots_done: tuple[int, ...]) -> tuple[bytes, ...]:
    """Keys that a final block makes superfluous."""
    return (*(b"p" + _NUMBER.pack(n) for n in journal_done), *(b"v" + _NUMBER.pack(n) for n in ballots_done))


def _lost_its_index(path: Path) -> bool:
    """Whether there is data that LevelDB would not find: without CURRENT it begins anew and removes what is there."""
    has_data = any(file.suffix in {".ldb", ".sst", ".log"} for file in path.glob("*"))
    return has_data and not (path / "CURRENT").exists()
