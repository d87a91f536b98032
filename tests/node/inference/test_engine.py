"""The engine with its real process: loads, answers, crashes, restarts, and never outlives the node."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from contracts.errors import BadInput, Busy, Conflict, Corrupt, NoSpace, NotFound
from node.inference.engine import Engine, EngineSettings
from node.inference.spec import Message, ModelSpec, Parameters

from . import tiny

DEADLINE_S = 120
LONG = Parameters(max_tokens=400, temperature=1.0, seed=1)


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


@asynccontextmanager
async def running(spec: ModelSpec, models: float = 2.5, **settings: float) -> AsyncIterator[Engine]:
    engine = Engine(EngineSettings(cache_bytes=int(spec.total_size * models), threads=1, **settings))
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            yield engine
            nursery.cancel_scope.cancel()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


async def until_dead(pid: int) -> None:
    while alive(pid):
        await trio.sleep(0.01)


async def test_load_answer_unload(spec: ModelSpec) -> None:
    async with running(spec) as engine:
        assert engine.statistics().pid is None, "the process starts with the first load"
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
        assert statistics.requests_total == 2
        assert statistics.requests_active == 0
        assert statistics.completion_tokens_total == 40
        assert statistics.models == engine.loaded() == (loaded,)
        maps = Path(f"/proc/{statistics.pid}/maps")
        assert spec.shards[0] in maps.read_text()
        await engine.unload(spec.key)
        assert spec.shards[0] not in maps.read_text(), "the memory is back"
        with pytest.raises(NotFound, match="loaded are: none"):
            await engine.complete(spec.key, "hello", Parameters())
        pid = statistics.pid
    assert pid is not None
    assert not alive(pid)


async def test_the_pinned_model_stays_whatever_is_asked(spec: ModelSpec) -> None:
    async with running(spec) as engine:
        assert (await engine.load(spec, pin=True)).pinned
        await engine.load(renamed(spec, "b@1"))
        await engine.load(renamed(spec, "c@1"))
        assert [model.key for model in engine.loaded()] == [spec.key, "c@1"]
        with pytest.raises(Conflict, match="pinned core model"):
            await engine.unload(spec.key)
        await engine.load(renamed(spec, "c@1"), pin=True)
        with pytest.raises(NoSpace, match="pinned tiny@1 .* c@1"):
            await engine.load(renamed(spec, "d@1"))
        engine.unpin(spec.key)
        await engine.load(renamed(spec, "d@1"))
        assert [model.key for model in engine.loaded()] == ["c@1", "d@1"]
        await engine.unload("c@1", unpin=True)


async def test_a_model_in_use_is_waited_for_and_then_refused(spec: ModelSpec) -> None:
    async with running(spec, models=1.5, load_wait_s=0.05) as engine:
        await engine.load(spec)
        async with engine.generate(spec.key, "hello", LONG) as answer:
            await anext(answer)
            with pytest.raises(Busy, match="in use tiny@1"):
                await engine.load(renamed(spec, "b@1"))
            with pytest.raises(Busy, match="answering 1 requests"):
                await engine.unload(spec.key)
        await engine.load(renamed(spec, "b@1"))
        assert [model.key for model in engine.loaded()] == ["b@1"]


async def test_a_load_waits_until_the_model_in_use_is_free(spec: ModelSpec) -> None:
    async with running(spec, models=1.5) as engine:
        await engine.load(spec)
        async with trio.open_nursery() as nursery, engine.generate(spec.key, "hello", LONG) as answer:
            nursery.start_soon(engine.load, renamed(spec, "b@1"))
            await anext(answer)
            assert [model.key for model in engine.loaded()] == [spec.key]
        assert [model.key for model in engine.loaded()] == ["b@1"]


async def test_many_answers_at_once_are_the_same_as_one(spec: ModelSpec) -> None:
    async with running(spec) as engine:
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


async def test_leaving_an_answer_frees_its_place(spec: ModelSpec) -> None:
    async with running(spec) as engine:
        await engine.load(spec)
        for _ in range(20):
            async with engine.generate(spec.key, "hello", LONG) as answer:
                await anext(answer)
        assert engine.statistics().requests_active == 0
        # If the twenty were still being worked on, this one would wait behind them for a place.
        await engine.complete(spec.key, "hello", Parameters(max_tokens=2))
        await engine.unload(spec.key)


async def test_bad_requests_are_refused_one_by_one(spec: ModelSpec) -> None:
    async with running(spec) as engine:
        await engine.load(spec)
        for parameters, line in (
            (Parameters(max_tokens=0), "max_tokens is 0"),
            (Parameters(temperature=-1), "temperature is -1"),
            (Parameters(temperature=float("nan")), "temperature is nan"),
            (Parameters(top_p=0), "top_p is 0"),
            (Parameters(top_k=-1), "top_k is -1"),
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
        assert engine.statistics().crashes == 0


async def test_a_load_that_fails_leaves_nothing(spec: ModelSpec, tmp_path: Path) -> None:
    async with running(spec) as engine:
        short = tmp_path / "short"
        short.write_bytes(Path(spec.shards[1]).read_bytes()[:-1])
        broken = msgspec.structs.replace(spec, shards=(spec.shards[0], str(short), *spec.shards[2:]))
        with pytest.raises(Corrupt, match="16383 bytes instead of 16384"):
            await engine.load(broken)
        assert engine.loaded() == ()
        assert engine.statistics().cache.used_bytes == 0
        await engine.load(spec)


async def test_a_cancelled_load_leaves_nothing(spec: ModelSpec) -> None:
    async with running(spec) as engine:
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


async def test_a_crash_fails_what_is_in_flight_and_the_pinned_model_comes_back(spec: ModelSpec) -> None:
    async with running(spec) as engine:
        await engine.load(spec, pin=True)
        await engine.load(renamed(spec, "b@1"))
        pid = engine.statistics().pid
        assert pid is not None
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
        assert statistics.crashes == 1
        assert statistics.last_crash is not None
        assert "SIGKILL" in statistics.last_crash
        with pytest.raises(Busy, match="loaded again after the engine process ended"):
            await engine.complete(spec.key, "hello", Parameters(max_tokens=1))
        assert (await engine.load(spec, pin=True)).pinned
        assert engine.statistics().pid != pid
        assert [model.key for model in engine.loaded()] == [spec.key], "others come back with the next question"
        await engine.complete(spec.key, "hello", Parameters(max_tokens=1))


async def test_a_crash_during_a_load_is_the_loads_error(spec: ModelSpec) -> None:
    async with running(spec) as engine:
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
    engine = Engine(EngineSettings(cache_bytes=spec.total_size, threads=1))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.load(spec)
        async with engine.generate(spec.key, "hello", Parameters(max_tokens=400)) as answer:
            await anext(answer)
            print(engine.statistics().pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


async def test_the_process_does_not_outlive_a_killed_node(spec: ModelSpec) -> None:
    command = [sys.executable, "-c", NODE, msgspec.json.encode(spec).decode()]
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            node = await nursery.start(
                lambda task_status: trio.run_process(
                    command, stdout=subprocess.PIPE, capture_stdout=False, check=False, task_status=task_status
                )
            )
            pid = int(await node.stdout.receive_some(100))
            assert alive(pid)
            node.kill()
            await until_dead(pid)
