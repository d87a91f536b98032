"""How long blocks take to become final, as the node that proposes them has it."""

import time
from pathlib import Path

import trio

from ledger.consensus import Consensus
from ledger.stopwatch import OwnBlocks, Stopwatch
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    DEADLINE_S,
    GENESIS,
    address,
    enrol,
    missing_blocks,
    open_ledger,
    raw_call,
    sealing,
)


async def test_each_own_block_is_measured_and_nobody_elses(tmp_path: Path) -> None:
    began = time.time()
    with open_ledger(tmp_path / "one") as one, open_ledger(tmp_path / "two") as two:
        proposer, follower = Consensus(one, AUTHORITY), Consensus(two, None)
        assert proposer.statistics().own_blocks == OwnBlocks()
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(proposer.run)
                nursery.start_soon(follower.run)
                for nonce in range(3):
                    await one.wait_receipt(await one.submit(raw_call(ADMIN, nonce, enrol(address(nonce)))))
                    for block in missing_blocks(one, two):
                        await two.import_blocks([block])
                nursery.cancel_scope.cancel()
        found = proposer.statistics().own_blocks
        assert (found.count, found.newest_number) == (one.head.number, one.head.number) == (3, 3)
        assert began < found.newest_began_at < time.time()
        assert 0 < found.seconds < time.time() - began
        assert follower.statistics().own_blocks == OwnBlocks()


async def test_a_block_that_lost_against_another_is_forgotten(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        stopwatch = Stopwatch(ledger)
        lost, next_one = (GENESIS.header.copy(block_number=number) for number in (1, 2))
        stopwatch.start(lost, trio.current_time())
        stopwatch.start(next_one, trio.current_time())
        async with sealing(ledger):
            await ledger.wait_receipt(await ledger.submit(raw_call(ADMIN, 0, enrol(address(1)))))
        stopwatch.look()
        assert stopwatch.own_blocks == OwnBlocks()
        assert [run.number for run in stopwatch._running.values()] == [2], "of that one nothing is known yet"
