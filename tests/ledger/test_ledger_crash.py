"""kill -9 at each point of tests.ledger.crash: nothing acknowledged is lost, and what is there is whole."""

from pathlib import Path

import pytest

from ledger import snapshot
from tests.ledger import crash
from tests.ledger.zygote import Zygote

SNAPSHOT_POINTS = {point for point in crash.POINTS if "snapshot" in point}

KEPT = {
    "snapshot in its place": 0,
    "second snapshot written, not in its place": 0,
    "follower's snapshot in its place": 0,
}
"""The least block of the snapshot that the next start finds; it finds none after the other points."""


def check(zygote: Zygote, path: Path, acknowledged: list[str], point: str) -> dict[str, int]:
    left: dict[str, int] = zygote.run(crash.check, str(path), acknowledged, 20_000).result()
    assert (left["opened_from"] >= 0) == snapshot.path_of(path).exists()
    if point in SNAPSHOT_POINTS:
        assert left["opened_from"] >= KEPT[point] if point in KEPT else left["opened_from"] == -1
    return left


@pytest.mark.parametrize("point", crash.SEALING)
def test_authority(zygote: Zygote, tmp_path: Path, point: str) -> None:
    path = tmp_path / "ledger"
    ended = zygote.run(crash.seal_until_killed, str(path), 1, 1 if "second" in point else 3, point)
    assert ended.killed, ended.stderr
    left = check(zygote, path, ended.told, point)
    if point == "own transaction in the journal, not answered":
        assert len(ended.told) == 3
    assert left["head"] >= {"batch written, not adopted": 2, "finalising vote sent, its block not written": 2}.get(
        point, 0
    )


@pytest.fixture(scope="module")
def source(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peer's ledger, long enough for a snapshot."""
    path = tmp_path_factory.mktemp("peer") / "ledger"
    ended = zygote.run(crash.seal_until_killed, str(path), 1, 3, kill_after=30)
    assert ended.killed, ended.stderr
    return path


@pytest.mark.parametrize("point", crash.FOLLOWING)
def test_follower(zygote: Zygote, tmp_path: Path, source: Path, point: str) -> None:
    path = tmp_path / "ledger"
    ended = zygote.run(crash.follow_until_killed, str(path), str(source), point)
    assert ended.killed, ended.stderr
    left = check(zygote, path, ended.told, point)
    if point.startswith("peer's"):
        assert left["head"] == len(ended.told) + ("written, not adopted" in point)


@pytest.mark.parametrize("point", crash.JOINING)
def test_joiner(zygote: Zygote, tmp_path: Path, source: Path, point: str) -> None:
    """It goes on where it was, and ends with the peer's head, whole."""
    path = tmp_path / "ledger"
    ended = zygote.run(crash.join_until_killed, str(path), str(source), point)
    assert ended.killed, ended.stderr
    again = zygote.run(crash.join_until_killed, str(path), str(source))
    newest = again.told[-1]
    assert newest > 4
    if "blocks" in point:
        assert (ended.told, again.told[0]) == ([1, 2], 4 if "not counted" in point else 3)
    else:
        assert again.told == [newest], "no block is fetched again"
    assert check(zygote, path, [], point)["head"] == newest
