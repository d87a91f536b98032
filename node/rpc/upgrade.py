"""What hypercorn's WebSocket leaves open, closed before a handshake is answered. Knows no message's meaning.

- It accepts compression whenever it is offered and unpacks without a bound: 64 kB of zeros become 64 MB, which its
  limit on a message's size comes too late for. Here nothing is compressed; an offer may be declined (RFC 7692).
- Once a message was too large it says so and goes on collecting what comes. Here nothing more is kept, and whoever
  serves the connection is told.

Neither has a setting, so this reaches for the stream behind hypercorn's `send`, and fails loudly if that changes.
"""

from __future__ import annotations

from typing import Any

import trio
from hypercorn.protocol.ws_stream import FrameTooLargeError, WebsocketBuffer, WSStream
from wsproto.events import Message


class Overflow:
    """Whether a message of the connection was too large."""

    def __init__(self) -> None:
        self._event = trio.Event()

    @property
    def noted(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()

    def note(self) -> None:
        self._event.set()


class BoundedBuffer(WebsocketBuffer):
    """Collects one message, never more than its bound (bytes, or characters of a text)."""

    def __init__(self, size_max: int, overflow: Overflow) -> None:
        super().__init__(size_max)
        self._overflow = overflow

    def extend(self, event: Message[Any]) -> None:
        if self.length + len(event.data) > self.max_length:
            self.clear()
            self._overflow.note()
            raise FrameTooLargeError
        super().extend(event)


def bound(send: Any, message_size_max: int) -> Overflow:
    """Bound the WebSocket behind hypercorn's `send` before its handshake is answered."""
    stream = send.__self__
    assert isinstance(stream, WSStream), stream
    overflow = Overflow()
    stream.buffer = BoundedBuffer(message_size_max, overflow)
    stream.handshake.extensions = None
    return overflow
