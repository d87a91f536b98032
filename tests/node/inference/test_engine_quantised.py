"""Quantised models through the engine process: what is chosen, what is refused, and that the others go on meanwhile."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from contracts.errors import Busy, NoSpace
from node.config import Quantization
from node.inference.engine import LOAD_TIMEOUT_S, Engine, EngineSettings
from node.inference.frames import Load, Loaded
from node.inference.loading import MappedModel, measured
from node.inference.spec import LoadedModel, LoadStep, Message, ModelSpec, Parameters

from . import home, tiny
from .alone import answer
from .home import Home, at_home
from .quantised import SIZES, load, placed, prepare

QUESTION = (Message("user", "The capital?"),)
SHORT = Parameters(max_tokens=12)
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
"""Enough weights that quantising takes many turns."""


def spec_of(root: Path, name: str, key: str = "tiny@1", **changes: object) -> ModelSpec:
    directory = tiny.save(root / "model", name, **{**SIZES[name], "eos_token_id": None, **changes})
    (directory / "generation_config.json").unlink()
    tiny.edit_json(directory / "tokenizer_config.json", eos_token=None)
    return placed(tiny.cut(directory, root / "shards", 1 << 20, key), root / "quantised")


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    return spec_of(tmp_path, "llama")


def renamed(spec: ModelSpec, key: str) -> ModelSpec:
    """The same shards as another model: its quantised weights are its own."""
    assert spec.quantised is not None
    stem = str(Path(spec.quantised.stem).parent / key.encode().hex().zfill(64))
    return msgspec.structs.replace(spec, key=key, quantised=msgspec.structs.replace(spec.quantised, stem=stem))


@pytest.fixture(scope="module")
def engine() -> Iterator[Home]:
    with Home(1) as shared:
        yield shared


ANSWERS_BYTES = 1 << 20
"""Beside the models."""


def set_up(engine: Engine, models_bytes: int, quantization: Quantization = "auto") -> None:
    home.set_up(engine, models_bytes + ANSWERS_BYTES, ANSWERS_BYTES, quantization=quantization)


def maps(engine: Engine) -> str:
    return Path(f"/proc/{engine.statistics().pid}/maps").read_text()


def content(path: Path) -> bytes:
    return path.read_bytes()


def damage(path: Path) -> None:
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))


@at_home
async def test_auto_takes_the_best_that_fits_beside_the_pinned_model(engine: Engine, spec: ModelSpec) -> None:
    sizes = measured(spec)
    set_up(engine, 2 * spec.total_size + sizes["int8"] - 1)
    core = renamed(spec, "core@1")
    assert (await engine.load(core, pin=True)).precision == "fp32"
    assert (await engine.load(renamed(spec, "b@1"), pin=True)).precision == "fp32"
    # Less than int8 takes is left now, and int4 fits.
    loaded = await engine.load(spec)
    assert (loaded.precision, loaded.mapped_bytes) == ("int4", sizes["int4"])
    assert engine.statistics().cache.used_bytes == 2 * spec.total_size + sizes["int4"]
    engine.unpin("b@1")
    await engine.unload("b@1")
    await engine.load(renamed(spec, "small@1"), pin=True)
    assert spec.key in {model.key for model in engine.loaded()}, "what is not pinned is in nobody's way"
    assert engine.statistics().models == engine.loaded()


@at_home
async def test_less_than_the_smallest_is_refused_with_every_number(engine: Engine, spec: ModelSpec) -> None:
    sizes = measured(spec)
    set_up(engine, spec.total_size + sizes["int4"] - 1)
    await engine.load(renamed(spec, "core@1"), pin=True)
    with pytest.raises(NoSpace) as refused:
        await engine.load(spec)
    for part in (
        f"tiny@1 needs {sizes['int4']} bytes as int4 ({spec.total_size} as stored, {sizes['int8']} as int8)",
        f"cache of {spec.total_size + sizes['int4'] - 1 + ANSWERS_BYTES}",
        f"pinned core@1 ({spec.total_size})",
        f"kept for answers {ANSWERS_BYTES}",
        "raise the cache by at least 1 bytes, or core@1",
    ):
        assert part in str(refused.value)
    assert not list(Path(spec.quantised.stem).parent.glob("*")), "nothing is made for a model that does not fit"


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@at_home
async def test_a_precision_that_is_set(engine: Engine, spec: ModelSpec, quantization: Quantization) -> None:
    size = spec.total_size if quantization == "none" else measured(spec)[quantization]
    set_up(engine, 10 * spec.total_size, quantization)
    loaded = await engine.load(spec)
    assert loaded.precision == ("fp32" if quantization == "none" else quantization)
    assert loaded.mapped_bytes == size == engine.statistics().cache.used_bytes
    await engine.unload(spec.key)
    set_up(engine, size - 1, quantization)
    with pytest.raises(NoSpace, match=f"needs {size} bytes"):
        await engine.load(spec)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("name", tiny.MODELS)
@at_home
async def test_load_answer_unload(engine: Engine, tmp_path: Path, name: str, quantization: Quantization) -> None:
    spec = spec_of(tmp_path, name)
    set_up(engine, spec.total_size, quantization)
    steps: list[LoadStep] = []
    assert (await engine.load(spec, on_step=steps.append)).precision == quantization
    assert all(step.precision == quantization and step.done_bytes <= step.total_bytes for step in steps)
    whole = await engine.complete(spec.key, QUESTION, SHORT)
    file = f"{spec.quantised.stem}.{quantization}"
    assert file in maps(engine)
    assert spec.shards[0] not in maps(engine)
    await engine.unload(spec.key)
    assert file not in maps(engine), "the memory is back"
    assert engine.statistics().cache.used_bytes == 0
    await engine.load(spec)
    assert await engine.complete(spec.key, QUESTION, SHORT) == whole
    model = MappedModel(spec, quantization)
    assert whole.text == "".join(chunk.text for chunk in answer(model.runnable, QUESTION, SHORT))


@at_home
async def test_many_who_load_at_once(engine: Engine, spec: ModelSpec) -> None:
    names = ("a@1", "b@1", "c@1")
    set_up(engine, 3 * measured(spec)["int8"] + 100, "int8")
    async with trio.open_nursery() as nursery:
        for name in names * 2:
            nursery.start_soon(engine.load, renamed(spec, name))
    assert {(model.key, model.precision) for model in engine.loaded()} == {(name, "int8") for name in names}
    cache = engine.statistics().cache
    assert (cache.hits, cache.misses, cache.evictions) == (3, 3, 0)


@at_home
async def test_other_models_answer_while_one_is_quantised(engine: Engine, tmp_path: Path, spec: ModelSpec) -> None:
    large = spec_of(tmp_path / "large", "llama", "large@1", **LARGE)
    set_up(engine, spec.total_size + measured(large)["int4"])
    await engine.load(spec, pin=True)
    done: list[str] = []

    async def load_it() -> None:
        assert (await engine.load(large, on_step=on_step)).precision == "int4"
        done.append("load")

    heard = trio.Event()

    def on_step(step: LoadStep) -> None:
        assert step.action == "quantising"
        heard.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load_it)
        await heard.wait()
        await engine.complete(spec.key, QUESTION, Parameters(max_tokens=2))
        assert done == [], "the answer came before the model was there"
    assert done == ["load"]


@at_home
async def test_a_load_that_is_left_half_way_leaves_nothing(engine: Engine, tmp_path: Path) -> None:
    large = spec_of(tmp_path, "llama", "large@1", **LARGE)
    set_up(engine, large.total_size, "int4")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: engine.load(large, on_step=lambda step: nursery.cancel_scope.cancel()))
    assert engine.loaded() == ()
    assert engine.statistics().cache.used_bytes == 0
    # Commands are worked on in their order: once this is refused, the load before it is undone.
    await engine.load(msgspec.structs.replace(large, key="other@1"))
    assert [path.suffix for path in Path(large.quantised.stem).parent.iterdir()] == [".int4"]


@at_home
async def test_killed_while_it_quantises_the_next_load_makes_it_anew(engine: Engine, tmp_path: Path) -> None:
    large = spec_of(tmp_path, "llama", "large@1", **LARGE)
    set_up(engine, large.total_size, "int4")

    def kill(step: LoadStep) -> None:
        os.kill(engine.statistics().pid or 0, signal.SIGKILL)

    with pytest.raises(Busy, match="SIGKILL"):
        await engine.load(large, on_step=kill)
    (left,) = Path(large.quantised.stem).parent.iterdir()
    assert left.suffix == ""
    assert (await engine.load(large)).precision == "int4"
    assert [path.suffix for path in Path(large.quantised.stem).parent.iterdir()] == [".int4"]
    await engine.complete(large.key, QUESTION, SHORT)


@at_home
async def test_a_pinned_model_comes_back_quantised_after_a_crash(engine: Engine, spec: ModelSpec) -> None:
    set_up(engine, spec.total_size, "int8")
    await engine.load(spec, pin=True)
    before = await engine.complete(spec.key, QUESTION, SHORT)
    pid = engine.statistics().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while engine.statistics().pid == pid:
        await trio.lowlevel.checkpoint()
    assert (await engine.load(spec, pin=True)).precision == "int8"
    assert await engine.complete(spec.key, QUESTION, SHORT) == before


@at_home
async def test_a_damaged_file_is_made_anew_by_the_engine(engine: Engine, spec: ModelSpec) -> None:
    prepare(spec, "int8")
    path = Path(f"{spec.quantised.stem}.int8")
    good = content(path)
    damage(path)
    set_up(engine, spec.total_size, "int8")
    await engine.load(spec)
    assert content(path) == good
    assert load(spec, "int8").close() == 0


class SlowChild:
    """A process that says every so often how far a load is."""

    def __init__(self, pauses: tuple[float, ...]) -> None:
        self.pauses = pauses
        self.killed = False

    async def ask(self, command: Load, on_step: Callable[[LoadStep], None]) -> Loaded:
        for pause in self.pauses:
            await trio.sleep(pause)
            on_step(LoadStep("quantising", command.precision, 1, 2))
        about = LoadedModel(command.spec.key, "LlamaForCausalLM", command.precision, 1, 1, 1, 1, 1.0)
        return Loaded(command.request, about)

    def kill(self) -> None:
        self.killed = True


async def test_a_load_may_take_long_but_not_with_nothing_heard(
    spec: ModelSpec, autojump_clock: trio.testing.MockClock
) -> None:
    alone = Engine(EngineSettings(1))
    heard: list[LoadStep] = []
    child = SlowChild((LOAD_TIMEOUT_S - 1,) * 5)
    assert (await alone._ask_load(child, spec, "int8", heard.append)).precision == "int8"  # type: ignore[arg-type]
    assert (len(heard), child.killed) == (5, False)
    child = SlowChild((LOAD_TIMEOUT_S - 1, LOAD_TIMEOUT_S + 1))
    with pytest.raises(Busy, match="said nothing for 900 s"):
        await alone._ask_load(child, spec, "int8", heard.append)  # type: ignore[arg-type]
    assert child.killed
