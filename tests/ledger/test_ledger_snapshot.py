"""Snapshots: a start from one ends where a start from genesis does, and one that is not right is passed over."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from contracts.errors import Corrupt, NoSpace, Refused
from ledger import snapshot
from ledger.accounts import Standing
from ledger.ledger import Ledger
from ledger.record import BlockRecord
from ledger.snapshot import Snapshot
from ledger.store import Store
from tests.ledger.world import (
    ADMIN,
    GENESIS,
    OPERATOR,
    Builder,
    address,
    enrol,
    join,
    make_config,
    open_chain,
    open_ledger,
    raw_call,
)

AT = 2
PROJECTIONS = b"whatever the reader folded"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three blocks; the accounts change before block 2, in it and after it."""
    path = tmp_path / "ledger"
    with open_chain(path) as chain:
        builder = Builder(chain)
        builder.grow(raw_call(ADMIN, 0, enrol(address(1))))
        builder.grow(raw_call(ADMIN, 1, enrol(address(2), address(3))), raw_call(OPERATOR, 0, join()))
        builder.grow(raw_call(ADMIN, 2, enrol(address(4))))
    return path


def snapshot_of(records: Iterable[BlockRecord], number: int) -> Snapshot:
    kept = [record for record in records if record.number <= number]
    folded = Standing()
    for record in kept:
        folded = folded.after(record.hash, record.events())
    return Snapshot(GENESIS.hash, number, kept[-1].hash, folded, PROJECTIONS)


def snapshot_at(path: Path) -> Snapshot:
    with Store(path) as store:
        return snapshot_of(store.records(0, AT + 1), AT)


def enrolled(ledger: Ledger) -> list[bool]:
    return [ledger.account(address(number)).enrolled for number in range(1, 6)]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_start_folds_only_what_came_after(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_ledger(path) as ledger:
        head = ledger.head
        assert ledger.opened_from is None
        assert enrolled(ledger) == [True, True, True, True, False]
        snapshot.write(path, found := snapshot_of(ledger.records(0), number))
    read: list[int] = []
    real = Store.records
    monkeypatch.setattr(Store, "records", lambda store, start, stop: read.append(start) or real(store, start, stop))
    with open_ledger(path) as ledger:
        assert ledger.opened_from == found
        assert read == [number + 1]
        assert ledger.head == head
        assert ledger.tip.epoch == GENESIS.hash
        assert enrolled(ledger) == [True, True, True, True, False]
        assert ledger.admins == {ADMIN.address}
        assert ledger.authorities


def test_block_that_is_missing_before_the_snapshot_is_noticed(path: Path) -> None:
    snapshot.write(path, snapshot_at(path))
    with Store(path) as store:
        store._db.delete(b"e" + (1).to_bytes(8))
    with pytest.raises(Corrupt, match="event record of block 1 is missing"), open_ledger(path):
        pass


def test_bytes_are_the_same_whatever_the_order_of_sets(path: Path) -> None:
    found = snapshot_at(path)
    old = found.standing.accounts
    turned = msgspec.structs.replace(old, enrolled=frozenset(sorted(old.enrolled, reverse=True)))
    again = msgspec.structs.replace(found, standing=Standing(turned, found.standing.epoch))
    assert snapshot.encode(again) == snapshot.encode(found)
    assert snapshot.decode(snapshot.encode(found)) == found


def passes_over(path: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """The ledger opens as without a snapshot, and says so in one line."""
    caplog.clear()
    with Store(path) as store:
        assert snapshot.load(store, GENESIS.hash) is None
    assert len(caplog.records) == 1
    line = caplog.records[0].getMessage()
    assert str(snapshot.path_of(path)) in line
    assert "folded from genesis" in line
    assert why in line


def test_damaged_or_torn_anywhere(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = snapshot.encode(snapshot_at(path))
    for place in range(len(whole)):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :]):
            with pytest.raises(Corrupt):
                snapshot.decode(data)
    for data in (b"", whole[:-1], whole + b"\0", whole[:60] + b"\xff" + whole[61:]):
        snapshot.path_of(path).write_bytes(data)
        passes_over(path, caplog, "")
    with open_ledger(path) as ledger:
        assert enrolled(ledger) == [True, True, True, True, False]


def test_of_another_version(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = snapshot.encode(snapshot_at(path))
    snapshot.path_of(path).write_bytes(b"aigen snapshot 0\n" + whole[len(snapshot.FORMAT) :])
    passes_over(path, caplog, "aigen snapshot 0")


def test_of_accounts_with_fewer_fields(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As an earlier version would have written it: what it lacks must not silently become empty."""
    plain = msgspec.to_builtins(snapshot_at(path), order="deterministic", builtin_types=(bytes,))
    del plain[3]["accounts"]["authorities"]
    body = msgspec.msgpack.encode(plain)
    assert snapshot._decoder.decode(body).standing.accounts.authorities == frozenset()
    snapshot.path_of(path).write_bytes(snapshot.FORMAT + hashlib.sha256(body).digest() + body)
    passes_over(path, caplog, "not in the form")


def test_of_another_chain_ahead_or_of_another_block(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = snapshot_at(path)
    for changed, why in (
        ({"genesis_hash": b"\1" * 32}, "from genesis 0x0101"),
        ({"number": 4}, "of block 4, the head is 3"),
        ({"number": 3}, "block 3 is not 0x"),
    ):
        snapshot.write(path, msgspec.structs.replace(found, **changed))
        passes_over(path, caplog, why)
    with open_chain(path.with_name("other"), make_config(accounts=())) as chain:
        assert snapshot.load(chain.store, chain.genesis_hash) is None


def test_not_a_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot.path_of(path).mkdir()
    passes_over(path, caplog, "Is a directory")


def test_empty_ledger_has_none(tmp_path: Path, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ledger was moved away, its snapshot was not."""
    snapshot.write(path, snapshot_at(path))
    path.rename(tmp_path / "away")
    with open_ledger(path) as ledger:
        assert ledger.opened_from is None
        assert ledger.head.number == 0
    assert "not there" in caplog.text


def test_what_outgrows_the_limit_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = snapshot_at(path)
    snapshot.write(path, found)
    monkeypatch.setattr(snapshot, "SNAPSHOT_BYTES_MAX", 200)
    with pytest.raises(NoSpace, match="at most 200 are kept"):
        snapshot.write(path, found)
    with Store(path) as store:
        assert snapshot.load(store, GENESIS.hash) is None, "nor is more than that read"


def test_full_disk_leaves_the_one_before(path: Path) -> None:
    found = snapshot_at(path)
    snapshot.write(path, found)
    draft = snapshot.path_of(path).with_name("ledger.snapshot.new")
    draft.symlink_to("/dev/full")
    with pytest.raises(Refused, match="No space left on device"):
        snapshot.write(path, msgspec.structs.replace(found, number=3))
    assert not draft.is_symlink(), "nor is anything left behind"
    with Store(path) as store:
        assert snapshot.load(store, GENESIS.hash) == found
