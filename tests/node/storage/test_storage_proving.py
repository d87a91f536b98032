"""Hashing shards in another process: what it finds is the same, and no end of it, of ours or of a task is missed."""

import os
import signal
import subprocess
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from storage_helpers import noise, piece_hashes

from contracts.errors import BadInput, Busy, NotFound
from contracts.types import PIECE_SIZE, ShardHash
from node.storage import proving
from node.storage.hashing import BLOCK_SIZE
from node.storage.proving import NICENESS, PORTION_BYTES, Prover, damaged_pieces

DATA = noise(BLOCK_SIZE + PIECE_SIZE + 17, seed=8)
HASHES = piece_hashes(DATA)
NAME = ShardHash(sha256(DATA).digest())
OTHER = ShardHash(sha256(b"other").digest())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def prover() -> Iterator[Prover]:
    prover = Prover()
    yield prover
    prover.close()


def ignore(count: int) -> None:
    pass


def damage(path: Path) -> None:
    path.write_bytes(DATA[:PIECE_SIZE] + b"\0\0\0" + DATA[PIECE_SIZE + 3 : -1])


def test_what_is_whole_is_read_once_and_what_is_not_twice(path: Path) -> None:
    read: list[int] = []
    assert damaged_pieces(path, NAME, HASHES, read.append) == []
    assert sum(read) == len(DATA)
    damage(path)
    read.clear()
    assert damaged_pieces(path, NAME, HASHES, read.append) == [1, 9]
    assert sum(read) == 2 * (len(DATA) - 1)


def test_the_other_process_finds_the_same_and_gives_way(path: Path, prover: Prover) -> None:
    read: list[int] = []
    assert prover.damaged_pieces(path, NAME, HASHES, read.append) == []
    assert read == [len(DATA)]
    pid = prover.pid
    assert pid is not None
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    damage(path)
    assert prover.damaged_pieces(path, NAME, HASHES, ignore) == [1, 9]
    assert prover.pid == pid


def test_progress_is_told_in_portions(tmp_path: Path, prover: Prover) -> None:
    path = tmp_path / "large"
    data = bytes(PORTION_BYTES + 5)
    path.write_bytes(data)
    read: list[int] = []
    name = ShardHash(sha256(data).digest())
    assert prover.damaged_pieces(path, name, piece_hashes(data), read.append) == []
    assert read == [PORTION_BYTES, 5]


def test_a_refusal_keeps_its_kind_and_the_process(path: Path, prover: Prover) -> None:
    with pytest.raises(BadInput, match="belong to another shard"):
        prover.damaged_pieces(path, OTHER, HASHES, ignore)
    pid = prover.pid
    with pytest.raises(NotFound, match="no such file"):
        prover.damaged_pieces(path.with_name("absent"), NAME, HASHES, ignore)
    assert prover.damaged_pieces(path, NAME, HASHES, ignore) == []
    assert prover.pid == pid


def test_its_death_is_an_error_and_the_next_shard_has_another(path: Path, prover: Prover) -> None:
    def kill(count: int) -> None:
        assert prover.pid is not None
        os.kill(prover.pid, signal.SIGKILL)

    with pytest.raises(Busy, match=r"ended \(SIGKILL, perhaps out of memory\) while it worked on .*shard; try again"):
        prover.damaged_pieces(path, NAME, HASHES, kill)
    assert prover.pid is None
    assert prover.damaged_pieces(path, NAME, HASHES, ignore) == []


def test_one_that_died_idle_is_not_missed(path: Path, prover: Prover) -> None:
    prover.damaged_pieces(path, NAME, HASHES, ignore)
    assert prover.pid is not None
    os.kill(prover.pid, signal.SIGTERM)
    os.waitid(os.P_PID, prover.pid, os.WEXITED | os.WNOWAIT)
    assert prover.damaged_pieces(path, NAME, HASHES, ignore) == []


def test_half_a_report_is_none(path: Path, prover: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proving, "_start", lambda: subprocess.Popen(["printf", '{"type":"Fou'], stdin=-1, stdout=-1))
    with pytest.raises(Busy, match="while it worked on"):
        prover.damaged_pieces(path, NAME, HASHES, ignore)


def test_one_that_cannot_start_is_an_error(path: Path, prover: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(path))
    with pytest.raises(Busy, match="can be started: Permission denied; try again"):
        prover.damaged_pieces(path, NAME, HASHES, ignore)


def test_it_sees_no_secret_of_the_node(path: Path, prover: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIGEN_PASSWORD", "hunter2")
    prover.damaged_pieces(path, NAME, HASHES, ignore)
    environment = Path(f"/proc/{prover.pid}/environ").read_bytes()
    assert b"PYTHONPATH=" in environment
    assert b"hunter2" not in environment


def test_any_path_the_file_system_has(tmp_path: Path, prover: Prover) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    path.write_bytes(DATA)
    assert prover.damaged_pieces(path, NAME, HASHES, ignore) == []


def test_who_gives_up_ends_it(path: Path, prover: Prover) -> None:
    pids = []

    def give_up(count: int) -> None:
        pids.append(prover.pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prover.damaged_pieces(path, NAME, HASHES, give_up)
    assert prover.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_it_ends_with_the_node_in_the_middle_of_a_shard(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = proving._start
    monkeypatch.setattr(proving, "_start", lambda: started.append(start()) or started[-1])
    prover = Prover()

    def leave(count: int) -> None:
        """What the kernel does with the pipes of a node that is killed."""
        (process,) = started
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait() == 0
        assert rest == b"", "it goes on when it is told to"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prover.damaged_pieces(path, NAME, HASHES, leave)
