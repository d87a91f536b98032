"""LevelDB's newest files damaged at any byte: the ledger opens to what it once was, or says that it is damaged, in
which file, and what to do. Never to anything else, never with another error."""

import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.ledger import damage
from tests.ledger.damage import LAYOUTS, Damage
from tests.ledger.zygote import Zygote

SAMPLE = 120
"""Damages drawn in each layout for `make test`."""

BATCH = 500
"""Damages in one child process."""

KINDS = ("flip", "cut")


@dataclass
class Victim:
    """A ledger, what it was after each of its writes, and every damage that can be done to its newest files."""

    path: Path
    states: list[tuple[str, int]]

    def damages(self) -> list[Damage]:
        newest = [sorted(self.path.glob(pattern))[-1:] for pattern in ("CURRENT", "MANIFEST-*", "*.log", "*.ldb")]
        sizes = {file.name: file.stat().st_size for files in newest for file in files}
        return [(name, kind, place) for name, size in sizes.items() for kind in KINDS for place in range(size)]


@pytest.fixture(params=LAYOUTS)
def victim(request: pytest.FixtureRequest, zygote: Zygote, tmp_path: Path) -> Victim:
    states = zygote.run(damage.build, str(tmp_path / "whole"), request.param).result()
    return Victim(tmp_path / "whole", states)


def outcomes(zygote: Zygote, victim: Victim, damages: list[Damage], go_on_every: int) -> Counter[str]:
    seen: Counter[str] = Counter()
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # syncs are not what is looked at here
    with TemporaryDirectory(dir=in_memory) as scratch:
        for start in range(0, len(damages), BATCH):
            some = damages[start : start + BATCH]
            told = zygote.run(damage.suffer, str(victim.path), scratch, victim.states, some, go_on_every).result()
            assert not told["failures"], "\n".join(told["failures"])
            seen.update(told["outcomes"])
    print(dict(seen))
    return seen


def test_drawn_damages(zygote: Zygote, victim: Victim) -> None:
    """Of each file and kind as many as of the others, so that the small files are not missed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    places: dict[tuple[str, str], list[Damage]] = {}
    for one in victim.damages():
        places.setdefault(one[:2], []).append(one)
    share = SAMPLE // len(places)
    drawn = [one for group in places.values() for one in chance.sample(group, min(share, len(group)))]
    seen = outcomes(zygote, victim, drawn, go_on_every=5)
    assert seen["refused"] >= len(drawn) // 3


@pytest.mark.soak
def test_every_damage(zygote: Zygote, victim: Victim) -> None:
    seen = outcomes(zygote, victim, victim.damages(), go_on_every=64)
    assert seen["refused"] > sum(seen.values()) // 3


@pytest.mark.parametrize("layout", ["tables and log", "tables"])
def test_manifest_that_lost_its_last_edit(zygote: Zygote, tmp_path: Path, layout: str) -> None:
    """LevelDB then takes the tables of that edit for leftovers and removes them: what is left must not pass for a
    ledger, and least of all for an empty one, on which an authority would begin anew."""
    path = tmp_path / "whole"
    victim = Victim(path, zygote.run(damage.build, str(path), layout).result())
    (manifest,) = path.glob("MANIFEST-*")
    cuts: list[Damage] = [(manifest.name, "cut", place) for place in range(manifest.stat().st_size)]
    assert outcomes(zygote, victim, cuts, go_on_every=1) == {"refused": len(cuts)}
