"""The node behind its RPC: steps, tier checks, and answers from a model that has to be loaded first."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from contracts import events
from contracts.calls import Call
from contracts.errors import BadInput, Busy, NoSpace
from contracts.types import Address, ModelId, TransactionHash, Version
from node import receipts
from node.config import Config, InferenceSettings, NodeSettings
from node.inference.spec import Message, Parameters, Prompt
from node.questions import CHECK_TIMEOUT_S
from node.rpc.port import Emit
from node.rpc.values import Answered, ChatChunk, LoadState, TierCheck
from node.service import STEP_NAMES, Service, Steps
from tests.node.fakes import OPERATOR, FakeControl, FakeEngine, Surroundings, service, surroundings

ALICE = Address(b"\xaa" * 20)
M, V1 = ModelId("m"), Version("1")
QUESTION = (Message("user", "hello"),)


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    return surroundings(tmp_path)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def node(around: Surroundings, engine: FakeEngine, nursery: trio.Nursery) -> Service:
    return service(around, engine, nursery)


# Steps


def test_a_step_that_failed_says_why_until_it_is_tried_again() -> None:
    steps = Steps()
    assert steps.current() == ""

    def fetch() -> None:
        with steps.running("fetch missing shards"):
            assert steps.current() == "fetch missing shards"
            raise Busy("nobody has it")

    with pytest.raises(Busy):
        fetch()
    assert steps.steps["fetch missing shards"].detail == "nobody has it"
    assert steps.steps["fetch missing shards"].state == "failed"
    assert steps.current() == "fetch missing shards"
    with steps.running("fetch missing shards"):
        steps.note("fetch missing shards", "3 of 8")
    assert steps.steps["fetch missing shards"].detail == "3 of 8"
    assert steps.steps["fetch missing shards"].state == "done"
    assert steps.current() == ""


async def test_without_peers_the_step_says_why(node: Service) -> None:
    control = FakeControl()
    node.control = control.statistics
    control.unreachable = {node.node_id: "wrong genesis: theirs is 0x12"}
    node.steps.set(STEP_NAMES[1], "running", "waiting for its transaction to enter a block")
    shown = node._explained(node.steps.steps[STEP_NAMES[1]])
    assert "waiting for its transaction" in shown.detail
    assert "wrong genesis: theirs is 0x12" in shown.detail
    control.peers = (node.node_id,)
    assert node._explained(node.steps.steps[STEP_NAMES[1]]) == node.steps.steps[STEP_NAMES[1]]


# The core model


async def test_the_core_model_is_the_version_the_ledger_designates(around: Surroundings, node: Service) -> None:
    assert node.core_model() is None
    around.replay.add(events.CoreModelSet("m", "1"))
    model = msgspec.structs.replace(around.model)
    around.replay.add(
        events.ModelRegistered(
            *("m", "2", model.total_size, model.shard_size, model.shard_count, model.shard_hashes),
            *(model.manifest_hash, "basic", False, "", "", OPERATOR),
        )
    )
    assert node.core_model() == ("m", "1"), "not the newest one"
    node.config = Config(node=NodeSettings(model="other"))
    assert node.core_model() == ("other", None)


# Tier checks


class CheckingWallet:
    """Makes the check's event, after a while."""

    address = OPERATOR

    def __init__(self, around: Surroundings, wait_s: float) -> None:
        self._around = around
        self._wait_s = wait_s
        self.sent: list[Call] = []

    async def send(self, call: Call) -> Any:
        self.sent.append(call)
        await trio.sleep(self._wait_s)
        event = events.TierChecked(ALICE, "m", "1", "basic", "basic", True, 1 << 40, OPERATOR)
        self._around.replay.add(event)
        record = SimpleNamespace(events=(event,), hash=bytes(32))
        return SimpleNamespace(block_number=self._around.replay.number, transaction=record)


async def test_many_checks_at_once_are_one_transaction(
    around: Surroundings, node: Service, autojump_clock: trio.testing.MockClock
) -> None:
    wallet = around.replication.wallet = CheckingWallet(around, 1.0)  # type: ignore[assignment]
    found = []

    async def check() -> None:
        found.append(await node.check_tier(ALICE, M, V1))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(check)
    assert len(wallet.sent) == 1
    assert len(set(found)) == 1
    assert found[0].granted
    assert node.questions._checking == {}


async def test_a_check_that_no_authority_seals_ends_with_a_reason(
    around: Surroundings, node: Service, autojump_clock: trio.testing.MockClock
) -> None:
    around.replication.wallet = CheckingWallet(around, CHECK_TIMEOUT_S * 2)  # type: ignore[assignment]
    with pytest.raises(Busy, match="no block after 30 s"):
        await node.check_tier(ALICE, M, V1)
    assert node.questions._checking == {}


async def test_a_check_says_in_which_block_it_is_made_or_standing(around: Surroundings, node: Service) -> None:
    transaction_hash = TransactionHash(bytes(32))
    event = events.TierChecked(ALICE, "m", "1", "basic", "basic", True, 1 << 40, OPERATOR)
    ledger: Any = node.ledger
    ledger.blocks[transaction_hash] = 42
    around.replay.add(event)
    standing = await node.check_tier(ALICE, M, V1)
    assert (standing.transaction_hash, standing.block_number) == (transaction_hash, 42)


async def test_a_check_that_is_made_says_its_block(
    around: Surroundings, node: Service, autojump_clock: trio.testing.MockClock
) -> None:
    around.replication.wallet = CheckingWallet(around, 0)  # type: ignore[assignment]
    made = await node.check_tier(ALICE, M, V1)
    assert made.block_number == around.replay.number


# Answers

CHECK = TierCheck(ALICE, M, V1, "basic", "basic", True, 1 << 40, TransactionHash(b"\x0c" * 32), 12)
ID = "ab" * 16


async def ask(node: Service, emit: Emit | None = None, prompt: Prompt = QUESTION) -> Answered:
    return await node.chat(CHECK, prompt=prompt, parameters=Parameters(seed=1), emit=emit, receipt_id=ID)


async def test_a_question_loads_the_model_first_and_tells_how_far_it_is(node: Service) -> None:
    said: list[object] = []

    async def emit(piece: ChatChunk | LoadState) -> None:
        said.append(piece)

    done = await ask(node, emit)
    assert done.completion.text == "hello"
    assert isinstance(said[0], LoadState)
    assert said[-1] == ChatChunk("hello")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_load_that_fails_is_the_answer(node: Service, engine: FakeEngine, streamed: bool) -> None:
    async def emit(piece: ChatChunk | LoadState) -> None:
        await trio.lowlevel.checkpoint()

    engine.failures = [NoSpace("needs 26 GB")]
    with pytest.raises(NoSpace, match="needs 26 GB"):  # and not a group with it inside
        await ask(node, emit if streamed else None)


async def test_a_model_evicted_before_the_answer_is_loaded_again(
    node: Service, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = node.loading.wait
    evictions = [1]

    async def wait_and_lose(model: Any, pin: bool = False) -> LoadState:
        state = await wait(model, pin)
        if evictions:
            evictions.pop()
            engine.evict("m@1")
        return state

    monkeypatch.setattr(node.loading, "wait", wait_and_lose)
    done = await ask(node)
    assert done.completion.text == "hello"
    assert len(engine.specs) == 2


# What an account may ask at once


async def test_an_account_has_the_limits_and_the_weight_of_its_tier(
    around: Surroundings, node: Service, engine: FakeEngine
) -> None:
    around.replay.add(events.TierDefined("unlimited", 9, 8))
    await node.load_model(M, V1, wait=True)
    engine.answers = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, node)
        nursery.start_soon(ask, node)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="tier basic allows 2 at once"):
            await ask(node)
        check = msgspec.structs.replace(CHECK, held="unlimited")
        nursery.start_soon(
            partial(node.chat, check, prompt=QUESTION, parameters=Parameters(), emit=None, receipt_id=ID)
        )
        await trio.testing.wait_all_tasks_blocked()
        engine.answers.set()
    assert engine.asked == [(ALICE.hex(), 1)] * 2 + [(ALICE.hex(), 2)]
    assert node.questions.quota.statistics().answers == 0


async def ask_for(node: Service, max_tokens: int) -> Answered:
    parameters = Parameters(max_tokens=max_tokens)
    return await node.chat(CHECK, prompt=QUESTION, parameters=parameters, emit=None, receipt_id=ID)


async def test_an_answer_counts_for_what_it_used_also_when_nobody_waited_for_its_end(
    node: Service, engine: FakeEngine, mock_clock: trio.testing.MockClock
) -> None:
    await node.load_model(M, V1, wait=True)
    engine.answers = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask_for, node, 1_000)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    engine.answers.set()
    with pytest.raises(Busy, match="up to 1500 tokens and has 1498 left of the 1500 a minute"):
        await ask_for(node, 1_498)
    with pytest.raises(BadInput, match="more than the 1500 a minute that tier basic allows"):
        await ask_for(node, 1_499)
    await ask_for(node, 1_496)


async def test_what_failed_before_the_engine_was_asked_costs_nothing(
    node: Service, engine: FakeEngine, mock_clock: trio.testing.MockClock
) -> None:
    engine.failures = [NoSpace("needs 26 GB")]
    with pytest.raises(NoSpace):
        await ask_for(node, 1_498)
    assert (await ask_for(node, 1_498)).completion.text == "hello"


# Receipts


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_answer_has_a_receipt_of_what_it_was(around: Surroundings, node: Service, streamed: bool) -> None:
    async def emit(piece: ChatChunk | LoadState) -> None:
        assert node.answer_receipt(ID) is None
        await trio.lowlevel.checkpoint()

    answered = await ask(node, emit if streamed else None)
    receipt = answered.receipt
    assert receipt is not None
    receipt.check()
    assert node.answer_receipt(ID) == receipt
    assert (receipt.receipt_id, receipt.model_id, receipt.version, receipt.precision) == (ID, "m", "1", "bf16")
    assert receipt.manifest_hash == f"0x{around.model.manifest_hash.hex()}"
    assert receipt.is_of(ALICE)
    assert (receipt.check_transaction_hash, receipt.check_block_number) == ("0x" + "0c" * 32, 12)
    assert receipt.prompt_hash == receipts.prompt_hash(QUESTION)
    assert receipt.answer_hash == receipts.answer_hash("hello")
    assert receipt.parameters["seed"] == 1


async def test_the_receipt_has_the_precision_of_the_model_that_answered(
    around: Surroundings, node: Service, engine: FakeEngine
) -> None:
    """Loaded anew in another one while the answer is on its way out."""

    async def emit(piece: ChatChunk | LoadState) -> None:
        if isinstance(piece, ChatChunk):
            engine.load_in("m@1", "int4")

    await ask(node)
    answered = await ask(node, emit)
    assert node.loading.precision(around.model) == "int4"
    assert answered.receipt is not None
    assert answered.receipt.precision == "bf16"


async def test_an_answer_that_is_broken_off_has_none(node: Service) -> None:
    async with trio.open_nursery() as nursery:

        async def emit(piece: ChatChunk | LoadState) -> None:
            if isinstance(piece, ChatChunk):
                nursery.cancel_scope.cancel()
                await trio.lowlevel.checkpoint()

        nursery.start_soon(ask, node, emit)
    assert node.answer_receipt(ID) is None


async def test_without_receipts_there_are_none(around: Surroundings, engine: FakeEngine, nursery: trio.Nursery) -> None:
    node = service(around, engine, nursery, Config(inference=InferenceSettings(receipts=False)))
    answered = await ask(node)
    assert answered.completion.text == "hello"
    assert answered.receipt is None
    assert not node.gives_receipts
    assert node.answer_receipt(ID) is None
