"""Replay: from block 0 at the start, then with the head, each block once."""

from pathlib import Path

import trio
import trio.testing

from ledger.wallet import Wallet
from node import state
from node.replay import Replay
from tests.ledger.world import ADMIN, DEADLINE_S, OPERATOR, announce, join, open_ledger, register, sealing


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
