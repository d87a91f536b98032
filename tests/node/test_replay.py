"""Replay: from a snapshot or block 0 at the start, then with the head, each block once; its hash on every node."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from ledger import snapshot
from ledger.accounts import Accounts
from ledger.snapshot import Snapshot
from ledger.wallet import Wallet
from node import state
from node.agreement import Agreement, StateHasher, StateMark
from node.replay import CHECKPOINT_BLOCKS, CHECKPOINTS_KEPT, Replay
from tests.ledger.world import (
    ADMIN,
    DEADLINE_S,
    OPERATOR,
    Builder,
    address,
    announce,
    enrol,
    join,
    missing_blocks,
    open_chain,
    open_ledger,
    raw_call,
    register,
    sealing,
)

BLOCKS = CHECKPOINT_BLOCKS * (CHECKPOINTS_KEPT + 1) + 5
"""Of the grown chain: the oldest checkpoints are forgotten, the newest block is none."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of BLOCKS blocks that touch every projection and the accounts."""
    path = tmp_path_factory.mktemp("replay") / "ledger"
    with open_chain(path) as chain:
        builder = Builder(chain)
        builder.grow(raw_call(ADMIN, 0, register(core=True)), raw_call(OPERATOR, 0, join()))
        for number in range(2, BLOCKS + 1):
            if number % 5:
                builder.grow(raw_call(OPERATOR, chain.nonce(OPERATOR.address), announce((number % 3,))))
            else:
                call = enrol(*(address(1000 * number + i) for i in range(7)))
                builder.grow(raw_call(ADMIN, chain.nonce(ADMIN.address), call))
    return path


@pytest.fixture
def path(grown: Path, tmp_path: Path) -> Path:
    """A copy of the grown ledger, without a snapshot."""
    shutil.copytree(grown, tmp_path / "ledger")
    return tmp_path / "ledger"


@contextmanager
def attempts() -> Iterator[trio.MemoryReceiveChannel[int]]:
    """The block of each snapshot that is kept, or fails to be."""
    told, heard = trio.open_memory_channel[int](100)
    write = snapshot.write

    def tell(ledger: Path, of: Snapshot) -> None:
        try:
            write(ledger, of)
        finally:
            trio.from_thread.run_sync(told.send_nowait, of.number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "write", tell)
        yield heard


async def kept(path: Path) -> int:
    """Open the ledger, have the replay keep its snapshot, close it; the snapshot's block."""
    with open_ledger(path) as ledger, trio.fail_after(DEADLINE_S), attempts() as heard:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Replay(ledger, snapshot_events=1).run)
            await heard.receive()
            nursery.cancel_scope.cancel()
        found = snapshot.load(ledger._chain.store, ledger.genesis_hash)
    assert found is not None
    return found.number


async def marks(path: Path) -> tuple[StateMark, ...]:
    with open_ledger(path) as ledger:
        replay = Replay(ledger)
        replay.catch_up()
        return await replay.marks()


async def test_replay_follows_the_head(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        async with sealing(ledger), trio.open_nursery() as nursery:
            await Wallet(ADMIN, ledger).send(register(core=True))
            replay = Replay(ledger)
            replay.catch_up()
            assert replay.number == 1
            nursery.start_soon(replay.run)
            wallet = Wallet(OPERATOR, ledger)
            await wallet.send(join())
            await wallet.send(announce())
            found = await replay.wait_until(lambda now: bool(now.shards.announced))
            assert len(found.members.members) == 1
            await replay.wait_change(2)
            nursery.cancel_scope.cancel()
        assert replay.number == ledger.head.number == 3
        again = Replay(ledger)
        again.catch_up()
        again.catch_up()
        assert again.state == replay.state == state.fold(state.State(), ledger.records(0))
        assert again.state.registry.core == ("tiny-llama", "1")


async def test_waiters_sleep_until_something_changes(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger, trio.fail_after(DEADLINE_S):
        replay = Replay(ledger)
        replay.catch_up()
        woken: list[int] = []

        async def wait() -> None:
            await replay.wait_change(0)
            woken.append(replay.number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not woken
            async with sealing(ledger):
                await Wallet(ADMIN, ledger).send(register())
            replay.catch_up()
        assert woken == [1]


# Snapshots


async def test_snapshot_and_tail_end_where_genesis_does(path: Path) -> None:
    with open_ledger(path) as ledger:
        whole = Replay(ledger)
        whole.catch_up()
        from_genesis = await whole.marks()
    assert await kept(path) == BLOCKS // CHECKPOINT_BLOCKS * CHECKPOINT_BLOCKS
    with open_ledger(path) as ledger:
        replay = Replay(ledger)
        assert replay.number == BLOCKS // CHECKPOINT_BLOCKS * CHECKPOINT_BLOCKS
        replay.catch_up()
        assert replay.state == whole.state
        assert await replay.marks() == from_genesis[-2:]


async def test_only_the_tail_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = await kept(path)
    with open_ledger(path) as ledger:
        store, asked = ledger._chain.store, list[int]()
        real = store.records
        monkeypatch.setattr(store, "records", lambda start, stop: asked.append(start) or real(start, stop))
        Replay(ledger).catch_up()
        assert asked == [at + 1]


async def test_snapshot_of_other_projections_is_passed_over(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ledger's part of it is right, the node's is of an older version."""
    whole = await marks(path)
    await kept(path)
    with open_ledger(path) as ledger:
        assert ledger.opened_from is not None
        found = ledger.opened_from
        plain = state.encode(state.State()).replace(b"aigen state", b"aigen stale")
        snapshot.write(path, Snapshot(found.genesis_hash, found.number, found.hash, found.standing, plain))
    caplog.clear()
    assert await marks(path) == whole
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "passed over" in caplog.text


async def test_snapshots_are_as_rare_as_they_are_meant_to_be(path: Path) -> None:
    """None before so many events; then one of a checkpoint, and the next after as many again."""
    with open_ledger(path) as ledger, trio.fail_after(DEADLINE_S), attempts() as heard:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Replay(ledger, snapshot_events=100_000).run)
            nursery.start_soon(Replay(ledger, snapshot_events=30).run)
            assert await heard.receive() == 80
            async with sealing(ledger):
                for number in range(BLOCKS + 1, 113):
                    await Wallet(OPERATOR, ledger).send(announce((number % 3,)))
            assert await heard.receive() == 112, "block 96 came after 22 events"
            with pytest.raises(trio.WouldBlock):
                heard.receive_nowait()
            nursery.cancel_scope.cancel()


async def test_snapshot_that_cannot_be_kept_leaves_the_node_running(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = snapshot.path_of(path).with_name("ledger.snapshot.new")
    draft.symlink_to("/dev/full")
    with open_ledger(path) as ledger, trio.fail_after(DEADLINE_S), attempts() as heard:
        replay = Replay(ledger, snapshot_events=1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replay.run)
            await heard.receive()
            async with sealing(ledger):
                await Wallet(ADMIN, ledger).send(register("later"))
            await replay.wait_change(BLOCKS)
            nursery.cancel_scope.cancel()
    assert "cannot be written" in caplog.text
    assert not snapshot.path_of(path).exists()


# The hash


async def test_hash_of_the_newest_and_the_last_checkpoints(path: Path) -> None:
    with open_ledger(path) as ledger:
        replay = Replay(ledger)
        assert await replay.marks() == ()
        replay.catch_up()
        found = await replay.marks()
        newest = BLOCKS // CHECKPOINT_BLOCKS * CHECKPOINT_BLOCKS
        checkpoints = [newest - i * CHECKPOINT_BLOCKS for i in reversed(range(CHECKPOINTS_KEPT))]
        assert [mark.number for mark in found] == [*checkpoints, BLOCKS]
        assert len({mark.hash for mark in found}) == len(found)
        for number in (-1, 0, 1, checkpoints[0] - CHECKPOINT_BLOCKS, BLOCKS - 1, BLOCKS + 1):
            assert await replay.state_hash(number) is None
        for mark in found:
            assert await replay.state_hash(mark.number) == mark.hash
        accounts = ledger._chain.tip.accounts
        assert (
            found[-1].hash == StateHasher().hash(replay.state, accounts) != StateHasher().hash(replay.state, Accounts())
        )


async def test_hash_is_made_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = StateHasher.hash
    monkeypatch.setattr(StateHasher, "hash", lambda *given: made.append(1) or real(*given))
    with open_ledger(path) as ledger:
        replay = Replay(ledger)
        replay.catch_up()
        assert not made, "not before anyone asks"
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(replay.state_hash, BLOCKS)
        assert len(made) == 1
        await replay.marks()
        await replay.marks()
        assert len(made) == 1 + CHECKPOINTS_KEPT


async def test_nodes_at_different_heads_agree(path: Path, tmp_path: Path) -> None:
    """One sealed the blocks, the other took them in batches and is not at the head yet."""
    with open_ledger(path) as one, open_ledger(tmp_path / "other" / "ledger") as two:
        ahead, behind = Replay(one), Replay(two)
        ahead.catch_up()
        behind.catch_up()
        blocks = missing_blocks(one, two)[: BLOCKS - 7]
        for start in range(0, len(blocks), 30):
            for block in blocks[start : start + 30]:
                await two.import_blocks([block])
            behind.catch_up()
        assert behind.number == BLOCKS - 7
        assert Agreement().compare("12D3KooWB", await ahead.marks(), await behind.marks()) is True  # type: ignore[arg-type]


MARKS = """
import sys, trio
from pathlib import Path
from node.replay import Replay
from tests.ledger.world import open_ledger

async def main():
    with open_ledger(Path(sys.argv[1])) as ledger:
        replay = Replay(ledger)
        replay.catch_up()
        newest = (await replay.marks())[-1]
        print(ledger.opened_from.number if ledger.opened_from else -1, newest.number, newest.hash.hex())

trio.run(main)
"""


async def test_same_hash_in_every_process(path: Path) -> None:
    """Whatever Python's hash seed, from genesis and from a snapshot that was taken under another seed."""
    seeds = ["0", "1", str(random.randrange(1 << 32))]
    print(f"hash seeds {seeds}")

    def started(seed: str) -> list[str]:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", MARKS, str(path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    from_genesis = [started(seeds[1])]
    at = await kept(path)
    from_snapshot = [started(seeds[0]), started(seeds[2])]
    assert {found[0] for found in from_genesis} == {"-1"}
    assert {found[0] for found in from_snapshot} == {str(at)}
    assert len({tuple(found[1:]) for found in from_genesis + from_snapshot}) == 1
