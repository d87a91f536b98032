"""Loads: once however many wait, proved before they are mapped, pinned when asked, and why they failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from contracts.errors import Busy, Conflict, NoSpace
from node.inference.spec import LoadStep
from node.loading import Loading
from tests.node.cluster import flip
from tests.node.fakes import FakeEngine, Surroundings, surroundings


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    return surroundings(tmp_path)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def loading(around: Surroundings, engine: FakeEngine, nursery: trio.Nursery) -> Loading:
    return Loading(around.replication, engine, nursery)  # type: ignore[arg-type]


async def test_many_who_wait_get_one_load(around: Surroundings, engine: FakeEngine, loading: Loading) -> None:
    assert loading.state(around.model).state == "absent"
    found = []

    async def wait() -> None:
        found.append((await loading.wait(around.model)).state)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(wait)
    assert found == ["loaded"] * 5
    assert len(engine.specs) == 1
    assert around.held() == {0, 1, 2, 3}


async def test_a_load_goes_on_when_its_asker_leaves(around: Surroundings, engine: FakeEngine, loading: Loading) -> None:
    engine.gate = trio.Event()
    with trio.move_on_after(0.05):
        await loading.wait(around.model)
    assert loading.state(around.model).state in {"fetching", "verifying", "loading"}
    engine.gate.set()
    assert (await loading.wait(around.model)).state == "loaded"
    assert len(engine.specs) == 1


async def test_why_it_failed_is_told_to_all_and_the_next_attempt_is_a_new_one(
    around: Surroundings, engine: FakeEngine, loading: Loading
) -> None:
    engine.failures = [NoSpace("needs 26 GB, has 8 GB")]
    failures = []

    async def wait() -> None:
        with pytest.raises(NoSpace, match="needs 26 GB") as caught:
            await loading.wait(around.model)
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
    assert failures[0] is not failures[1], "one error object raised in two tasks would mix their tracebacks"
    state = loading.state(around.model)
    assert (state.state, state.detail) == ("failed", "needs 26 GB, has 8 GB")
    assert (await loading.wait(around.model)).state == "loaded"


async def test_a_pin_asked_for_during_a_load_holds(around: Surroundings, engine: FakeEngine, loading: Loading) -> None:
    engine.gate = trio.Event()
    loading.start(around.model)
    with trio.fail_after(10):
        while loading.state(around.model).state != "loading":
            await trio.lowlevel.checkpoint()
    loading.start(around.model, pin=True)
    engine.gate.set()
    assert (await loading.wait(around.model)).pinned


async def test_what_was_pinned_is_pinned_again_whoever_loads_it(
    around: Surroundings, engine: FakeEngine, loading: Loading
) -> None:
    await loading.wait(around.model, pin=True)
    engine.evict("m@1")  # its process crashed
    assert (await loading.wait(around.model)).pinned
    with pytest.raises(Conflict):
        await loading.unload(around.model)


async def test_nothing_unproved_is_mapped(around: Surroundings, loading: Loading) -> None:
    await loading.wait(around.model)
    await loading.unload(around.model)
    flip(around.path(1), 77)
    around.fetcher.pieces = 0
    assert (await loading.wait(around.model)).state == "loaded"
    assert around.fetcher.pieces == 1
    assert await around.replication.scrubbing.prove(around.model) == []


async def test_a_disk_that_damages_again_and_again_is_named(
    around: Surroundings, engine: FakeEngine, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = around.fetcher.fetch_shard

    async def fetch_and_spoil(shard, sources, progress):  # type: ignore[no-untyped-def]
        await fetch(shard, sources, progress)
        flip(around.store.path(shard.sha256), 1)

    await around.replication.fetch_share()
    flip(around.path(0), 1)
    monkeypatch.setattr(around.fetcher, "fetch_shard", fetch_and_spoil)
    monkeypatch.setattr(around.replication.scrubbing, "_note_proved", lambda shard_hash, mark: None)
    around.replication.scrubbing._proved.clear()
    with pytest.raises(Busy, match="check the disk"):
        await loading.wait(around.model)
    assert engine.specs == []


async def test_what_it_is_loaded_in_and_how_far_that_is(
    around: Surroundings, engine: FakeEngine, loading: Loading
) -> None:
    engine.steps = [LoadStep("checking", "int8", 1, 7), LoadStep("quantising", "int8", 2, 3)]
    engine.gate = trio.Event()
    loading.start(around.model)
    with trio.fail_after(10):
        while not loading.state(around.model).detail:
            await trio.lowlevel.checkpoint()
    state = loading.state(around.model)
    assert (state.state, state.detail, state.precision) == ("loading", "quantising the int8 weights, 66 %", None)
    assert loading.precision(around.model) is None
    engine.gate.set()
    state = await loading.wait(around.model)
    assert (state.state, state.detail, state.precision) == ("loaded", "", "bf16")
    assert loading.precision(around.model) == "bf16"


async def test_the_engine_is_told_where_quantised_weights_go(
    around: Surroundings, engine: FakeEngine, loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(around.store, "room_bytes", lambda: 4096)
    await loading.wait(around.model)
    place = engine.specs[0][0].quantised
    assert place is not None
    assert place.stem == str(around.store.root / "quantised" / around.model.manifest_hash.hex())
    assert place.room_bytes == 4096


async def test_a_load_under_way_is_not_unloaded(around: Surroundings, engine: FakeEngine, loading: Loading) -> None:
    engine.gate = trio.Event()
    loading.start(around.model)
    with pytest.raises(Busy, match="is being loaded"):
        await loading.unload(around.model)
    engine.gate.set()
    await loading.wait(around.model)
    assert (await loading.unload(around.model)).state == "absent"
