"""The door: which requests come in at all, and how one exchange ends cleanly. Pure ASGI around the application.

- Host must be a name this server goes by: a page whose name an attacker points at 127.0.0.1 (DNS rebinding) is refused.
- A page of another origin is refused unless its origin is in the list; those in it get their CORS headers.
  Programs (curl, Node, Python) send no Origin and are not concerned.
- What is left of a refused body is read away before the answer ends: hypercorn would otherwise wait for ever for a
  reader of the rest, and the client would see a reset connection instead of the reason.
- Every send has a deadline.

Knows no JSON-RPC method and no node.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import trio
from starlette.datastructures import Headers

from contracts.errors import NotAllowed, Refused
from node.config import RpcSettings
from node.receipts import HEADER, ID_HEADER
from node.rpc import upgrade
from node.rpc.jsonrpc import encode, error_answer
from node.rpc.limits import ANY, RpcLimits

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAME = "localhost"

HTTP_VERSIONS = frozenset({"1.0", "1.1"})
"""HTTP/2 flow control would let a client hold an answer back without holding the socket back."""

PREFLIGHT_HEADERS = {
    "access-control-allow-methods": "GET, POST, OPTIONS",
    "access-control-allow-headers": "authorization, content-type",
    "access-control-max-age": "600",
}

ANSWER_HEADERS = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
"""On every answer."""


EXPOSED_HEADERS = f"{HEADER}, {ID_HEADER}".encode()
"""What a page of another origin may read beside the usual ones."""


class Connection(Protocol):
    """The socket an exchange runs on."""

    def abort(self) -> None:
        """Cut it at once."""
        ...


class Exchange:
    """One request and its answer: knows whether the body was read whole, and ends the answer accordingly."""

    def __init__(self, receive: Receive, send: Send, connection: Connection, limits: RpcLimits) -> None:
        self._receive = receive
        self._send = send
        self._connection = connection
        self._limits = limits
        self._read_whole = False
        self._gone = False
        self.headers: list[tuple[bytes, bytes]] = list(ANSWER_HEADERS)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._gone = True
        elif not message.get("more_body", False):
            self._read_whole = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
        elif not message.get("more_body", False) and not self._settled:
            await self._send_in_time({**message, "more_body": True})
            await self.settle()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send_in_time(message)

    async def refuse(self, status: int, refusal: Refused) -> None:
        """Answer with an error object and nothing else."""
        body = encode(error_answer(refusal.code, str(refusal)))
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    @property
    def _settled(self) -> bool:
        return self._read_whole or self._gone

    async def settle(self) -> None:
        """Read the rest of the body away; cut the connection when there is too much of it or it comes too slowly."""
        size = 0
        with trio.move_on_after(self._limits.drain_timeout_s):
            while not self._settled and size <= self._limits.drain_bytes:
                size += len((await self.receive()).get("body", b""))
        if not self._settled:
            self._connection.abort()
        while not self._settled:
            await self.receive()

    async def _send_in_time(self, message: Message) -> None:
        with trio.move_on_after(self._limits.write_timeout_s) as scope:
            await self._send(message)
        if scope.cancelled_caught:
            self._connection.abort()


class Guard:
    """The ASGI application in front of `app`."""

    def __init__(self, app: App, settings: RpcSettings, limits: RpcLimits, loopback: bool) -> None:
        self._app = app
        self._limits = limits
        self._loopback = loopback
        self._hosts = frozenset(settings.allowed_hosts) | {settings.host.lower(), LOOPBACK_NAME}
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._upgrade(scope, receive, send)
            return
        assert scope["type"] == "http", scope["type"]
        exchange = Exchange(receive, send, scope["state"]["connection"], self._limits)
        headers = Headers(scope=scope)
        try:
            self._check_version(scope["http_version"])
            self._check_host(headers.get("host", ""))
            origin = self._check_origin(scope, headers)
        except NotAllowed as refusal:
            await exchange.refuse(403, refusal)
            return
        if origin is not None:
            exchange.headers += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", EXPOSED_HEADERS),
                (b"vary", b"origin"),
            ]
        if scope["method"] == "OPTIONS":
            await _answer_preflight(exchange, headers, allowed=origin is not None)
            return
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            await exchange.settle()
            raise

    async def _upgrade(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The same checks before a WebSocket's handshake is answered. Browsers let any page try one, and say only whose
        it is: nothing but the Origin keeps other sites' pages out."""
        scope["state"]["overflow"] = upgrade.bound(send, self._limits.body_bytes)
        headers = Headers(scope=scope)
        try:
            self._check_version(scope["http_version"])
            self._check_host(headers.get("host", ""))
            self._check_origin(scope, headers)
        except NotAllowed as refusal:
            body = encode(error_answer(refusal.code, str(refusal)))
            answer = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *ANSWER_HEADERS]
            await send({"type": "websocket.http.response.start", "status": 403, "headers": answer})
            await send({"type": "websocket.http.response.body", "body": body})
            return
        await self._app(scope, receive, send)

    def _check_version(self, version: str) -> None:
        if version not in HTTP_VERSIONS:
            raise NotAllowed(f"HTTP/{version} is not spoken here: use HTTP/1.1")

    def _check_host(self, host: str) -> None:
        """A name of this server. An IP literal cannot be rebound: away from loopback any is taken."""
        name = host_name(host)
        if name in self._hosts or ANY in self._hosts:
            return
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            address = None
        if address is None or (self._loopback and not address.is_loopback):
            raise NotAllowed(
                f"the Host {host[:100]!r} is no name of this node: use localhost or the node's address, "
                "or add the name to rpc.allowed_hosts"
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> str | None:
        """The origin when it is a foreign one that may call. Raises NotAllowed for those that may not."""
        origin = headers.get("origin")
        if origin is None:
            self._check_no_hidden_page(scope, headers)
            return None
        scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
        if origin == f"{scheme}://{headers['host']}":
            return None
        if origin not in self._origins and ANY not in self._origins:
            raise NotAllowed(
                f"a web page of {origin[:100]!r} may not call this node: if it may, add it to rpc.allowed_origins"
            )
        return origin

    def _check_no_hidden_page(self, scope: Scope, headers: Headers) -> None:
        """Browsers leave Origin out of some requests (images, links), but say where they came from."""
        if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"} and not (
            scope.get("method") in {"GET", "HEAD"} and headers.get("sec-fetch-mode") == "navigate"
        ):
            raise NotAllowed("a web page of another site may not call this node: see rpc.allowed_origins")


async def _answer_preflight(exchange: Exchange, headers: Headers, allowed: bool) -> None:
    """What a browser asks before it lets a page send JSON. A page of this very origin never asks."""
    answer = [(b"allow", b"GET, POST, OPTIONS")]
    if allowed:
        answer += [(name.encode(), value.encode()) for name, value in PREFLIGHT_HEADERS.items()]
        if headers.get("access-control-request-private-network") == "true":
            answer.append((b"access-control-allow-private-network", b"true"))
    await exchange.send({"type": "http.response.start", "status": 204, "headers": answer})
    await exchange.send({"type": "http.response.body", "body": b""})


def host_name(host: str) -> str:
    """The name in a Host header, without port, brackets, final dot or case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")
