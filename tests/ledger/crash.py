"""What the crash tests run in a child process: a node that is killed at a named point, and the check of what it left.

`POINTS` is the table: to add one, name the method and say whether the process dies before or after it.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trio

from contracts.types import TransactionHash
from genesis.config import GenesisConfig
from ledger import accounts, audit, snapshot
from ledger.accounts import Accounts
from ledger.chain import Chain
from ledger.consensus import Consensus
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.store import Store
from ledger.wallet import Wallet
from node import state
from node.agreement import StateHasher
from node.replay import Replay
from tests.ledger.world import AUTHORITY, DEADLINE_S, EPOCH, join, make_config, open_ledger, raw_call, sealing
from tests.ledger.zygote import Tell

SENDERS = [Key.from_secret(bytes([i]) * 32) for i in range(20, 24)]
CONFIG = make_config(accounts=SENDERS)

SNAPSHOT_EVENTS = 5
"""So few that every checkpoint is due for a snapshot."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(DEADLINE_S)  # the signal is on its way: nothing more may happen here


class Point(NamedTuple):
    """Die at the n-th call of `owner.name`: before it, or after it and before anyone learns that it returned."""

    owner: Any
    name: str
    after: bool
    nth: int = 1

    def arm(self) -> None:
        real, calls = getattr(self.owner, self.name), itertools.count(1)

        def call(*arguments: Any, **options: Any) -> Any:
            is_it = next(calls) == self.nth
            if is_it and not self.after:
                die()
            found = real(*arguments, **options)
            if is_it:
                die()
            return found

        setattr(self.owner, self.name, call)


class HalfSnapshot:
    """Die when half of a snapshot's bytes are in its draft."""

    def arm(self) -> None:
        real = Path.open

        def opened(path: Path, mode: str = "r") -> Any:
            file = real(path, mode)
            return _HalfWritten(file) if path.suffix == ".new" else file

        Path.open = opened  # type: ignore[method-assign, assignment]


class _HalfWritten:
    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        os.write(self._file.fileno(), data[: len(data) // 2])
        die()


SEALING: dict[str, Point | HalfSnapshot] = {
    "own transaction checked, not in the journal": Point(Store, "append_journal", after=False, nth=4),
    "own transaction in the journal, not answered": Point(Store, "append_journal", after=True, nth=4),
    "vote about to be written": Point(Store, "write_ballots", after=False, nth=3),
    "vote in the journal, not sent": Point(Store, "write_ballots", after=True, nth=3),
    "vote sent, its block not written": Point(Consensus, "_broadcast", after=True, nth=2),
    "finalising vote sent, its block not written": Point(Consensus, "_broadcast", after=True, nth=4 * 2 + 3),
    "block executed": Point(Chain, "propose", after=True, nth=3),
    "batch about to be written": Point(Store, "commit", after=False, nth=3),
    "batch written, not adopted": Point(Store, "commit", after=True, nth=3),
    "first block's batch written": Point(Store, "commit", after=True, nth=1),
    "snapshot half written": HalfSnapshot(),
    "snapshot written, not in its place": Point(Path, "replace", after=False, nth=1),
    "second snapshot written, not in its place": Point(Path, "replace", after=False, nth=2),
    "snapshot in its place": Point(snapshot, "write", after=True, nth=1),
}
"""Where an authority's node dies."""

FOLLOWING: dict[str, Point | HalfSnapshot] = {
    "peer's block executed": Point(Chain, "execute_sealed", after=True, nth=4),
    "peer's block about to be written": Point(Store, "commit", after=False, nth=4),
    "peer's block written, not adopted": Point(Store, "commit", after=True, nth=4),
    "follower's snapshot half written": HalfSnapshot(),
    "follower's snapshot in its place": Point(snapshot, "write", after=True, nth=1),
}
"""Where a node that takes its blocks from a peer dies; the first commit is genesis."""

JOINING: dict[str, Point | HalfSnapshot] = {
    "blocks about to be staged": Point(Store, "stage", after=False, nth=3),
    "blocks staged, not counted": Point(Store, "stage", after=True, nth=3),
    "state nodes about to be written": Point(Store, "write_nodes", after=False, nth=4),
    "state nodes written, not walked over": Point(Store, "write_nodes", after=True, nth=4),
    "state whole, head not moved": Point(Store, "end_staging", after=False),
    "head moved, not adopted": Point(Store, "end_staging", after=True),
}
"""Where a node dies that takes a peer's chain in without executing it."""

POINTS = SEALING | FOLLOWING | JOINING


def config() -> GenesisConfig:
    return CONFIG


def hourly_clock(start_hour: int) -> Callable[[], float]:
    """An hour passes from one look to the next, so no sealer waits."""
    hours = itertools.count(start_hour)
    return lambda: EPOCH + 3600 * next(hours)


async def _send(ledger: Ledger, tell: Tell, key: Key, number: int) -> None:
    """Transactions without end; each is told once it was acknowledged, and every third is waited for."""
    while True:
        nonce = ledger.account(key.address).next_nonce
        name = await ledger.submit(raw_call(key, nonce, join(f"12D3K{'abcd'[number]}")))
        tell(name.hex())
        if nonce % 3 == number % 3:
            await ledger.wait_receipt(name)


async def _run_authority(path: Path, hour: int, senders: int, tell: Tell) -> None:
    ledger = Ledger.open(path, CONFIG, hourly_clock(hour))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Consensus(ledger, AUTHORITY).run)
        nursery.start_soon(Replay(ledger, SNAPSHOT_EVENTS).run)
        for number, key in enumerate(SENDERS[:senders]):
            nursery.start_soon(_send, ledger, tell, key, number)


async def _run_follower(path: Path, source: Path, tell: Tell) -> None:
    with open_ledger(source, CONFIG) as peer:
        blocks = peer.history.sealed_blocks(1, 10_000, 1 << 30)
    ledger = Ledger.open(path, CONFIG, hourly_clock(10_000))
    replay = Replay(ledger, SNAPSHOT_EVENTS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replay.run)
        for number, block in enumerate(blocks, 1):
            await ledger.import_blocks([block])
            tell(ledger.record(number).transactions[0].hash.hex())
            await replay.wait_change(number - 1)


async def _join(path: Path, source: Path, tell: Tell) -> None:
    with open_ledger(source, CONFIG) as peer, open_ledger(path, CONFIG, hourly_clock(10_000)) as ledger:
        fast = ledger.fast_sync
        await fast.open()
        while fast.is_possible and fast.number < peer.head.number:
            await fast.stage(peer.history.parcels(fast.number + 1, 1, 1 << 30))
            tell(fast.number)
        while fast.is_possible:
            if asked := await fast.wanted(5):
                await fast.give(asked, peer.history.state_nodes(asked, 1 << 30))
        tell(ledger.head.number)


# Jobs


def join_until_killed(tell: Tell, path: str, source: str, point: str = "") -> None:
    """A node that joins the chain of the ledger in `source` by a fast sync; told is how far it is."""
    if point:
        POINTS[point].arm()
    trio.run(_join, Path(path), Path(source), tell)


def seal_until_killed(tell: Tell, path: str, hour: int, senders: int, point: str = "") -> None:
    """A sole authority's node and accounts that send; told are the transactions it acknowledged."""
    if point:
        POINTS[point].arm()
    trio.run(_run_authority, Path(path), hour, senders, tell)


def follow_until_killed(tell: Tell, path: str, source: str, point: str) -> None:
    """A node that imports the blocks of the ledger in `source`; told is a transaction of each."""
    POINTS[point].arm()
    trio.run(_run_follower, Path(path), Path(source), tell)


def check(tell: Tell, path: str, acknowledged: list[str], hour: int, audited: bool = True) -> None:
    """What a killed node must have left; told is the head it has. Then one more block goes on top.

    An audit executes the whole chain again; without it only what is stored is held against itself.
    """
    folder = Path(path)
    with open_ledger(folder, CONFIG, hourly_clock(hour)) as ledger:
        for name in (TransactionHash(bytes.fromhex(text)) for text in acknowledged):
            assert ledger.is_pending(name) != (ledger.receipt(name) is not None), "in the chain or in the pool"
        records = list(ledger.records(0))
        assert [record.number for record in records] == list(range(ledger.head.number + 1))
        assert (records[-1].hash, records[-1].number) == (ledger.head.hash, ledger.head.number)
        folded = state.fold(state.State(), records)
        enrolled = accounts.fold(Accounts(), (event for record in records for event in record.events()))
        replay = Replay(ledger)
        replay.catch_up()
        assert replay.state == folded
        assert trio.run(replay.state_hash, replay.number) == StateHasher().hash(folded, enrolled)
        assert ledger._chain.tip.accounts == enrolled
        opened_from = -1 if ledger.opened_from is None else ledger.opened_from.number
        head = ledger.head.number
    if audited:
        assert audit.verify(folder, CONFIG).blocks == head
    with open_ledger(folder, CONFIG, hourly_clock(hour + 5000)) as ledger:
        said_final = [ballot.finalised for ballot in ledger.ballots.values() if ballot.finalised]
        trio.run(_go_on, ledger)
        assert ledger.head.number > head
        assert all(ledger.number_of(block_hash) for block_hash in said_final), "a restart makes no other block of it"
    tell({"head": head, "opened_from": opened_from, "members": len(folded.members.members)})


async def _go_on(ledger: Ledger) -> None:
    async with sealing(ledger):
        await Wallet(SENDERS[0], ledger).send(join("12D3Ka"))
