"""Models on this node, from absent to loaded: fetch what is missing, verify, load, pin. One load a model at a time.

Owns the state of each model as `getLoadState` shows it. A load goes on when whoever asked for it leaves; others may
wait for it too. Knows neither who asks nor whether they may.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import msgspec
import trio

from contracts.errors import Busy, Refused
from node.inference.engine import Engine
from node.inference.spec import FileEntry, LoadStep, ModelSpec, QuantisedPlace
from node.network.fetching.progress import FetchProgress
from node.network.fetching.statistics import time_left_s
from node.registry import Model, ModelKey
from node.replication import Replication
from node.rpc.values import LoadState, ModelState
from node.storage.manifest import Manifest

PROGRESS_INTERVAL_S = 0.25
"""How often somebody who waits is told how far a load is."""

REPAIRS_MAX = 3
"""Rounds of fetching what turned out damaged on the disk, in one load."""

log = logging.getLogger(__name__)


def engine_key(model: Model) -> str:
    """The engine's name for a model."""
    return f"{model.model_id}@{model.version}"


@dataclass
class _Load:
    """One load under way, or how the last one failed."""

    model: Model
    state: ModelState = "fetching"
    progress: FetchProgress = field(default_factory=FetchProgress)
    step: LoadStep | None = None
    failure: Refused | None = None
    done: trio.Event = field(default_factory=trio.Event)


class Loading:
    def __init__(self, replication: Replication, engine: Engine, nursery: trio.Nursery) -> None:
        """Loads run in `nursery` and end with it."""
        self._replication = replication
        self._engine = engine
        self._nursery = nursery
        self._loads: dict[ModelKey, _Load] = {}
        self._pinned: set[ModelKey] = set()
        """What is to be pinned whenever it is loaded, whoever asks for it."""

    def state(self, model: Model) -> LoadState:
        loaded = next((one for one in self._engine.loaded() if one.key == engine_key(model)), None)
        load = self._loads.get(model.key)
        if load is not None and not load.done.is_set():
            state = _state(model, load.state, model.key in self._pinned, load.progress, _described(load.step))
            if load.state != "fetching":
                return state
            rate, left = load.progress.rate(), load.progress.bytes_total - load.progress.bytes_done
            return msgspec.structs.replace(state, rate=round(rate), time_left_s=time_left_s(left, rate))
        if loaded is not None:
            state = _state(model, "loaded", loaded.pinned, _whole(model), "")
            return msgspec.structs.replace(state, precision=loaded.precision)
        if load is not None and load.failure is not None:
            return _state(model, "failed", False, load.progress, str(load.failure))
        return _state(model, "absent", False, FetchProgress(0, model.total_size), "")

    def precision(self, model: Model) -> str | None:
        """What it is loaded in, if it is."""
        return next((one.precision for one in self._engine.loaded() if one.key == engine_key(model)), None)

    def is_loaded(self, model: Model) -> bool:
        return self.state(model).state == "loaded"

    def start(self, model: Model, pin: bool = False) -> None:
        """Begin to load, unless it is loaded or on its way. Once `pin` was asked for, every later load pins too."""
        if pin:
            self._pinned.add(model.key)
        load = self._loads.get(model.key)
        if load is not None and not load.done.is_set():
            return
        if self.is_loaded(model) and not pin:
            return
        load = self._loads[model.key] = _Load(model)
        self._nursery.start_soon(self._run, load)

    async def wait(self, model: Model, pin: bool = False) -> LoadState:
        """Begin if need be, and return once it is loaded. Raises why it failed."""
        self.start(model, pin)
        load = self._loads.get(model.key)
        if load is not None:
            await load.done.wait()
            if load.failure is not None:  # a copy each: many may wait for one load
                raise type(load.failure)(str(load.failure)) from load.failure
        return self.state(model)

    def pin_only(self, model: Model) -> None:
        """Pin it whenever it is loaded, and no other model any more."""
        self._pinned = {model.key}
        self._engine.pin_only(engine_key(model))

    async def unload(self, model: Model) -> LoadState:
        """Raises Conflict for the pinned model, Busy for one that is answering or on its way, NotFound when it is not
        loaded."""
        load = self._loads.get(model.key)
        if load is not None and not load.done.is_set():
            raise Busy(f"{engine_key(model)} is being loaded ({load.state}): unload it once it is, or stop the node")
        await self._engine.unload(engine_key(model))
        return self.state(model)

    async def _run(self, load: _Load) -> None:
        model = load.model
        try:
            manifest = await self._proved(load)
            load.state = "loading"
            pin = model.key in self._pinned
            spec = await self._spec(model, manifest)

            def heard(step: LoadStep) -> None:
                load.step = step

            await self._engine.load(spec, pin, heard)
            if not pin and model.key in self._pinned:  # asked for during the load
                await self._engine.load(spec, pin=True)
            if pin and model.key not in self._pinned:
                self._engine.unpin(spec.key)
        except Refused as error:
            load.failure = error
            log.warning("loading %s failed: %s", engine_key(model), error)
        finally:
            load.done.set()

    async def _proved(self, load: _Load) -> Manifest:
        """Have every shard here, each hashed since this node started: nothing unproved is mapped."""
        for _ in range(REPAIRS_MAX):
            load.state = "fetching"
            manifest = await self._replication.hold_all(load.model, load.progress)
            load.state = "verifying"
            if not any(result.bad_pieces for result in await self._replication.scrubbing.prove(load.model)):
                return manifest
        raise Busy(
            f"shards of {engine_key(load.model)} were damaged on this disk again after {REPAIRS_MAX} repairs: "
            "check the disk"
        )

    async def _spec(self, model: Model, manifest: Manifest) -> ModelSpec:
        store = self._replication.store
        room_bytes = await trio.to_thread.run_sync(store.room_bytes)
        return ModelSpec(
            key=engine_key(model),
            total_size=model.total_size,
            shard_size=model.shard_size,
            files=tuple(FileEntry(file.path, file.size) for file in manifest.files),
            shards=tuple(str(store.path(shard_hash)) for shard_hash in model.shard_hashes),
            quantised=QuantisedPlace(str(store.quantised_stem(model.manifest_hash)), room_bytes),
        )


def _described(step: LoadStep | None) -> str:
    if step is None:
        return ""
    return f"{step.action} the {step.precision} weights, {100 * step.done_bytes // max(1, step.total_bytes)} %"


def _whole(model: Model) -> FetchProgress:
    return FetchProgress(model.total_size, model.total_size)


def _state(model: Model, state: ModelState, pinned: bool, progress: FetchProgress, detail: str) -> LoadState:
    return LoadState(
        model.model_id, model.version, state, pinned, progress.bytes_done, progress.bytes_total, 0, None, detail
    )
