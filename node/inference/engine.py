"""The engine as the node sees it: load, unload, generate; supervises the process that does the work.

Owns the engine process (started with the first load, started again after a crash, never outliving the node) and the
cache policy. Knows no torch: a model's memory lives and dies in the other process.
"""

import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import trio

from contracts.errors import Busy, NotFound, Refused
from node.config import Quantization
from node.inference.cache import MODELS_MAX, CacheStatistics, ModelCache
from node.inference.child import Answer, Child, Counted
from node.inference.frames import Generate, Load, Loaded, Measure, Measured, Resize, Unload, Unloaded
from node.inference.precision import Precision, choose, described, needs_sizes
from node.inference.spec import Completion, LoadedModel, LoadStep, ModelSpec, Parameters, Prompt, check_prompt

ANSWERS_PART = 16
"""Conversations have this part of the cache at least, and what no model takes."""

REQUESTS_MAX = 64
"""Answers under way or queued at once."""

LOAD_WAIT_S = 60.0
"""How long a load waits for models in use to become free."""

LOAD_TIMEOUT_S = 900.0
"""A load of which nothing is heard for longer than this hangs: the process is ended and starts anew."""

UNLOAD_TIMEOUT_S = 60.0
"""An unload waits at most for the step under way."""

RESTART_DELAY_MAX_S = 30.0
"""The back-off after repeated crashes doubles from a quarter of a second up to this."""

RESTORE_DELAY_S = 30.0
"""Between two tries to bring a pinned model back."""

STEADY_S = 60.0
"""A process that lived this long was sound: the next crash counts as the first again."""

_log = logging.getLogger("aigen.engine")


class _Ready(Protocol):
    """trio's TaskStatus, which the stubs that come with libp2p do not know."""

    def started(self, value: None, /) -> None: ...


@dataclass(frozen=True)
class EngineSettings:
    """`cache_bytes` bounds the bytes of all loaded models and conversations; `threads` 0 means one for each core.
    `quantization` says what precision models are loaded in; `auto` is the best that fits."""

    cache_bytes: int
    threads: int = 0
    models_max: int = MODELS_MAX
    load_wait_s: float = LOAD_WAIT_S
    quantization: Quantization = "none"


@dataclass(frozen=True)
class EngineStatistics:
    """A frozen picture of the engine, for `getNodeInfo`, metrics and the dashboard."""

    pid: int | None
    threads: int
    starts: int
    crashes: int
    last_crash: str | None
    requests_active: int
    requests_waiting: int
    """Of the active ones, those that are not begun."""
    requests_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    models: tuple[LoadedModel, ...]
    cache: CacheStatistics


class Engine:
    """Start `run` in a nursery first; everything else may then be called from any task."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._threads = settings.threads or os.cpu_count() or 1
        answers_bytes = settings.cache_bytes // ANSWERS_PART
        self._cache = ModelCache(settings.cache_bytes, settings.models_max, answers_bytes)
        self._models: dict[str, LoadedModel] = {}
        self._pinned: dict[str, ModelSpec] = {}
        self._nursery: trio.Nursery | None = None
        self._child: Child | None = None
        self._numbers = itertools.count(1)
        self._load_lock = trio.Lock()
        self._changed = trio.Event()
        self._starts = 0
        self._crashes = 0
        self._crashes_in_a_row = 0
        self._not_before = -float("inf")
        self._last_crash: str | None = None
        self._requests_active = 0
        self._requests_total = 0
        self._counted = Counted()

    async def run(self, task_status: _Ready = trio.TASK_STATUS_IGNORED) -> None:
        """Supervise the engine process until cancelled; the process is dead when this returns."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started(None)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def load(
        self, spec: ModelSpec, pin: bool = False, on_step: Callable[[LoadStep], None] = lambda step: None
    ) -> LoadedModel:
        """Load a model, evicting the least recently used ones for it; loaded already: only pins it if asked.
        `on_step` is told how far it is with weights that are quantised first.

        NoSpace when it cannot fit beside what is pinned, Busy when models in use stay in the way, BadInput or
        Corrupt when the bytes are no model. Nothing is left of a load that fails or is cancelled.
        """
        spec.check()
        async with self._load_lock:
            if self._cache.hit(spec.key, pin):
                return self._pin(spec) if pin else self._models[spec.key]
            precision, size_bytes, how = await self._choose(spec)
            await self._make_room(spec.key, size_bytes, how)
            child = await self._running_child()
            await self._take_from_answers(child, spec.key, size_bytes)
            self._cache.add(spec.key, size_bytes, pin)
            try:
                model = await self._ask_load(child, spec, precision, on_step)
                self._cache.resize(spec.key, model.mapped_bytes + model.private_bytes)
                self._models[spec.key] = model
            except BaseException:
                self._forget(spec.key)
                if self._child is child:
                    # The process may be half way through it; what it has by then goes again.
                    child.post(Unload(next(self._numbers), spec.key))
                    self._give_to_answers(child)
                raise
            self._give_to_answers(child)
            return self._pin(spec) if pin else self._models[spec.key]

    async def unload(self, key: str, unpin: bool = False) -> None:
        """Give a model's memory back. A pinned one only with `unpin`; one in use not at all."""
        async with self._load_lock:
            self._cache.check_removable(key, unpin)
            await self._unload(key)

    def unpin(self, key: str) -> None:
        """It is no longer the core model: it stays, but may be evicted."""
        self._cache.unpin(key)
        self._pinned.pop(key, None)
        if key in self._models:
            self._models[key] = msgspec.structs.replace(self._models[key], pinned=False)

    def pin_only(self, key: str) -> None:
        """Of all models only this one is pinned, if it is; also of those that are still to come back after a crash."""
        for other in [*self._pinned]:
            if other != key:
                self.unpin(other)

    @asynccontextmanager
    async def generate(
        self, key: str, prompt: Prompt, parameters: Parameters, account: str = "", weight: int = 1
    ) -> AsyncIterator[Answer]:
        """`async with engine.generate(...) as answer: async for chunk in answer: ...`; leaving the block cancels.
        Accounts that wait have their turns in fairness, as their weights are to one another."""
        check_prompt(prompt)
        parameters.check()
        if self._requests_active >= REQUESTS_MAX:
            raise Busy(f"{self._requests_active} answers are under way, the limit is {REQUESTS_MAX}; try again later")
        child = self._child
        if child is None or key not in self._models:
            raise self._not_loaded(key)
        number = next(self._numbers)
        answer = child.open_answer(Generate(number, key, prompt, parameters, account, weight), self._counted)
        self._cache.enter(key)
        self._requests_active += 1
        self._requests_total += 1
        try:
            yield answer
        finally:
            self._requests_active -= 1
            child.close_answer(number)
            if self._child is child:
                # After a crash the count of users began anew; this one belongs to the old process.
                self._cache.leave(key)
            self._wake()

    async def complete(self, key: str, prompt: Prompt, parameters: Parameters) -> Completion:
        """The whole answer at once."""
        async with self.generate(key, prompt, parameters) as answer:
            return await answer.collect()

    def loaded(self) -> tuple[LoadedModel, ...]:
        """What is in memory, the least recently used first."""
        return tuple(self._models[resident.key] for resident in self._cache.residents() if resident.key in self._models)

    def statistics(self) -> EngineStatistics:
        """A frozen picture."""
        return EngineStatistics(
            pid=self._child.pid if self._child else None,
            threads=self._threads,
            starts=self._starts,
            crashes=self._crashes,
            last_crash=self._last_crash,
            requests_active=self._requests_active,
            requests_waiting=self._child.answers_waiting if self._child else 0,
            requests_total=self._requests_total,
            prompt_tokens_total=self._counted.prompt_tokens,
            completion_tokens_total=self._counted.completion_tokens,
            models=self.loaded(),
            cache=self._cache.statistics(),
        )

    # Loading

    async def _choose(self, spec: ModelSpec) -> tuple[Precision, int, str]:
        """The precision to load it in, the bytes that takes, and words for a refusal."""
        setting, stored_bytes = self._settings.quantization, spec.total_size
        if spec.quantised is None or not needs_sizes(setting, stored_bytes, self._cache.room_bytes()):
            return "stored", stored_bytes, ""
        child = await self._running_child()
        with trio.move_on_after(LOAD_TIMEOUT_S):
            reply = await child.ask(Measure(next(self._numbers), spec))
            assert isinstance(reply, Measured), reply
            precision = choose(setting, stored_bytes, reply.sizes, self._cache.room_bytes())
            size_bytes = stored_bytes if precision == "stored" else reply.sizes[precision]
            return precision, size_bytes, described(precision, stored_bytes, reply.sizes)
        child.kill()
        raise Busy(f"measuring {spec.key} took longer than {LOAD_TIMEOUT_S:.0f} s; the engine process starts anew")

    async def _make_room(self, key: str, size_bytes: int, how: str) -> None:
        """Evict what has to go; wait for models in use, up to the limit, then say so."""
        deadline = trio.current_time() + self._settings.load_wait_s
        while True:
            try:
                keys = self._cache.plan(key, size_bytes, how)
            except Busy:
                changed = self._changed
                with trio.move_on_at(deadline) as scope:
                    await changed.wait()
                if scope.cancelled_caught:
                    raise
                continue
            for other in keys:
                _log.info("unloading %s, the least recently used model, for %s", other, key)
                await self._unload(other, evicted=True)
            return

    async def _take_from_answers(self, child: Child, key: str, size_bytes: int) -> None:
        """Leave conversations what this model will not need; wait for those under way, up to the limit."""
        left_bytes = self._cache.left_bytes(size_bytes)
        try:
            with trio.move_on_after(self._settings.load_wait_s):
                await child.ask(Resize(next(self._numbers), left_bytes))
                return
        except BaseException:
            self._give_to_answers(child)
            raise
        self._give_to_answers(child)
        raise Busy(
            f"{key} needs {size_bytes} bytes, and answers under way take more than the {left_bytes} that it "
            "would leave them; try again when they are done"
        )

    def _give_to_answers(self, child: Child) -> None:
        """Conversations may have what no model takes."""
        if self._child is child:
            child.post(Resize(next(self._numbers), self._cache.left_bytes()))

    async def _ask_load(
        self, child: Child, spec: ModelSpec, precision: Precision, on_step: Callable[[LoadStep], None]
    ) -> LoadedModel:
        def heard(step: LoadStep) -> None:
            scope.deadline = trio.current_time() + LOAD_TIMEOUT_S
            on_step(step)

        with trio.move_on_after(LOAD_TIMEOUT_S) as scope:
            reply = await child.ask(Load(next(self._numbers), spec, precision), heard)
            assert isinstance(reply, Loaded), reply
            return reply.model
        child.kill()
        raise Busy(f"loading {spec.key} said nothing for {LOAD_TIMEOUT_S:.0f} s; the engine process starts anew")

    async def _unload(self, key: str, evicted: bool = False) -> None:
        child = self._child
        self._pinned.pop(key, None)
        self._forget(key, evicted)
        if child is None:
            return
        with trio.move_on_after(UNLOAD_TIMEOUT_S):
            reply = await child.ask(Unload(next(self._numbers), key))
            assert isinstance(reply, Unloaded), reply
            self._give_to_answers(child)
            if reply.leaked:
                _log.error("%d tensors of %s outlived its unloading and hold its memory", reply.leaked, key)
            return
        child.kill()
        raise Busy(f"unloading {key} took longer than {UNLOAD_TIMEOUT_S:.0f} s; the engine process starts anew")

    def _pin(self, spec: ModelSpec) -> LoadedModel:
        self._pinned[spec.key] = spec
        self._models[spec.key] = msgspec.structs.replace(self._models[spec.key], pinned=True)
        return self._models[spec.key]

    def _forget(self, key: str, evicted: bool = False) -> None:
        self._cache.remove(key, evicted)
        self._models.pop(key, None)
        self._wake()

    def _not_loaded(self, key: str) -> Refused:
        if key in self._pinned:
            return Busy(f"{key} is being loaded again after the engine process ended ({self._last_crash}); try again")
        return NotFound(f"{key} is not loaded; loaded are: {', '.join(self._models) or 'none'}")

    def _wake(self) -> None:
        """Something became free: whoever waits for room looks again."""
        self._changed.set()
        self._changed = trio.Event()

    # The process

    async def _running_child(self) -> Child:
        """The process, started if need be, not sooner than the back-off allows."""
        if self._child is None:
            if self._nursery is None:
                raise Busy("the engine is not running; start the node first")
            await trio.sleep_until(self._not_before)
            await self._nursery.start(self._serve_child)
        assert self._child is not None
        return self._child

    async def _serve_child(self, task_status: _Ready) -> None:
        """One life of the process, from its start to the clearing up after its end."""
        child = Child(self._threads, self._settings.cache_bytes)
        born = trio.current_time()
        try:
            await child.start()
            self._child = child
            self._starts += 1
            task_status.started(None)
            await child.serve()
        finally:
            # Also on cancellation: the process is dead and waited for before the node goes on.
            reason = await child.end()
            self._child = None
            self._cache.clear()
            self._models.clear()
            self._wake()
        # Only an end of its own comes here: a stop of the node cancels, a failed start raises.
        self._crashes += 1
        self._last_crash = reason
        self._crashes_in_a_row = 1 if trio.current_time() - born > STEADY_S else self._crashes_in_a_row + 1
        delay_s = min(RESTART_DELAY_MAX_S, 0.25 * 2 ** min(self._crashes_in_a_row - 1, 10))
        self._not_before = trio.current_time() + delay_s
        _log.error("the engine process ended (%s); it starts again with the next load, in %.2f s", reason, delay_s)
        if self._pinned and self._nursery is not None:
            self._nursery.start_soon(self._restore, tuple(self._pinned.values()))

    async def _restore(self, specs: tuple[ModelSpec, ...]) -> None:
        """Pinned models come back by themselves, however often it takes; the others with the next question to them."""
        for spec in specs:
            while spec.key in self._pinned and spec.key not in self._models:
                try:
                    await self.load(spec)
                except Refused as error:
                    _log.error("%s could not be loaded again, next try in %.0f s: %s", spec.key, RESTORE_DELAY_S, error)
                    await trio.sleep(RESTORE_DELAY_S)
                    continue
                if spec.key in self._pinned and self._cache.hit(spec.key, pin=True):  # it may not be meant any more
                    self._pin(spec)
