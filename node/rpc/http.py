"""The routes: `POST /` takes JSON-RPC, as does a WebSocket there; `GET /health` says whether this node is ready,
`GET /metrics` how it is doing, and under `/v1` is OpenAI's API (`node.rpc.openai`). Knows no sockets.

A JSON-RPC answer has status 200, whatever it says, and a call without one (notifications) 204. Other statuses are for
what is refused before it is JSON-RPC; their body is an error object too, with a null id. A single call of a streaming
method with `"stream": true` is answered as server-sent events: each `data:` line a notification, the last the response.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import trio
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from contracts.errors import BadInput, Busy, NotAllowed, NotFound, Refused
from node.rpc import jsonrpc
from node.rpc.answers import answer
from node.rpc.caller import Caller, identify, require_known
from node.rpc.ethereum import Ethereum
from node.rpc.guard import Receive, Scope, Send
from node.rpc.jsonrpc import Batch, Call, Dispatcher, Incoming
from node.rpc.limits import RpcLimits
from node.rpc.methods import STREAMING, Context, Notify, Subscriber
from node.rpc.metrics import exposition
from node.rpc.openai import OpenAI
from node.rpc.port import NodePort
from node.rpc.sse import event, event_stream, until_gone
from node.rpc.turned import Turned
from node.rpc.websocket import Session

logger = logging.getLogger("aigen.rpc")

MEDIA_TYPES = frozenset({"application/json", "application/json-rpc", "application/jsonrequest"})
"""What JSON-RPC is sent as. None of them is what an HTML form can send, so a form cannot reach a method."""

ANSWERED = "JSON-RPC is POST /, OpenAI's API is under /v1, readiness is GET /health, metrics are GET /metrics"

RETRY_AFTER_S = 1


class RpcApp:
    """The application's state: the node, the methods and who is being answered."""

    def __init__(
        self,
        node: NodePort,
        dispatcher: Dispatcher,
        limits: RpcLimits,
        loopback: bool,
        clock: Callable[[], float],
        ethereum: Ethereum | None,
    ) -> None:
        self._ethereum = ethereum
        self._node = node
        self._dispatcher = dispatcher
        self._limits = limits
        self._loopback = loopback
        self._clock = clock
        self._turns = trio.Semaphore(limits.concurrent_requests)
        self.websockets = 0
        self.requests_done = 0
        self.requests_refused = 0

    @property
    def requests_active(self) -> int:
        return self._limits.concurrent_requests - self._turns.value

    def asgi(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.rpc, methods=["POST"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/metrics", self.metrics, methods=["GET"]),
                *OpenAI(self._node, self, self._clock).routes(),
                WebSocketRoute("/", self.websocket),
            ],
            exception_handlers={
                HTTPException: _on_http_exception,
                Turned: self._on_turned,
                ClientDisconnect: _on_client_gone,
            },
        )

    async def health(self, _request: Request) -> Response:
        """Outside the limit on requests: whoever watches the node gets an answer when it is busy."""
        health = self._node.health()
        return Response(jsonrpc.encode(answer(health)), 200 if health.ready else 503, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        """For a Prometheus server: who may ask is who may call getNodeInfo."""
        try:
            require_known(self._node, self.identify(request), "metrics")
        except NotAllowed as refusal:
            raise Turned(403, refusal) from refusal
        return Response(exposition(self._node), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def rpc(self, request: Request) -> Response:
        """Decode what is asked and by whom; the response object does the work while it watches the client."""
        self.check_media_type(request)
        caller = self.identify(request)
        incoming = jsonrpc.parse(await self.body(request), self._limits.batch_size)
        if isinstance(incoming, dict):
            return _json(incoming)
        return RpcResponse(self, incoming, caller)

    async def websocket(self, websocket: WebSocket) -> None:
        """Answer calls on a connection that stays, and tell it what it subscribes to."""
        try:
            self.identify(websocket)
            self._check_room()
        except Turned as error:
            await websocket.send_denial_response(await self._on_turned(websocket, error))
            return
        subscriptions = None if self._ethereum is None else self._ethereum.subscriptions()
        self.websockets += 1
        try:
            await Session(self, websocket, websocket.scope["state"]["overflow"], subscriptions).run()
        finally:
            self.websockets -= 1

    def _check_room(self) -> None:
        bound = self._limits.websockets
        if self.websockets >= bound:
            line = f"{bound} WebSocket connections are open already: use POST /, or try again later"
            raise Turned(503, Busy(line), {"retry-after": str(RETRY_AFTER_S)})

    def is_ordered(self, call: Call) -> bool:
        return call.method in self._dispatcher.ordered

    async def answer_message(
        self, incoming: Incoming, websocket: WebSocket, subscriber: Subscriber | None
    ) -> bytes | None:
        """A message's answer. What HTTP would refuse with a status is an error of the message here."""
        if isinstance(incoming, dict):
            return jsonrpc.encode(incoming)
        try:
            caller = self.identify(websocket)
        except Turned as error:
            return _refusal(incoming, error.refusal)
        if not await self.take_turn():
            return _refusal(incoming, Busy(_busy_line(self._limits)))
        try:
            return await self.answer(incoming, caller, None, subscriber)
        finally:
            self.end_turn()

    def check_media_type(self, request: Request) -> None:
        kind, _, rest = request.headers.get("content-type", "").partition(";")
        charset = rest.partition("charset=")[2].strip().strip('"').lower()
        if kind.strip().lower() not in MEDIA_TYPES or charset not in {"", "utf-8"}:
            given = request.headers.get("content-type", "")[:100]
            raise Turned(
                415, BadInput(f"the content-type is {given!r}: send JSON with `content-type: application/json`")
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Turned(415, BadInput("the body is compressed: send it as it is"))

    def identify(self, request: HTTPConnection) -> Caller:
        try:
            return identify(self._node, request.headers, self._loopback, self._clock())
        except NotAllowed as refusal:
            raise Turned(401, refusal, {"www-authenticate": "Bearer"}) from refusal

    async def body(self, request: Request) -> bytes:
        bound = self._limits.body_bytes
        declared = request.headers.get("content-length", "0")
        if int(declared) > bound:
            raise _too_large(bound)
        body = bytearray()
        with trio.move_on_after(self._limits.read_timeout_s) as scope:
            async with aclosing(request.stream()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > bound:
                        raise _too_large(bound)
        if scope.cancelled_caught:
            bound_s = self._limits.read_timeout_s
            raise Turned(408, Busy(f"{len(body)} bytes of the body came within {bound_s:g} s, not all: send it again"))
        return bytes(body)

    async def take_turn(self) -> bool:
        """Wait a while to be one of those worked on; False: too many are."""
        with trio.move_on_after(self._limits.turn_timeout_s):
            await self._turns.acquire()
            return True
        self.requests_refused += 1
        return False

    def end_turn(self) -> None:
        self.requests_done += 1
        self._turns.release()

    async def answer(
        self, incoming: Call | Batch, caller: Caller, notify: Notify | None, subscriber: Subscriber | None = None
    ) -> bytes | None:
        """The bytes of the JSON-RPC answer; None when there is none."""
        context = Context(caller, notify, subscriber)
        content: Any
        if isinstance(incoming, Batch):
            content = await self._dispatcher.answer_batch(incoming, context)
        else:
            content = await self._dispatcher.answer_call(incoming, context)
        return None if content is None else jsonrpc.encode(content)

    @property
    def limits(self) -> RpcLimits:
        return self._limits

    async def _on_turned(self, _request: HTTPConnection, error: Exception) -> Response:
        assert isinstance(error, Turned)
        self.requests_refused += 1
        return _json(jsonrpc.error_answer(error.refusal.code, str(error.refusal)), error.status, error.headers)


class RpcResponse(Response):
    """Runs a call or a batch and sends its answer; stops at once when the client leaves."""

    def __init__(self, app: RpcApp, incoming: Call | Batch, caller: Caller) -> None:
        super().__init__()
        self._app = app
        self._incoming = incoming
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            if not await self._app.take_turn():
                await _busy(self._app.limits)(scope, receive, send)
                return
            try:
                if wants_stream(self._incoming):
                    await self._stream(send)
                else:
                    body = await self._app.answer(self._incoming, self._caller, None)
                    response = Response(status_code=204) if body is None else _json_bytes(body)
                    await response(scope, receive, send)
            finally:
                self._app.end_turn()

        await until_gone(work, receive)

    async def _stream(self, send: Send) -> None:
        """Notifications as they come, and the response at the end."""
        async with event_stream(send, self._app.limits.keep_alive_s) as stream:

            async def notify(method: str, params: dict[str, Any]) -> None:
                await stream.write(event(jsonrpc.notification(method, params)))

            body = await self._app.answer(self._incoming, self._caller, notify)
            assert body is not None, "only calls with an id are streamed"
            await stream.write(event(body))


def wants_stream(incoming: Call | Batch) -> bool:
    """Whether the answer is to be a stream: one call, with an id, of a streaming method, that says so by name."""
    return (
        isinstance(incoming, Call)
        and not incoming.is_notification
        and incoming.method in STREAMING
        and incoming.named_params.get("stream") is True
    )


def _refusal(incoming: Call | Batch, refusal: Refused) -> bytes | None:
    """The answer to a message none of which is done; None to a notification."""
    if isinstance(incoming, Batch):
        return jsonrpc.encode(jsonrpc.error_answer(refusal.code, str(refusal)))
    return (
        None
        if incoming.is_notification
        else jsonrpc.encode(jsonrpc.error_answer(refusal.code, str(refusal), incoming.id))
    )


def _json_bytes(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _json(content: jsonrpc.Answer, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return _json_bytes(jsonrpc.encode(content), status, headers)


def _too_large(bound: int) -> Turned:
    return Turned(413, BadInput(f"the body is larger than {bound} bytes (rpc.body_bytes): send less at once"))


def _busy_line(limits: RpcLimits) -> str:
    bound = limits.concurrent_requests
    return f"{bound} requests are being answered already (rpc.concurrent_requests): try again in a moment"


def _busy(limits: RpcLimits) -> Response:
    return _json(jsonrpc.error_answer(Busy.code, _busy_line(limits)), 503, {"retry-after": str(RETRY_AFTER_S)})


async def _on_client_gone(_request: Request, _error: Exception) -> Response:
    """The client left while its body was read: nobody is there to see this."""
    return Response(status_code=400)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router refuses: an unknown path, or a known one with another verb."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path[:100]}"
    refusal: Refused = NotFound(f"nothing answers {asked}: {ANSWERED}")
    if error.status_code != 404:
        refusal = BadInput(f"{asked} is not taken: {ANSWERED}")
    return _json(jsonrpc.error_answer(refusal.code, str(refusal)), error.status_code, dict(error.headers or {}))
