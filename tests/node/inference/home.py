"""An engine with its real process that many tests share."""

import functools
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import trio

from node.inference.cache import ModelCache
from node.inference.engine import ANSWERS_PART, Engine, EngineSettings

DEADLINE_S = 120


class Home:
    """One engine for all tests of a module, in a loop of its own thread: to start its process takes seconds."""

    def __init__(self, cache_bytes: int) -> None:
        self.engine = Engine(EngineSettings(cache_bytes, threads=1))
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._live,), name="engine home")

    def __enter__(self) -> "Home":
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            with trio.fail_after(DEADLINE_S):
                before = self.engine._settings, self.engine._cache
                try:
                    await scenario()
                finally:
                    for model in self.engine.loaded():
                        await self.engine.unload(model.key, unpin=True)
                    self.engine._settings, self.engine._cache = before

        trio.from_thread.run(bounded, trio_token=self._token)

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.engine.run)
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()


def at_home(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run the test in the loop of the shared engine, which it is given."""

    @functools.wraps(test)
    def run(engine: Home, **fixtures: object) -> None:
        engine.run(lambda: test(engine=engine.engine, **fixtures))

    return run


def set_up(engine: Engine, cache_bytes: int, answers_bytes: int | None = None, **changes: Any) -> None:
    """The shared engine as one with these settings until the test ends; nothing is loaded yet. `answers_bytes` of the
    cache no model may take."""
    engine._settings = replace(engine._settings, cache_bytes=cache_bytes, **changes)
    kept = cache_bytes // ANSWERS_PART if answers_bytes is None else answers_bytes
    engine._cache = ModelCache(cache_bytes, answers_bytes=kept)
