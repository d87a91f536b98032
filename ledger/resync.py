"""Beginning a ledger anew: the folder is set aside, and the next start takes the chain from the peers.

Owns the names that things get, and what an authority has to wait for then: its votes went with the folder, so it can
vote for nothing until the chain is past everything that it may have voted for. Deletes nothing.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import Conflict, Corrupt, Refused
from contracts.types import Address
from genesis.block import build
from genesis.config import GenesisConfig
from ledger import files, snapshot
from ledger.chain import Chain, Tip
from ledger.seal import iteration_of
from ledger.store import Store

if TYPE_CHECKING:
    from ledger.ledger import Ledger

NOTE_BYTES_MAX = 4096

log = logging.getLogger(__name__)


class LostVotes(msgspec.Struct, frozen=True):
    """What is known of the votes that an authority no longer has: how far the chain was, and how far its votes went."""

    number: int
    """The newest final block's, when they were lost."""
    epoch: bytes = b""
    """Of that block; empty when it could not be read."""
    iteration: int | None = None
    """The highest iteration of that epoch that it may have voted in; None when it could not be read."""


class Known(msgspec.Struct, frozen=True):
    """What could be found out about a ledger before it was set aside; `votes` only if it could be read."""

    votes: LostVotes | None
    authorities: frozenset[Address]


def note_path(ledger: Path) -> Path:
    """Where it is written that votes are lost, until the chain is past them."""
    return ledger.with_name(f"{ledger.name}.votes-lost")


def look(path: Path, config: GenesisConfig) -> Known:
    """What a ledger that may be damaged still tells, or else its snapshot, or else the genesis file. Raises Conflict
    when a process has it open or it grew from another genesis."""
    try:
        with Store(path) as store:
            tip = Chain(store, config, build(config)).tip
            iteration = max([iteration_of(tip.header), *store.ballots()])
            return Known(LostVotes(tip.number, tip.epoch, iteration), frozenset(tip.accounts.authorities))
    except Conflict:
        raise
    except Refused as error:  # damaged, or on a disk that fails: it tells nothing
        log.debug("%s", error)
    authorities = frozenset(Address(authority) for authority in config.authorities)
    try:
        kept = snapshot.decode(snapshot.path_of(path).read_bytes())
    except (OSError, Corrupt) as error:
        log.debug("%s", error)
        return Known(None, authorities)
    return Known(None, authorities | frozenset(kept.standing.accounts.authorities))


@contextmanager
def _stopped(path: Path) -> Iterator[None]:
    """Hold LevelDB's own lock, which is a POSIX record lock. Raises Conflict when another process has it."""
    descriptor = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Conflict(f"the ledger in {path} is in use by another process: stop it first") from error
    finally:
        os.close(descriptor)


def set_aside(path: Path, at: datetime, lost_votes: LostVotes | None = None) -> Path:
    """Rename the ledger's folder and its snapshot to a dated name beside; the new name.

    `lost_votes` of an authority is on disk before. Raises Conflict while a process has the ledger open.
    """
    aside = path.with_name(f"{path.name}.{at:%Y-%m-%dT%H-%M-%S}")
    if aside.exists():
        raise Conflict(f"{aside} is there already: wait a second and try again")
    try:
        with _stopped(path):
            if lost_votes is not None:
                files.replace_file(note_path(path), msgspec.json.encode(lost_votes))
            if snapshot.path_of(path).exists():
                snapshot.path_of(path).rename(snapshot.path_of(aside))
            path.rename(aside)
            files.sync_folder(path.parent)
    except OSError as error:
        raise Refused(f"the ledger in {path} cannot be set aside: {error}") from error
    return aside


def votes_lost(path: Path) -> LostVotes | None:
    """What is noted about the ledger in the folder `path`; None when no votes of it are lost. Raises Corrupt."""
    note = note_path(path)
    try:
        with note.open("rb") as file:
            return msgspec.json.decode(file.read(NOTE_BYTES_MAX), type=LostVotes)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise Corrupt(
            f'{note} cannot be read ({error}): write {{"number": N}} into it, with the number of the newest block '
            "that other nodes have, so that this authority does not vote again on what it voted on before"
        ) from error


def is_past(lost: LostVotes, tip: Tip) -> bool:
    """Whether nothing that an authority says on top of `tip` can contradict what it said before.

    Votes are of one epoch and one iteration. A single authority's are its final blocks, so it has to have those. Among
    several, it may vote again in the iterations after those that it voted in; where these are not known, in the next
    epoch, which begins when an admin removes an authority and adds it again.
    """
    if tip.number < lost.number:
        return False
    if len(tip.accounts.authorities) == 1 or (lost.epoch and tip.epoch != lost.epoch):
        return True
    return lost.iteration is not None and iteration_of(tip.header) >= lost.iteration


async def wait_past_lost_votes(ledger: Ledger) -> None:
    """Return at once unless this authority's votes are lost; then, when the chain from the peers is past them.

    This is the one place that decides when an authority votes again after a resync.
    """
    lost = votes_lost(ledger.path)
    if lost is None:
        return
    log.warning(
        "this authority's votes were set aside: it does not vote before the chain is past block %d and its votes",
        lost.number,
    )
    while not is_past(lost, ledger.tip):
        await ledger.wait_head(ledger.head.number)
        if not lost.epoch and ledger.head.number >= lost.number:
            lost = msgspec.structs.replace(lost, epoch=ledger.tip.epoch)
    note_path(ledger.path).unlink(missing_ok=True)
    log.info("the chain is past every vote that was lost: this authority votes again")
