"""JSON-RPC over a WebSocket on the same port: the calls of POST /, and subscriptions. Knows no method.

Each message is a request or a batch, and is answered by a message; messages are answered side by side, except those
whose order matters (signed transactions): those one after the other, as they came. Who asks is told by the headers of
the handshake, and looked at again for every message, so that a token ends when it expires.

What is to be told is never queued. Answers are few at a time, notifications are read from the ledger at the pace of the
client, and one that takes nothing is cut off after the deadline of every other connection.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import trio
from starlette.websockets import WebSocket

from ledger.history import Criteria
from node.rpc import jsonrpc
from node.rpc.guard import Connection
from node.rpc.jsonrpc import Batch, Call, Incoming
from node.rpc.limits import RpcLimits
from node.rpc.methods import Subscriber
from node.rpc.subscriptions import Subscription, Subscriptions
from node.rpc.upgrade import Overflow


class Answering(Protocol):
    """The application behind POST / as a connection sees it."""

    @property
    def limits(self) -> RpcLimits: ...

    async def answer_message(
        self, incoming: Incoming, websocket: WebSocket, subscriber: Subscriber | None
    ) -> bytes | None:
        """The bytes of the JSON-RPC answer; None when there is none. Never raises a refusal."""
        ...

    def is_ordered(self, call: Call) -> bool:
        """Whether the calls before this one have to be answered first."""
        ...


@dataclass
class OpenedByMessage:
    """A `Subscriber` for the calls of one message."""

    subscriptions: Subscriptions
    opened: list[Subscription] = field(default_factory=list)

    def open(self, criteria: Criteria | None) -> str:
        self.opened.append(self.subscriptions.open(criteria))
        return self.opened[-1].name

    def close(self, name: str) -> bool:
        return self.subscriptions.close(name)

    def answered(self) -> None:
        """The client has been told their names."""
        for opened in self.opened:
            self.subscriptions.begin(opened)


class Session:
    """One connection. `subscriptions` is None on a server without a ledger to follow."""

    def __init__(
        self, app: Answering, websocket: WebSocket, overflow: Overflow, subscriptions: Subscriptions | None
    ) -> None:
        self._app = app
        self._websocket = websocket
        self._overflow = overflow
        self._subscriptions = subscriptions
        self._connection: Connection = websocket.scope["state"]["connection"]
        """Cut, not left, when the session ends before the client does: hypercorn would wait for ever to hand over to it
        what the client still sends."""
        self._sending = trio.Lock()
        self._under_way = trio.Semaphore(app.limits.websocket_calls)

    async def run(self) -> None:
        """Accept, and answer until either side ends it."""
        await self._websocket.accept()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_after_overflow)
                if self._subscriptions is not None:
                    nursery.start_soon(self._subscriptions.run, self._tell)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        except Exception:
            self._connection.abort()
            raise

    async def _read(self, nursery: trio.Nursery) -> None:
        """Take messages until the client leaves. While as many as may be are under way none is read, so that a client
        which sends faster than it is answered waits; that it has left is seen no sooner then."""
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            if self._overflow.noted:
                continue
            text = message.get("text")
            body: bytes = message["bytes"] if text is None else text.encode()
            incoming = jsonrpc.parse(body, self._app.limits.batch_size)
            await self._under_way.acquire()
            if self._keeps_order(incoming):
                await self._answer(incoming)
            else:
                nursery.start_soon(self._answer, incoming)

    def _keeps_order(self, incoming: Incoming) -> bool:
        match incoming:
            case Call():
                return self._app.is_ordered(incoming)
            case Batch():
                return any(call is not None and self._app.is_ordered(call) for call in incoming.elements)
            case _:
                return False

    async def _answer(self, incoming: Incoming) -> None:
        opened = None if self._subscriptions is None else OpenedByMessage(self._subscriptions)
        try:
            body = await self._app.answer_message(incoming, self._websocket, opened)
            if body is not None:
                await self._send(body)
            if opened is not None:
                opened.answered()
        finally:
            self._under_way.release()

    async def _tell(self, method: str, params: dict[str, object]) -> None:
        await self._send(jsonrpc.notification(method, params))

    async def _send(self, body: bytes) -> None:
        """A client that takes nothing is cut off by the connection's own deadline, and this session with it."""
        async with self._sending:
            await self._websocket.send_text(body.decode())

    async def _end_after_overflow(self) -> None:
        """A message was too large, and the client is being told so: give it time to see that."""
        await self._overflow.wait()
        await trio.sleep(self._app.limits.drain_timeout_s)
        self._connection.abort()
