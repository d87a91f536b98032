"""The store: one batch a block, one process at a time, and damage that is noticed."""

import random
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plyvel
import pytest

from contracts.errors import Conflict, Corrupt, NoSpace, NotAllowed, Refused
from ledger.record import BlockRecord
from ledger.store import Store
from tests.ledger.world import (
    ADMIN,
    GENESIS,
    OPERATOR,
    Builder,
    announce,
    import_block,
    join,
    open_chain,
    raw_call,
    register,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three blocks, the first flushed into a table file, and one transaction in the journal."""
    path = tmp_path / "ledger"
    with open_chain(path) as chain:
        Builder(chain).grow(raw_call(ADMIN, 0, register()))
    with open_chain(path) as chain:
        Builder(chain).grow(raw_call(OPERATOR, 0, join()))
        Builder(chain).grow(raw_call(OPERATOR, 1, announce()))
        chain.store.append_journal(1, raw_call(OPERATOR, 2, announce()))
    return path


class FailingDb:
    """A LevelDB whose writes fail: the disk is full, or gone."""

    def __init__(self, db: Any, error: Exception) -> None:
        self._db = db
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def write_batch(self, **options: Any) -> Any:
        batch = self._db.write_batch(**options)

        class Failing:
            put, delete = batch.put, batch.delete

            @staticmethod
            def write() -> None:
                raise self._error

        return Failing


def test_failing_write_leaves_the_old_head_and_ends_all_writing(path: Path) -> None:
    with open_chain(path) as chain:
        block = Builder(chain).make(raw_call(OPERATOR, 2, announce()))
        before, tip = dict(chain.store._db.iterator()), chain.tip
        db = chain.store._db
        chain.store._db = FailingDb(db, plyvel.IOError(b"IO error: x/000007.log: No space left on device"))
        with pytest.raises(NoSpace, match="free space"):
            import_block(chain, block)
        chain.store._db = db
        with pytest.raises(NoSpace, match="free space"):
            import_block(chain, block)
        assert isinstance(chain.store.failure, NoSpace)
        assert chain.tip is tip
        assert dict(db.iterator()) == before
    with open_chain(path) as chain:
        import_block(chain, block)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (plyvel.IOError(b"IO error: x: No space left on device"), NoSpace),
        (plyvel.IOError(b"IO error: x: File too large"), NoSpace),
        (plyvel.IOError(b"IO error: x: Permission denied"), NotAllowed),
        (plyvel.IOError(b"IO error: x: Input/output error"), Refused),
        (plyvel.CorruptionError(b"Corruption: block checksum mismatch"), Corrupt),
    ],
)
def test_each_error_of_the_disk_says_what_to_do(path: Path, error: Exception, kind: type[Refused]) -> None:
    with Store(path) as store:
        store._db, db = FailingDb(store._db, error), store._db
        with pytest.raises(kind) as found:
            store.append_journal(2, b"x")
        assert type(found.value) is kind
        assert str(path) in str(found.value)
        assert "b'" not in str(found.value)
        store._db = db


FILE_SIZE_LIMITED = """
import resource, signal, sys
from pathlib import Path
from contracts.errors import NoSpace
from tests.ledger.world import *
with open_chain(Path(sys.argv[1])) as chain:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    nonce = chain.nonce(OPERATOR.address)
    while True:
        try:
            Builder(chain).grow(raw_call(OPERATOR, nonce, join()))
        except NoSpace:
            break
        nonce += 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        Builder(chain).grow(raw_call(OPERATOR, nonce, join()))
    except NoSpace:
        print(chain.tip.number)
"""


def test_disk_that_is_really_full_loses_no_block(path: Path) -> None:
    """A real write that fails in its middle: the file may not grow."""
    run = [sys.executable, "-c", FILE_SIZE_LIMITED, str(path), "20000"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    with open_chain(path) as chain:
        assert chain.tip.number == int(done.stdout) > 3
        assert len(list(chain.store.records(0, chain.tip.number + 1))) == chain.tip.number + 1
        Builder(chain).grow(raw_call(OPERATOR, chain.nonce(OPERATOR.address), join()))


def test_block_is_one_synced_batch(path: Path) -> None:
    with open_chain(path) as chain:
        block = Builder(chain).make(raw_call(OPERATOR, 2, announce()))
        batches: list[dict[str, Any]] = []
        db = chain.store._db

        class Counting(FailingDb):
            def write_batch(self, **options: Any) -> Any:
                batches.append(options)
                return self._db.write_batch(**options)

        chain.store._db = Counting(db, OSError())
        import_block(chain, block)
        chain.store._db = db
    assert batches == [{"sync": True}]


def test_final_block_is_never_written_over_another(path: Path) -> None:
    with open_chain(path) as chain:
        block = Builder(chain).make(raw_call(OPERATOR, 2, announce()))
        tip, certificates = chain.execute_sealed(deque([block]), 1e12)
        chain.write(tip, certificates)
        with pytest.raises(AssertionError, match="never written over"):
            chain.write(tip, certificates)


def test_second_process_is_refused(path: Path) -> None:
    with Store(path):
        opening = f"from pathlib import Path; from ledger.store import Store; Store(Path({str(path)!r}))"
        run = [sys.executable, "-c", opening]
        done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False)
        assert "Conflict: the ledger in" in done.stderr
        assert "another process" in done.stderr
        with pytest.raises(Conflict, match="another process"):
            Store(path)
    Store(path).close()


def test_path_with_lock_in_its_name_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    folder.write_text("a file in the way")
    with pytest.raises(Refused) as found:
        Store(folder / "ledger")
    assert not isinstance(found.value, Conflict)


def read_all(path: Path) -> None:
    """What a start, a peer and a replay read."""
    with open_chain(path) as chain:
        for record in chain.store.records(0, chain.tip.number + 1):
            chain.store.sealed(record.number).header()
            chain.store.receipts(record.number)
            assert chain.store.number_of(record.hash) == record.number
        chain.store.journal()
        for account in (ADMIN, OPERATOR):
            chain.nonce(account.address)


def files(path: Path) -> Iterator[Path]:
    yield from (file for file in sorted(path.iterdir()) if file.suffix in {".ldb", ".log"} and file.stat().st_size)


def records_of(path: Path, copy: Path) -> list[BlockRecord]:
    """Read from a copy: opening moves what is in the log into a table file."""
    shutil.copytree(path, copy)
    with Store(copy) as store:
        return list(store.records(0, 4))


def is_noticed(path: Path) -> bool:
    try:
        read_all(path)
    except Corrupt as error:
        return str(path) in str(error) and "start again" in str(error)
    return False


def test_flipped_byte_in_any_file_is_noticed(path: Path, tmp_path: Path) -> None:
    assert {file.suffix for file in files(path)} == {".ldb", ".log"}
    whole = records_of(path, tmp_path / "whole")
    noticed = 0
    for file in files(path):
        for place in range(3, file.stat().st_size, file.stat().st_size // 20):
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            data = bytearray((copy / file.name).read_bytes())
            data[place] ^= 0x55
            (copy / file.name).write_bytes(data)
            if is_noticed(copy):
                noticed += 1
            else:  # padding and statistics are not covered; what is read is what was written
                with Store(copy) as store:
                    assert list(store.records(0, 4)) == whole
            shutil.rmtree(copy)
    assert noticed > 20


def test_damage_in_the_last_block_is_not_taken_for_the_end(tmp_path: Path) -> None:
    """plyvel's plain iterator ends there without an error: accepted transactions would be lost without a word."""
    path = tmp_path / "ledger"
    with Store(path) as store:
        for sequence in range(20):
            store.append_journal(sequence, random.Random(sequence).randbytes(400))
        store._db.compact_range()
    (table,) = path.glob("*.ldb")
    data = table.read_bytes()
    place = data.index(random.Random(19).randbytes(400))
    table.write_bytes(data[:place] + b"x" + data[place + 1 :])
    with Store(path) as store, pytest.raises(Corrupt, match=r"checksum mismatch.*\.ldb"):
        store.journal()


@pytest.mark.parametrize("pattern", ["CURRENT", "MANIFEST-*", "*.ldb"])
def test_missing_file_is_noticed(path: Path, pattern: str) -> None:
    for file in path.glob(pattern):
        file.unlink()
    with pytest.raises(Corrupt, match="start again"):
        read_all(path)


@pytest.mark.parametrize("size", [0, 1, 100, 5000])
def test_truncated_log_gives_a_prefix_of_final_blocks(path: Path, tmp_path: Path, size: int) -> None:
    whole = records_of(path, tmp_path / "whole")
    log = next(file for file in files(path) if file.suffix == ".log")
    log.write_bytes(log.read_bytes()[:size])
    with open_chain(path) as chain:
        assert list(chain.store.records(0, chain.tip.number + 1)) == whole[: chain.tip.number + 1]
        assert chain.tip.number >= 1, "what was in a table file stays"


@pytest.mark.parametrize("prefix", [b"b", b"e", b"r", b"H", b"h"])
def test_value_that_is_missing_or_another_is_noticed(path: Path, prefix: bytes) -> None:
    with Store(path) as store:
        for key, _ in store._db.iterator(prefix=prefix):
            store._db.put(key, b"\x01another")
    with pytest.raises((Corrupt, AssertionError)):
        read_all(path)


def test_gap_in_the_records_is_noticed(path: Path) -> None:
    with Store(path) as store:
        store._db.delete(b"e" + (2).to_bytes(8))
        with pytest.raises(Corrupt, match="event record of block 2 is missing"):
            list(store.records(0, 4))
        assert len(list(store.records(0, 2))) == 2


def test_other_format_is_refused(path: Path) -> None:
    with Store(path) as store:
        store._db.put(b"F", b"aigen ledger 9")
    with pytest.raises(Corrupt, match="format"):
        Store(path)


def test_interrupted_creation_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "LOCK").touch()
    (tmp_path / "ledger" / "MANIFEST-000001").write_bytes(b"half")
    with open_chain(tmp_path / "ledger") as chain:
        assert chain.tip.hash == GENESIS.hash


def test_journal_keeps_order_and_forgets(path: Path) -> None:
    with Store(path) as store:
        for sequence in (300, 2, 255, 256):
            store.append_journal(sequence, bytes([sequence % 256]))
        assert [sequence for sequence, _ in store.journal()] == [1, 2, 255, 256, 300]
        store.forget_journal((1, 256))
    with Store(path) as store:
        assert [sequence for sequence, _ in store.journal()] == [2, 255, 300]
