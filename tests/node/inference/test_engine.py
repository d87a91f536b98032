"""The engine with its real process: loads, answers, crashes, restarts, and never outlives the node."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import trio

from contracts.errors import BadInput, Busy, Conflict, Corrupt, NoSpace, NotFound
from node.inference.engine import Engine, EngineSettings
from node.inference.spec import Message, ModelSpec, Parameters
from tests.node.network.fakes import until

from . import tiny
from .home import DEADLINE_S, Home, at_home, set_up

TOKEN_BYTES = 768
"""Of the tiny model's conversations."""

LONG = Parameters(max_tokens=280, temperature=1.0, seed=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root = tmp_path_factory.mktemp("engine")
    # Without an end token an answer goes on until its limit: there is time to interrupt it.
    directory = tiny.save(root / "model", "llama", eos_token_id=None)
    (directory / "generation_config.json").unlink()
    tiny.edit_json(directory / "tokenizer_config.json", eos_token=None)
    return tiny.cut(directory, root / "shards", 16384)


def renamed(spec: ModelSpec, key: str) -> ModelSpec:
    return msgspec.structs.replace(spec, key=key)


@pytest.fixture(scope="module")
def engine(spec: ModelSpec) -> Iterator[Home]:
    with Home(2 * spec.total_size + 900 * TOKEN_BYTES) as home:
        yield home


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def is_mapped(pid: int | None, path: str) -> bool:
    return path in Path(f"/proc/{pid}/maps").read_text()


@at_home
async def test_load_answer_unload(engine: Engine, spec: ModelSpec) -> None:
    before = engine.statistics()
    loaded = await engine.load(spec)
    assert (loaded.architecture, loaded.precision, loaded.pinned) == ("LlamaForCausalLM", "fp32", False)
    assert await engine.load(spec) == loaded
    messages = (Message("user", "The capital?"),)
    pieces = []
    async with engine.generate(spec.key, messages, Parameters(max_tokens=20)) as answer:
        async for chunk in answer:
            pieces.append(chunk)
    whole = await engine.complete(spec.key, messages, Parameters(max_tokens=20))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].finish_reason == whole.finish_reason == "length"
    assert whole.usage.completion_tokens == 20
    statistics = engine.statistics()
    assert statistics.requests_total - before.requests_total == 2
    assert statistics.requests_active == 0
    assert statistics.completion_tokens_total - before.completion_tokens_total == 40
    assert statistics.models == engine.loaded() == (loaded,)
    assert is_mapped(statistics.pid, spec.shards[0])
    await engine.unload(spec.key)
    assert not is_mapped(statistics.pid, spec.shards[0]), "the memory is back"
    with pytest.raises(NotFound, match="loaded are: none"):
        await engine.complete(spec.key, "hello", Parameters())


@at_home
async def test_the_pinned_model_stays_whatever_is_asked(engine: Engine, spec: ModelSpec) -> None:
    assert (await engine.load(spec, pin=True)).pinned
    await engine.load(renamed(spec, "b@1"))
    await engine.load(renamed(spec, "c@1"))
    assert [model.key for model in engine.loaded()] == [spec.key, "c@1"]
    with pytest.raises(Conflict, match="pinned core model"):
        await engine.unload(spec.key)
    await engine.load(renamed(spec, "c@1"), pin=True)
    with pytest.raises(NoSpace, match=r"pinned tiny@1 .* c@1"):
        await engine.load(renamed(spec, "d@1"))
    engine.unpin(spec.key)
    await engine.load(renamed(spec, "d@1"))
    assert [model.key for model in engine.loaded()] == ["c@1", "d@1"]
    await engine.unload("c@1", unpin=True)


@at_home
async def test_a_model_in_use_is_waited_for_and_then_refused(
    engine: Engine, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_settings", replace(engine._settings, load_wait_s=0.05))
    await engine.load(renamed(spec, "core@1"), pin=True)
    await engine.load(spec)
    async with engine.generate(spec.key, "hello", LONG) as answer:
        await anext(answer)
        with pytest.raises(Busy, match="in use tiny@1"):
            await engine.load(renamed(spec, "b@1"))
        with pytest.raises(Busy, match="answering 1 requests"):
            await engine.unload(spec.key)
    await engine.load(renamed(spec, "b@1"))
    assert [model.key for model in engine.loaded()] == ["core@1", "b@1"]


@at_home
async def test_a_load_waits_until_the_model_in_use_is_free(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(renamed(spec, "core@1"), pin=True)
    await engine.load(spec)
    async with trio.open_nursery() as nursery, engine.generate(spec.key, "hello", LONG) as answer:
        nursery.start_soon(engine.load, renamed(spec, "b@1"))
        await anext(answer)
        assert [model.key for model in engine.loaded()] == ["core@1", spec.key]
    assert [model.key for model in engine.loaded()] == ["core@1", "b@1"]


@at_home
async def test_many_answers_at_once_are_the_same_as_one(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec)
    parameters = Parameters(max_tokens=15)
    prompts = [f"Number {number} is" for number in range(12)]
    single = [(await engine.complete(spec.key, prompt, parameters)).text for prompt in prompts]
    together: dict[str, str] = {}

    async def ask(prompt: str) -> None:
        together[prompt] = (await engine.complete(spec.key, prompt, parameters)).text

    async with trio.open_nursery() as nursery:
        for prompt in prompts:
            nursery.start_soon(ask, prompt)
    assert [together[prompt] for prompt in prompts] == single


@at_home
async def test_a_prompt_that_begins_as_an_earlier_one_is_not_read_again(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec)
    parameters = Parameters(max_tokens=15)
    turns = (Message("user", "The capital of France, the capital of Norway, and all the capitals that there are?"),)
    first = await engine.complete(spec.key, turns, parameters)
    assert first.usage.cached_tokens == 0
    again = await engine.complete(spec.key, turns, parameters)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    assert (again.text, again.finish_reason) == (first.text, first.finish_reason)
    more = (*turns, Message("assistant", first.text), Message("user", "And then?"))
    went_on = await engine.complete(spec.key, more, parameters)
    assert went_on.usage.cached_tokens >= first.usage.prompt_tokens - 1
    await engine.unload(spec.key)
    await engine.load(spec)
    assert (await engine.complete(spec.key, more, parameters)).usage.cached_tokens == 0
    assert (await engine.complete(spec.key, more, parameters)).text == went_on.text


@at_home
async def test_an_answer_is_the_same_with_and_without_an_earlier_one(engine: Engine, tmp_path: Path) -> None:
    """In bf16, where a token that is fed alone rounds otherwise than with others."""
    half = tiny.save(tmp_path / "half", "llama", torch.bfloat16)
    spec = tiny.cut(half, tmp_path / "shards", 16384)
    parameters = Parameters(max_tokens=25)
    prompts = [f"The capital of France, the capital of Norway, and the {number} others:" for number in range(8)]
    for prompt in prompts:
        await engine.load(spec)
        alone = await engine.complete(spec.key, prompt, parameters)
        again = await engine.complete(spec.key, prompt, parameters)
        assert (alone.usage.cached_tokens, again.usage.cached_tokens) == (0, again.usage.prompt_tokens - 1)
        assert again.text == alone.text
        await engine.unload(spec.key)


@at_home
async def test_who_asks_once_is_answered_among_the_first_of_who_asks_all_the_time(
    engine: Engine, spec: ModelSpec
) -> None:
    """There is memory for four answers at once."""
    ended: list[str] = []
    set_up(engine, spec.total_size + 900 * TOKEN_BYTES)
    await engine.load(spec)
    pid = engine.statistics().pid
    assert pid is not None

    async def ask(account: str) -> None:
        async with engine.generate(spec.key, "hello", Parameters(max_tokens=200), account) as answer:
            usage = (await answer.collect()).usage
            ended.append(account)
            assert answer.tokens == usage.total_tokens

    async with trio.open_nursery() as askers:
        os.kill(pid, signal.SIGSTOP)
        for account in [*["many"] * 12, "once"]:
            askers.start_soon(ask, account)
            await trio.testing.wait_all_tasks_blocked()
        assert engine.statistics().requests_waiting == 13
        os.kill(pid, signal.SIGCONT)
    assert engine.statistics().requests_waiting == 0
    assert len(ended) == 13
    assert ended.index("once") < 8, "in the second four"


@at_home
async def test_an_answer_waits_for_memory_and_one_that_never_fits_is_refused(engine: Engine, spec: ModelSpec) -> None:
    set_up(engine, spec.total_size + 300 * TOKEN_BYTES)
    await engine.load(spec)
    with pytest.raises(NoSpace, match="ask for at most 300 tokens"):
        await engine.complete(spec.key, "hello", Parameters(max_tokens=300))
    totals: list[int] = []

    async def ask(tokens: int) -> None:
        totals.append((await engine.complete(spec.key, "hello", Parameters(max_tokens=tokens))).usage.total_tokens)

    async with trio.open_nursery() as askers:
        for tokens in (200, 201, 5):
            askers.start_soon(ask, tokens)
            await trio.testing.wait_all_tasks_blocked()
    assert min(totals) < 20
    assert len(totals) == 3


@at_home
async def test_a_load_waits_for_answers_that_have_its_room(engine: Engine, spec: ModelSpec) -> None:
    other = renamed(spec, "b@1")
    set_up(engine, 2 * spec.total_size + 200 * TOKEN_BYTES, load_wait_s=0.05)
    await engine.load(spec)
    async with engine.generate(spec.key, "hello", LONG) as answer:
        await anext(answer)
        with pytest.raises(Busy, match="answers under way take more than the 153600"):
            await engine.load(other)
        assert [model.key for model in engine.loaded()] == [spec.key]
    await engine.load(other)
    with pytest.raises(NoSpace, match="ask for at most 200 tokens"):
        await engine.complete(spec.key, "hello", LONG)
    await engine.unload(other.key)
    async with engine.generate(spec.key, "hello", LONG) as answer:
        await anext(answer)


@at_home
async def test_an_answer_that_waits_and_no_longer_fits_is_refused_and_the_others_go_on(
    engine: Engine, spec: ModelSpec
) -> None:
    """A load takes the room that it waits for."""
    longest = Parameters(max_tokens=480, temperature=1.0, seed=1)
    set_up(engine, 2 * spec.total_size + 200 * TOKEN_BYTES, load_wait_s=0.05)
    await engine.load(spec)
    pid = engine.statistics().pid
    async with (
        engine.generate(spec.key, "hello", longest) as one,
        engine.generate(spec.key, "hello", longest) as other,
        engine.generate(spec.key, "hello", longest) as waiting,
    ):
        await anext(one)
        await anext(other)
        with pytest.raises(Busy, match="answers under way"):
            await engine.load(renamed(spec, "b@1"))
        with pytest.raises(NoSpace, match="ask for at most 200 tokens"):
            await waiting.collect()
        assert (await one.collect()).finish_reason == (await other.collect()).finish_reason == "length"
    assert engine.statistics().pid == pid


@at_home
async def test_leaving_an_answer_frees_its_place(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec)
    for _ in range(20):
        async with engine.generate(spec.key, "hello", LONG) as answer:
            await anext(answer)
    assert engine.statistics().requests_active == 0
    # If the twenty were still being worked on, this one would wait behind them for a place.
    await engine.complete(spec.key, "hello", Parameters(max_tokens=2))
    await engine.unload(spec.key)


@at_home
async def test_bad_requests_are_refused_one_by_one(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec)
    pid = engine.statistics().pid
    for parameters, line in (
        (Parameters(max_tokens=0), "max_tokens is 0"),
        (Parameters(temperature=-1), "temperature is -1"),
        (Parameters(temperature=float("nan")), "temperature is nan"),
        (Parameters(top_p=0), "top_p is 0"),
        (Parameters(top_k=-1), "top_k is -1"),
        (Parameters(min_p=2), "min_p is 2"),
        (Parameters(seed=-1), "seed is -1"),
        (Parameters(stop=("",)), "stop string has 0"),
        (Parameters(stop=("x",) * 17), "17 strings"),
    ):
        with pytest.raises(BadInput, match=line):
            await engine.complete(spec.key, "hello", parameters)
    for prompt, line in (("", "0 characters"), ((), "0 messages"), ("word " * 600, "tiny@1 reads at most 512")):
        with pytest.raises(BadInput, match=line):
            await engine.complete(spec.key, prompt, Parameters())
    assert (await engine.complete(spec.key, "hello", Parameters(max_tokens=1))).usage.completion_tokens == 1
    assert engine.statistics().pid == pid, "no crash"


@at_home
async def test_a_load_that_fails_leaves_nothing(engine: Engine, spec: ModelSpec, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(16383))
    broken = msgspec.structs.replace(spec, shards=(spec.shards[0], str(short), *spec.shards[2:]))
    with pytest.raises(Corrupt, match="16383 bytes instead of 16384"):
        await engine.load(broken)
    assert engine.loaded() == ()
    assert engine.statistics().cache.used_bytes == 0
    await engine.load(spec)


@at_home
async def test_a_cancelled_load_leaves_nothing(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(renamed(spec, "other@1"))
    pid = engine.statistics().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.load, spec)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    os.kill(pid, signal.SIGCONT)
    assert [model.key for model in engine.loaded()] == ["other@1"]
    assert engine.statistics().cache.used_bytes == spec.total_size
    await engine.load(spec)
    assert (await engine.complete(spec.key, "hello", Parameters(max_tokens=1))).text is not None


@at_home
async def test_a_crash_fails_what_is_in_flight_and_the_pinned_model_comes_back(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec, pin=True)
    await engine.load(renamed(spec, "b@1"))
    pid = engine.statistics().pid
    assert pid is not None
    before = engine.statistics()
    refusals: list[str] = []
    started = [trio.Event() for _ in range(3)]

    async def ask(key: str, event: trio.Event) -> None:
        async with engine.generate(key, "hello", LONG) as answer:
            await anext(answer)
            event.set()
            with pytest.raises(Busy) as refused:
                await answer.collect()
            refusals.append(str(refused.value))

    async with trio.open_nursery() as nursery:
        for event, key in zip(started, (spec.key, spec.key, "b@1"), strict=True):
            nursery.start_soon(ask, key, event)
        for event in started:
            await event.wait()
        os.kill(pid, signal.SIGKILL)
    assert len(refusals) == 3
    assert all("SIGKILL" in line and "try once more" in line for line in refusals)
    statistics = engine.statistics()
    assert statistics.crashes - before.crashes == 1
    assert statistics.last_crash is not None
    assert "SIGKILL" in statistics.last_crash
    with pytest.raises(Busy, match="loaded again after the engine process ended"):
        await engine.complete(spec.key, "hello", Parameters(max_tokens=1))
    assert (await engine.load(spec, pin=True)).pinned
    assert engine.statistics().pid != pid
    assert [model.key for model in engine.loaded()] == [spec.key], "others come back with the next question"
    await engine.complete(spec.key, "hello", Parameters(max_tokens=1))


@at_home
async def test_a_pin_that_is_given_up_while_the_process_is_down_stays_so(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(spec, pin=True)
    crashes, pid = engine.statistics().crashes, engine.statistics().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: engine.statistics().crashes == crashes + 1)
    engine.pin_only("other@1")
    await engine.load(spec)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert [model.pinned for model in engine.loaded()] == [False]
    await engine.unload(spec.key)


@at_home
async def test_a_pinned_model_that_cannot_come_back_at_first_does_so_later(
    engine: Engine, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("node.inference.engine.RESTORE_DELAY_S", 0.05)
    await engine.load(spec, pin=True)
    pid = engine.statistics().pid
    assert pid is not None
    shard, hidden = spec.shards[0], f"{spec.shards[0]}.hidden"
    os.rename(shard, hidden)
    os.kill(pid, signal.SIGKILL)
    with trio.fail_after(60):
        await until(lambda: "could not be loaded again" in caplog.text)
        os.rename(hidden, shard)
        await until(lambda: bool(engine.loaded()))
    assert engine.loaded()[0].pinned


@at_home
async def test_a_crash_during_a_load_is_the_loads_error(engine: Engine, spec: ModelSpec) -> None:
    await engine.load(renamed(spec, "other@1"))
    pid = engine.statistics().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with trio.open_nursery() as nursery:

        async def load() -> None:
            with pytest.raises(Busy, match="SIGKILL"):
                await engine.load(spec)

        nursery.start_soon(load)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(pid, signal.SIGKILL)
    assert engine.loaded() == ()
    await engine.load(spec)


async def test_without_a_running_engine_a_load_says_so(spec: ModelSpec) -> None:
    with pytest.raises(Busy, match="not running"):
        await Engine(EngineSettings(cache_bytes=1 << 30)).load(spec)


NODE = """
import sys, msgspec, trio
from node.inference.engine import Engine, EngineSettings
from node.inference.spec import ModelSpec, Parameters

async def main():
    spec = msgspec.json.decode(sys.argv[1], type=ModelSpec)
    engine = Engine(EngineSettings(cache_bytes=2 * spec.total_size, threads=1))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.load(spec)
        async with engine.generate(spec.key, "hello", Parameters(max_tokens=400)) as answer:
            await anext(answer)
            print(engine.statistics().pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


def test_the_process_does_not_outlive_a_killed_node(spec: ModelSpec) -> None:
    command = [sys.executable, "-c", NODE, msgspec.json.encode(spec).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        assert alive(pid)
        node.kill()
    deadline = time.monotonic() + DEADLINE_S
    # The kernel tells of the end of somebody else's child in no other way.
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} outlived its node"
