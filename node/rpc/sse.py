"""Answers that come in parts: server-sent events to one client, and work that ends when the client leaves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from node.rpc.guard import Receive, Send

HEADERS = {"content-type": "text/event-stream", "x-accel-buffering": "no"}
KEEP_ALIVE_COMMENT = b": waiting\n\n"

Write = Callable[[bytes], Awaitable[None]]
"""Sends one event; waits while the client reads slowly."""


@asynccontextmanager
async def event_stream(send: Send, keep_alive_s: float) -> AsyncIterator[Write]:
    """A stream from its status to its end, with a comment whenever nothing was said for so long."""
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    one_at_a_time = trio.Lock()

    async def write(data: bytes) -> None:
        async with one_at_a_time:
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def keep_alive() -> None:
        while True:
            await trio.sleep(keep_alive_s)
            await write(KEEP_ALIVE_COMMENT)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_alive)
        yield write
        nursery.cancel_scope.cancel()
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
