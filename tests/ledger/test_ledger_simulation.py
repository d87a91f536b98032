"""Agreement under drawn faults: never two final blocks of one number, and in the end everything that was acknowledged.

Each seed is a run of its own; a failure names its seed, and `simulate` with it shows the same run again. The same
simulation has to catch variants that break one rule each.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ledger import seal
from ledger.ledger import Ledger
from ledger.simplex import Outcome, Simplex
from ledger.votes import Kind
from tests.ledger.liars import make_conspirators, make_liars
from tests.ledger.simulation import Simulation, blackout, conspiracy, reform, simulate, storm

MEMORY = Path("/dev/shm")
"""Where a virtual disk's syncs cost nothing, if there is such a place."""

WORKERS = 2

Play = Callable[[Simulation], object]
Prepare = Callable[[Simulation], None]


def memory() -> str | None:
    return str(MEMORY) if os.access(MEMORY, os.W_OK) else None


def run_honest(seed: int) -> None:
    run_one(seed, storm, lambda simulation: None)


def run_reformed(seed: int) -> None:
    run_one(seed, reform, lambda simulation: None)


def run_with_liars(seed: int) -> None:
    run_one(seed, storm, make_liars)


def run_reformed_with_liars(seed: int) -> None:
    run_one(seed, reform, make_liars)


def run_blackout(seed: int) -> None:
    run_one(seed, blackout, lambda simulation: None)


def run_conspiracy(seed: int) -> None:
    simulation = run_one(seed, conspiracy, make_conspirators)
    assert simulation.proved == simulation.liars, f"seed {seed}: a liar is not proved to be one"


def run_one(seed: int, play: Play, prepare: Prepare) -> Simulation:
    logging.disable(logging.ERROR)  # what the faults lead to is expected here
    with TemporaryDirectory(dir=memory()) as folder:
        try:
            return simulate(Path(folder) / "nodes", seed, 4 + seed % 4, play, prepare)
        except BaseException as error:  # noqa: BLE001 - whatever it was is raised again, with the seed
            # A traceback does not pass from one process to another whole; the seed is what counts.
            raise AssertionError(f"seed {seed} of {play.__name__}: {flat(error)}") from None


def flat(error: BaseException) -> str:
    """An error's own words, however many groups it lies in."""
    return "; ".join(map(flat, error.exceptions)) if isinstance(error, BaseExceptionGroup) else repr(error)


KINDS = {
    f.__name__: f
    for f in (
        run_honest,
        run_reformed,
        run_with_liars,
        run_reformed_with_liars,
        run_blackout,
        run_conspiracy,
    )
}


def run_all(kind: str, seeds: range) -> None:
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        list(pool.map(KINDS[kind], seeds))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("run_honest", 50),
        ("run_reformed", 15),
        ("run_with_liars", 10),
        ("run_reformed_with_liars", 5),
        ("run_blackout", 4),
        ("run_conspiracy", 2),
    ],
)
def test_no_two_final_blocks_and_nothing_lost(kind: str, count: int) -> None:
    run_all(kind, range(count))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("run_honest", 1000),
        ("run_reformed", 400),
        ("run_with_liars", 300),
        ("run_reformed_with_liars", 100),
        ("run_blackout", 200),
        ("run_conspiracy", 100),
    ],
)
def test_thousands_of_seeds(kind: str, count: int) -> None:
    run_all(kind, range(1000, 1000 + count))


# Rules that matter: the same simulation notices when any one of them is broken


@contextmanager
def without_a_journal() -> Iterator[None]:
    """What was said is forgotten with the process."""

    async def forget(self: Ledger, ballots: object, epoch: bytes) -> bool:
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "cast", forget)
        yield


@contextmanager
def with_a_mere_majority() -> Iterator[None]:
    """Half of the authorities and one decide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seal, "quorum", lambda count: count // 2 + 1)
        yield


@contextmanager
def finalising_after_a_timeout() -> Iterator[None]:
    """Who voted for the dummy votes to finalise as well."""
    end_iteration = Simplex._end_iteration

    def careless(self: Simplex, outcome: Outcome) -> bool:
        iteration, ballot = self.iteration, self.ballot
        went_on = end_iteration(self, outcome)
        blocks = [p for p in self.round(iteration).proposals.values() if self.is_notarised(p)]
        if went_on and blocks and ballot.timed_out and self._key is not None and not ballot.finalised:
            self.iteration -= 1
            self._say(outcome, Kind.FINALISE, blocks[0].hash, finalised=blocks[0].hash)
            self.iteration += 1
        return went_on

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simplex, "_end_iteration", careless)
        yield


TWO_BLOCKS, NO_LIAR = "two final blocks", "evidence against an honest authority"


def finds(what: str, seed: int, size: int, play: Play, prepare: Prepare) -> bool:
    with TemporaryDirectory(dir=memory()) as folder:
        try:
            simulate(Path(folder) / "nodes", seed, size, play, prepare)
        except BaseException as error:  # noqa: BLE001 - anything but that one is no find
            return what in flat(error)
        return False


@pytest.mark.parametrize(
    ("broken", "what", "size", "play", "prepare"),
    [
        (without_a_journal, TWO_BLOCKS, 4, blackout, lambda simulation: None),
        (with_a_mere_majority, TWO_BLOCKS, 5, conspiracy, make_conspirators),
        # Two final blocks take more than that: one seed in thirty, and the script in test_ledger_simplex.
        (finalising_after_a_timeout, NO_LIAR, 4, conspiracy, make_conspirators),
    ],
)
def test_a_broken_rule_is_found(
    broken: Callable[[], AbstractContextManager[None]], what: str, size: int, play: Play, prepare: Prepare
) -> None:
    with broken():
        assert any(finds(what, seed, size, play, prepare) for seed in range(20))
