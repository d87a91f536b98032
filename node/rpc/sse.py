"""Answers that come in parts: server-sent events to one client, and work that ends when the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import trio

from node.rpc.guard import Receive, Send

HEADERS = {"content-type": "text/event-stream", "x-accel-buffering": "no"}
KEEP_ALIVE_COMMENT = b": waiting\n\n"


class EventStream:
    """Begins with its first event, whichever task writes it."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = headers
        self._one_at_a_time = trio.Lock()
        self._begun = trio.Event()

    @property
    def is_begun(self) -> bool:
        return self._begun.is_set()

    async def write(self, data: bytes) -> None:
        """Send an event; waits while the client reads slowly."""
        async with self._one_at_a_time:
            if not self.is_begun:
                headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                self._begun.set()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def keep_alive(self, interval_s: float) -> None:
        """A comment whenever so much time went by; until cancelled."""
        await self._begun.wait()
        while True:
            await trio.sleep(interval_s)
            await self.write(KEEP_ALIVE_COMMENT)


@asynccontextmanager
async def event_stream(
    send: Send, keep_alive_s: float, headers: Mapping[str, str] | None = None
) -> AsyncIterator[EventStream]:
    """A stream that ends with the block; nothing is sent if nothing was written."""
    stream = EventStream(send, {**HEADERS, **(headers or {})})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.keep_alive, keep_alive_s)
        yield stream
        nursery.cancel_scope.cancel()
    if stream.is_begun:
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def until_gone(work: Callable[[], Awaitable[None]], receive: Receive) -> None:
    """Run `work`; cancel it when the client closes the connection."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel()
