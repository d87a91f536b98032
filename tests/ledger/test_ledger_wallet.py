"""A wallet: calls in, receipts or reasons out."""

from pathlib import Path

import pytest
import trio

from contracts.errors import NotAllowed
from contracts.events import ModelRegistered
from ledger.wallet import Wallet
from tests.ledger.world import ADMIN, OPERATOR, STRANGER, join, open_ledger, register, sealing


async def test_calls_become_final_one_after_the_other(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        wallet = Wallet(ADMIN, ledger)
        assert wallet.address == ADMIN.address
        async with sealing(ledger):
            receipt = await wallet.send(register("one"))
            assert isinstance(receipt.transaction.events[0], ModelRegistered)
            async with trio.open_nursery() as nursery:
                for name in ("two", "three", "four"):
                    nursery.start_soon(wallet.send, register(name))
        nonces = [t.nonce for record in ledger.records(1) for t in record.transactions]
        assert nonces == [0, 1, 2, 3]


async def test_refusals_have_the_reason_and_cost_no_nonce(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        async with sealing(ledger):
            with pytest.raises(NotAllowed, match="sender is not an admin"):
                await Wallet(OPERATOR, ledger).send(register())
            with pytest.raises(NotAllowed, match="not enrolled"):
                await Wallet(STRANGER, ledger).send(join())
            assert (await Wallet(OPERATOR, ledger).send(join())).transaction.nonce == 0


async def test_call_that_fails_only_in_its_block(tmp_path: Path) -> None:
    """Two wallets register the same model in one block: the second learns why it failed."""
    with open_ledger(tmp_path / "ledger") as ledger:
        failures: list[str] = []

        async def send() -> None:
            try:
                await Wallet(ADMIN, ledger).send(register("one"))
            except NotAllowed as error:
                failures.append(str(error))

        async with trio.open_nursery() as nursery:
            with trio.fail_after(20):
                nursery.start_soon(send)
                await ledger.wait_pending(0)
                nursery.start_soon(send)
                await ledger.wait_pending(1)
                async with sealing(ledger):
                    await ledger.wait_head(0)
        assert failures == ["RegisterModel was refused by the contract: model is already registered"]


async def test_a_call_whose_sender_gave_up_is_waited_for_and_not_sent_again(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        wallet = Wallet(OPERATOR, ledger)
        for _ in range(3):
            with trio.move_on_after(0.05):
                await wallet.send(join())
        assert len(ledger.pending()) == 1
        async with sealing(ledger):
            assert (await wallet.send(join())).transaction.nonce == 0
            assert (await wallet.send(join())).transaction.nonce == 1, "the first one is final: this is another"
