"""A server on a real socket for a test, and what a client writes to and reads from it, byte by byte."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import trio

from node.config import RpcSettings
from node.rpc.jsonrpc import Method
from node.rpc.limits import RpcLimits
from node.rpc.server import RpcServer

from .fake import NOW, FakeNode

DEADLINE_S = 20.0
"""Far above what any of these takes; a test that reaches it has found something that hangs."""


@dataclass(frozen=True)
class Served:
    server: RpcServer
    node: FakeNode
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of a refusal with a null id."""
        content = self.json
        assert content["jsonrpc"] == "2.0"
        assert content["id"] is None
        assert "\n" not in content["error"]["message"]
        return content["error"]


@asynccontextmanager
async def serving(
    node: FakeNode | None = None,
    settings: RpcSettings | None = None,
    limits: RpcLimits | None = None,
    methods: Mapping[str, Method] | None = None,
) -> AsyncIterator[Served]:
    """A running server on a free port; cancelled and gone afterwards."""
    node = node or FakeNode()
    server = RpcServer(node, settings or RpcSettings(port=0), limits, methods=methods, clock=lambda: NOW)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(server.serve)
            port = int(urls[0].rpartition(":")[2])
            yield Served(server, node, "127.0.0.1", port)
            nursery.cancel_scope.cancel()


async def connect(served: Served) -> trio.SocketStream:
    return await trio.open_tcp_stream(served.host, served.port)


async def read_reply(stream: trio.abc.ReceiveStream, method: str = "POST") -> Reply:
    """The next answer on the connection, parsed by h11."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "x"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    status, headers, body = 0, {}, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode() for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return Reply(status, headers, bytes(body))
        else:
            assert isinstance(event, h11.InformationalResponse), event


async def send(served: Served, raw: bytes) -> Reply:
    """Write these bytes on a new connection; read one answer."""
    async with await connect(served) as stream:
        await stream.send_all(raw)
        return await read_reply(stream, raw.partition(b" ")[0].decode())


def request(
    body: bytes,
    headers: Mapping[str, str] | None = None,
    method: str = "POST",
    target: str = "/",
    host: str = "localhost",
) -> bytes:
    """A request as programs send it. A header of the value "" is left out."""
    lines = {"host": host, "content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def call(method: str, params: Any = None, id_: Any = 1) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": params or []}).encode()


async def post(served: Served, body: bytes, headers: Mapping[str, str] | None = None) -> Reply:
    return await send(served, request(body, headers))
