"""A ledger set aside: nothing is deleted, and an authority does not seal again before it has what it signed."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import trio.testing

from contracts.errors import Conflict, Corrupt, Refused
from contracts.types import Address
from ledger import resync, seal, snapshot
from ledger.accounts import Accounts, Standing
from ledger.chain import Tip
from ledger.consensus import Consensus
from ledger.resync import LostVotes
from ledger.snapshot import Snapshot
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    CONFIG,
    GENESIS,
    OPERATOR,
    Builder,
    address,
    announce,
    join,
    open_chain,
    open_ledger,
    raw_call,
    register,
    sealing,
)

AT = datetime(2025, 2, 3, 4, 5, 6)
ASIDE = "ledger.2025-02-03T04-05-06"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of three blocks with a snapshot."""
    path = tmp_path / "ledger"
    with open_chain(path) as chain:
        builder = Builder(chain)
        for raw in (raw_call(ADMIN, 0, register()), raw_call(OPERATOR, 0, join()), raw_call(OPERATOR, 1, announce())):
            builder.grow(raw)
        snapshot.write(
            path, Snapshot(GENESIS.hash, 3, chain.tip.hash, Standing(chain.tip.accounts, chain.tip.epoch), b"")
        )
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_ledger_and_snapshot_get_another_name(path: Path) -> None:
    before, kept = contents(path), snapshot.path_of(path).read_bytes()
    aside = resync.set_aside(path, AT)
    assert aside == path.with_name(ASIDE)
    assert contents(aside) == before
    assert snapshot.path_of(aside).read_bytes() == kept
    assert sorted(entry.name for entry in path.parent.iterdir()) == [ASIDE, f"{ASIDE}.snapshot"]
    with open_ledger(path) as ledger:
        assert ledger.head.number == 0


def test_the_name_is_never_used_twice(path: Path) -> None:
    resync.set_aside(path, AT)
    with open_ledger(path):
        pass
    with pytest.raises(Conflict, match="wait a second"):
        resync.set_aside(path, AT)
    assert path.exists()


OPENED = """
import sys
from pathlib import Path
from ledger.store import Store
with Store(Path(sys.argv[1])):
    print("open", flush=True)
    input()
"""


def test_open_ledger_is_not_set_aside(path: Path) -> None:
    command = [sys.executable, "-c", OPENED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(Conflict, match="in use by another process"):
            resync.set_aside(path, AT, LostVotes(3))
        other.communicate("\n")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["ledger", "ledger.snapshot"]


def test_what_cannot_be_renamed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(Refused, match="Permission denied"):
        resync.set_aside(path, AT)


def test_what_a_ledger_still_tells(path: Path, tmp_path: Path) -> None:
    known = resync.look(path, CONFIG)
    assert (known.votes and known.votes.number, known.authorities) == (3, {AUTHORITY.address})
    another = Standing(Accounts(authorities=frozenset({address(1)})))
    snapshot.write(path, Snapshot(GENESIS.hash, 3, GENESIS.hash, another, b""))
    next(path.glob("MANIFEST-*")).write_bytes(b"")
    known = resync.look(path, CONFIG)
    assert (known.votes, known.authorities) == (None, {AUTHORITY.address, address(1)}), "the snapshot's too"
    snapshot.path_of(path).unlink()
    assert resync.look(path, CONFIG).authorities == {AUTHORITY.address}


async def test_authority_waits_for_what_it_signed(path: Path) -> None:
    """It takes part again at the block it was at, and not before; a restart in between changes nothing."""
    with open_ledger(path) as ledger:
        blocks = ledger.history.sealed_blocks(1, 10, 1 << 30)
    resync.set_aside(path, AT, LostVotes(3))
    for number in (0, 1):
        with open_ledger(path) as ledger:
            await ledger.submit(raw_call(ADMIN, number, register(f"m{number}")))
            async with sealing(ledger):
                await trio.testing.wait_all_tasks_blocked()
                assert ledger.head.number == number, "what is pending is not sealed into another block 1"
                await ledger.import_blocks([blocks[number]])
                await trio.testing.wait_all_tasks_blocked()
                assert ledger.head.number == number + 1
    with open_ledger(path) as ledger:
        async with sealing(ledger):
            await ledger.import_blocks([blocks[2]])
            name = await ledger.submit(raw_call(OPERATOR, 2, announce()))
            receipt = await ledger.wait_receipt(name)
            assert receipt.block_number == 4
    assert resync.votes_lost(path) is None
    assert not resync.note_path(path).exists()


ONE = frozenset({AUTHORITY.address})
THREE = frozenset({AUTHORITY.address, ADMIN.address, OPERATOR.address})
THEN, LATER = b"\1" * 32, b"\2" * 32


@pytest.mark.parametrize(
    ("lost", "authorities", "number", "iteration", "epoch", "past"),
    [
        (LostVotes(5, THEN, 9), ONE, 4, 20, THEN, False),
        (LostVotes(5, THEN, 9), ONE, 5, 5, THEN, True),
        (LostVotes(5, THEN, 9), THREE, 5, 6, THEN, False),
        (LostVotes(5, THEN, 9), THREE, 6, 8, THEN, False),
        (LostVotes(5, THEN, 9), THREE, 6, 9, THEN, True),
        (LostVotes(5, THEN, 9), THREE, 4, 9, LATER, False),
        (LostVotes(5, THEN, 9), THREE, 6, 1, LATER, True),
        (LostVotes(5, THEN), THREE, 90, 99, THEN, False),
        (LostVotes(5, THEN), THREE, 90, 1, LATER, True),
        (LostVotes(5), THREE, 90, 99, THEN, False),
        (LostVotes(5), ONE, 5, 1, THEN, True),
    ],
)
def test_when_an_authority_may_vote_again(
    lost: LostVotes, authorities: frozenset[Address], number: int, iteration: int, epoch: bytes, past: bool
) -> None:
    extra = seal.unsealed_extra_data(epoch, iteration)
    header = GENESIS.header.copy(block_number=number, extra_data=extra)
    assert resync.is_past(lost, Tip(header, Accounts(authorities=authorities), epoch)) is past


@pytest.mark.parametrize("data", [b"", b"nonsense", b'{"number": "3"}', b'{"number": 3'])
async def test_note_that_cannot_be_read_keeps_the_authority_from_sealing(path: Path, data: bytes) -> None:
    resync.note_path(path).write_bytes(data)
    with open_ledger(path) as ledger, pytest.RaisesGroup(pytest.RaisesExc(Corrupt, match="votes-lost")):
        await Consensus(ledger, AUTHORITY).run()
