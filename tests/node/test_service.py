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
from contracts.types import Address, ModelId, Version
from node.config import Config, NodeSettings
from node.inference.spec import Message, Parameters
from node.questions import CHECK_TIMEOUT_S
from node.rpc.values import ChatChunk, LoadState
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


# Answers


async def test_a_question_loads_the_model_first_and_tells_how_far_it_is(node: Service) -> None:
    said: list[object] = []

    async def emit(piece: ChatChunk | LoadState) -> None:
        said.append(piece)

    done = await node.chat(ALICE, M, V1, prompt=QUESTION, parameters=Parameters(), emit=emit)
    assert done.text == "hello"
    assert isinstance(said[0], LoadState)
    assert said[-1] == ChatChunk("hello")


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_load_that_fails_is_the_answer(node: Service, engine: FakeEngine, streamed: bool) -> None:
    async def emit(piece: ChatChunk | LoadState) -> None:
        await trio.lowlevel.checkpoint()

    engine.failures = [NoSpace("needs 26 GB")]
    with pytest.raises(NoSpace, match="needs 26 GB"):  # and not a group with it inside
        await node.chat(ALICE, M, V1, prompt=QUESTION, parameters=Parameters(), emit=emit if streamed else None)


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
    done = await node.chat(ALICE, M, V1, prompt=QUESTION, parameters=Parameters(), emit=None)
    assert done.text == "hello"
    assert len(engine.specs) == 2


# What an account may ask at once


def hold(account: Address, tier: str, around: Surroundings) -> None:
    around.replay.add(events.TierDefined("unlimited", 9, 8), events.TierGranted(account, tier, 1 << 40))


async def test_an_account_has_the_limits_and_the_weight_of_its_tier(
    around: Surroundings, node: Service, engine: FakeEngine
) -> None:
    hold(ALICE, "basic", around)
    await node.load_model(M, V1, wait=True)
    engine.answers = trio.Event()
    chat = partial(node.chat, ALICE, M, V1, prompt=QUESTION, parameters=Parameters(), emit=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(chat)
        nursery.start_soon(chat)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="tier basic allows 2 at once"):
            await chat()
        hold(ALICE, "unlimited", around)
        nursery.start_soon(chat)
        await trio.testing.wait_all_tasks_blocked()
        engine.answers.set()
    assert engine.asked == [(ALICE.hex(), 1)] * 2 + [(ALICE.hex(), 2)]
    assert node.questions.quota.statistics().answers == 0


async def test_an_answer_counts_for_what_it_used_also_when_nobody_waited_for_its_end(
    around: Surroundings, node: Service, engine: FakeEngine, mock_clock: trio.testing.MockClock
) -> None:
    hold(ALICE, "basic", around)
    await node.load_model(M, V1, wait=True)
    engine.answers = trio.Event()
    chat = partial(node.chat, ALICE, M, V1, prompt=QUESTION, emit=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(chat, parameters=Parameters(max_tokens=1_000)))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    engine.answers.set()
    with pytest.raises(Busy, match="up to 1500 tokens and has 1498 left of the 1500 a minute"):
        await chat(parameters=Parameters(max_tokens=1_498))
    with pytest.raises(BadInput, match="more than the 1500 a minute that tier basic allows"):
        await chat(parameters=Parameters(max_tokens=1_499))
    await chat(parameters=Parameters(max_tokens=1_496))


async def test_what_failed_before_the_engine_was_asked_costs_nothing(
    around: Surroundings, node: Service, engine: FakeEngine, mock_clock: trio.testing.MockClock
) -> None:
    hold(ALICE, "basic", around)
    engine.failures = [NoSpace("needs 26 GB")]
    chat = partial(node.chat, ALICE, M, V1, prompt=QUESTION, parameters=Parameters(max_tokens=1_498), emit=None)
    with pytest.raises(NoSpace):
        await chat()
    assert (await chat()).text == "hello"
