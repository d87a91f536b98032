"""A WebSocket client for tests, on wsproto: says exactly what it is told to, and reads when it is told to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import trio
import wsproto
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate

from .served import Served


class Refused(Exception):
    """The handshake was answered with another status."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"{status}: {body.decode()}")
        self.status = status
        self.body = body


class Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._wire = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self._events: list[Event] = []
        self._ids = iter(range(1, 1 << 30))
        self._told: list[dict[str, Any]] = []
        self.accepted: AcceptConnection | None = None

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stream.aclose()

    @staticmethod
    async def connect(
        served: Served,
        headers: Mapping[str, str] | None = None,
        *,
        path: str = "/",
        host: str = "localhost",
        compress: bool = False,
    ) -> Client:
        """Raises Refused with what the server answers instead."""
        client = Client(await trio.open_tcp_stream(served.host, served.port))
        extensions = [PerMessageDeflate()] if compress else []
        extra = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await client._write(Request(host=host, target=path, extra_headers=extra, extensions=extensions))
        answer = await client.event()
        if isinstance(answer, RejectConnection):
            body = b""
            while answer.has_body:
                part = await client.event()
                assert isinstance(part, RejectData)
                body += part.data
                if part.body_finished:
                    break
            await client.stream.aclose()
            raise Refused(answer.status_code, body)
        assert isinstance(answer, AcceptConnection), answer
        client.accepted = answer
        return client

    async def _write(self, event: Event) -> None:
        await self.stream.send_all(self._wire.send(event))

    async def event(self) -> Event:
        """What comes next; CloseConnection when the server ends it without a word, too."""
        while not self._events:
            data = await self.stream.receive_some()
            self._wire.receive_data(data or None)
            self._events += list(self._wire.events())
            if not data and not self._events:
                return CloseConnection(code=1006)
        return self._events.pop(0)

    async def message(self) -> Any:
        """The next message, decoded."""
        text = ""
        while True:
            event = await self.event()
            if isinstance(event, Ping):
                await self._write(event.response())
            elif isinstance(event, TextMessage):
                text += event.data
                if event.message_finished:
                    return json.loads(text)
            else:
                raise AssertionError(event)

    async def send(self, content: Any) -> None:
        await self.send_text(json.dumps(content))

    async def send_text(self, text: str, finished: bool = True) -> None:
        await self._write(TextMessage(text, message_finished=finished))

    async def send_at_once(self, contents: Sequence[Any]) -> None:
        """Messages that arrive together."""
        await self.stream.send_all(b"".join(self._wire.send(TextMessage(json.dumps(content))) for content in contents))

    async def request(self, method: str, *params: Any) -> int:
        """Send a call and do not wait; its id."""
        id_ = next(self._ids)
        await self.send({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})
        return id_

    async def answer(self, method: str, *params: Any) -> dict[str, Any]:
        """The response to a call; what is told meanwhile is kept for `told`."""
        id_ = await self.request(method, *params)
        while (content := await self.message()).get("id") != id_:
            assert "method" in content, content
            self._told.append(content)
        return dict(content)

    async def ask(self, method: str, *params: Any) -> Any:
        content = await self.answer(method, *params)
        assert "result" in content, content
        return content["result"]

    async def told(self) -> dict[str, Any]:
        """The next notification's params."""
        content = self._told.pop(0) if self._told else await self.message()
        assert content["method"] == "eth_subscription", content
        return dict(content["params"])

    async def ping(self) -> None:
        await self._write(Ping(b"?"))
        assert isinstance(await self.event(), Pong)

    async def close(self) -> None:
        """As libraries do: say so, wait for the answer, close."""
        await self._write(CloseConnection(code=1000))
        answer = await self.event()
        assert isinstance(answer, CloseConnection), answer
        await self.stream.aclose()
