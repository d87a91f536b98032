"""The disk is full, or fails, at any write: the node ends with one line that says so, has lost nothing that it
acknowledged, and goes on once the disk is right again."""

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ledger import crash, starved
from tests.ledger.zygote import Zygote, zygote

SAMPLE = 5
"""Places drawn for `make test`, for each error and each beginning."""

ERRORS = {errno.ENOSPC: ("NoSpace", "free space"), errno.EIO: ("Refused", "remove the cause")}
"""What the last line says."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Where the disk can be made to fail."""
    if shutil.which("gcc") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no gcc: CI has to run this")
        pytest.skip("no gcc to compile tests/ledger/faults.c with")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    with zygote({"LD_PRELOAD": str(library)}) as made:
        yield made


@pytest.fixture(params=["a new ledger", "one that was there"])
def beginning(request: pytest.FixtureRequest, failing: Zygote, tmp_path: Path) -> Path:
    """The folder of the ledger as each run finds it."""
    folder = tmp_path / "beginning"
    folder.mkdir()
    if request.param == "one that was there":
        ended = failing.run(starved.live, str(folder / "ledger"), 1, 0, 0)
        assert ended.told[-1]["refused"] == []
    return folder


def changes(failing: Zygote, beginning: Path) -> int:
    """How many there are when nothing fails."""
    shutil.copytree(beginning, beginning.with_name("unharmed"))
    ended = failing.run(starved.live, str(beginning.with_name("unharmed") / "ledger"), 100_000, 0, 0)
    assert len(ended.told) == starved.TRANSACTIONS + 1, ended.stderr
    assert ended.told[-1]["refused"] == []
    found: int = ended.told[-1]["changes"]
    assert found > 10
    return found


def fails(failing: Zygote, beginning: Path, nth: int, number: int) -> bool:
    """One life in which the disk fails from its n-th change on, and a look at what it left; whether it was noticed."""
    kind, advice = ERRORS[number]
    folder = beginning.with_name("failing")
    shutil.copytree(beginning, folder)
    ended = failing.run(starved.live, str(folder / "ledger"), 100_000, nth, number)
    assert ended.status == 0, f"change {nth}: {ended.stderr}"
    *acknowledged, end = ended.told
    for found, line in end["refused"]:
        assert found == kind, f"change {nth}: {line}"
        assert advice in line
        assert str(folder / "ledger") in line
        assert os.strerror(number) in line
    assert len(end["refused"]) <= 1, f"change {nth}: {end['refused']}"
    failing.run(crash.check, str(folder / "ledger"), acknowledged, 200_000, False).result()
    shutil.rmtree(folder)
    return bool(end["refused"])


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_drawn_writes(failing: Zygote, beginning: Path, number: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    count = changes(failing, beginning)
    drawn = random.Random(seed).sample(range(1, count + 1), SAMPLE)
    assert sum(fails(failing, beginning, nth, number) for nth in drawn) > SAMPLE // 2


@pytest.mark.soak
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_every_write(failing: Zygote, beginning: Path, number: int) -> None:
    count = changes(failing, beginning)
    assert sum(fails(failing, beginning, nth, number) for nth in range(1, count + 1)) > count // 2
