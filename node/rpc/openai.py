"""OpenAI's API, so that programs made for it run against a node: models, chat completions, completions.

The `api_key` is a token of `aigen token`; what may be asked, and of which model, is decided as for chatCompletion.
Owns the routes and how a refusal reads there. Knows no engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.errors import BadInput, Busy, Conflict, NoSpace, NotAllowed, NotFound, Refused
from contracts.types import Address, ModelId, Version
from node.rpc import jsonrpc, openai_values, receipts
from node.rpc.caller import Caller, require_known
from node.rpc.checks import find_active_model, find_model, require_tier
from node.rpc.guard import Receive, Scope, Send
from node.rpc.limits import RpcLimits
from node.rpc.openai_values import BadField, ChatRequest, Form, TextRequest
from node.rpc.port import Emit, NodePort
from node.rpc.sse import event, event_stream, until_gone
from node.rpc.turned import Turned
from node.rpc.untrusted import NotJson, decode_json
from node.rpc.values import Answered, ChatChunk, LoadState, ModelInfo

log = logging.getLogger("aigen.rpc")

UNKNOWN_KEY = 401
DONE = b"data: [DONE]\n\n"

Asked = ChatRequest | TextRequest


class Door(Protocol):
    """What the application does for every route."""

    @property
    def limits(self) -> RpcLimits: ...

    def identify(self, request: Request) -> Caller:
        """Raises Turned, as the next two do."""

    def check_media_type(self, request: Request) -> None: ...

    async def body(self, request: Request) -> bytes: ...

    async def take_turn(self) -> bool: ...

    def end_turn(self) -> None: ...


class OpenAI:
    """`routes` is what it is for."""

    def __init__(self, node: NodePort, door: Door, clock: Callable[[], float]) -> None:
        self._node = node
        self._door = door
        self._clock = clock

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._told(self._models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._told(self._model), methods=["GET"]),
            Route("/v1/chat/completions", self._told(self._chat), methods=["POST"]),
            Route("/v1/completions", self._told(self._complete), methods=["POST"]),
        ]

    def _told(self, handle: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """A handler whose refusals are told in OpenAI's words."""

        async def told(request: Request) -> Response:
            try:
                found: Response = await handle(request)
                return found
            except Refused as refusal:
                return refused(refusal)
            except Turned as turned:
                return refused(turned.refusal, turned.status, turned.headers)

        return told

    async def _models(self, request: Request) -> Response:
        require_known(self._node, self._door.identify(request), "/v1/models")
        active = [model for model in self._node.models() if not model.retired]
        newest = {model.model_id: model for model in active}
        rows = [openai_values.model_row(model, newest[model.model_id] is model) for model in active]
        return _json({"object": "list", "data": rows})

    async def _model(self, request: Request) -> Response:
        require_known(self._node, self._door.identify(request), "/v1/models")
        model_id, _, version = request.path_params["name"].partition(openai_values.VERSION_SIGN)
        model = find_model(self._node, ModelId(model_id), Version(version) if version else None)
        return _json(openai_values.model_row(model, is_newest=not version))

    async def _chat(self, request: Request) -> Response:
        return await self._begin(request, ChatRequest)

    async def _complete(self, request: Request) -> Response:
        return await self._begin(request, TextRequest)

    async def _begin(self, request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
        """Decode and validate; the response does the rest while it watches the client."""
        self._door.check_media_type(request)
        caller = self._door.identify(request)
        try:
            body = decode_json(await self._door.body(request))
        except NotJson as error:
            raise BadInput(f"the body is not JSON: {error}") from None
        asked = openai_values.decode(body, kind)
        account = require_known(self._node, caller, request.url.path)
        model = find_active_model(self._node, *asked.model_key)
        receipt_id = receipts.new_id()
        form = Form(asked, model, receipt_id, int(self._clock()))
        return Completing(self._node, self._door, account, model, asked, form, receipt_id)


class Completing(Response):
    """Answers and sends; stops at once when the client leaves."""

    def __init__(
        self,
        node: NodePort,
        door: Door,
        account: Address,
        model: ModelInfo,
        asked: Asked,
        form: Form,
        receipt_id: str,
    ) -> None:
        super().__init__()
        self._node = node
        self._door = door
        self._account = account
        self._model = model
        self._asked = asked
        self._form = form
        self._receipt_id = receipt_id
        self._announced = receipts.announced(node, receipt_id)
        self._prompt = asked.prompt()
        self._parameters = asked.parameters()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            if not await self._door.take_turn():
                bound = self._door.limits.concurrent_requests
                await refused(Busy(f"{bound} requests are being answered already: try again in a moment"))(
                    scope, receive, send
                )
                return
            try:
                if self._asked.is_streamed:
                    await self._stream(scope, receive, send)
                else:
                    await (await self._whole())(scope, receive, send)
            finally:
                self._door.end_turn()

        await until_gone(work, receive)

    async def _whole(self) -> Response:
        try:
            answered = await self._ask(None)
        except Refused as refusal:
            return refused(refusal)
        done, headers = answered.completion, {**self._announced, **receipts.carried(answered.receipt)}
        return _json(self._form.whole(done), headers=headers)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The status is sent with the first news: what is refused before has one that says so."""
        async with event_stream(send, self._door.limits.keep_alive_s, self._announced) as stream:
            before = self._form.begin()

            async def say(content: dict[str, Any]) -> None:
                nonlocal before
                for said in (before, content):
                    if said is not None:
                        await stream.write(event(jsonrpc.encode(said)))
                before = None

            async def emit(news: ChatChunk | LoadState) -> None:
                if isinstance(news, ChatChunk):
                    await say(self._form.part(news.content, news.tokens))
                else:
                    await stream.write(_progress(news))

            try:
                answered = await self._ask(emit)
            except Refused as refusal:
                if stream.is_begun:
                    await stream.write(event(jsonrpc.encode(problem(refusal)[1])))
                else:
                    await refused(refusal)(scope, receive, send)
                return
            done = answered.completion
            await say(self._form.end(done.finish_reason))
            if self._asked.wants_usage:
                await say(self._form.counted(done.usage))
            if answered.receipt is not None:
                await stream.write(receipts.comment(answered.receipt))
            await stream.write(DONE)

    async def _ask(self, emit: Emit | None) -> Answered:
        """Raises Refused."""
        try:
            check = await require_tier(self._node, self._account, self._model)
            return await self._node.chat(
                check,
                prompt=self._prompt,
                parameters=self._parameters,
                emit=emit,
                receipt_id=self._receipt_id,
            )
        except Refused:
            raise
        except Exception:
            # A bug of ours: who asks is told that much, and the log has the rest.
            log.exception("an answer failed")
            raise Refused(jsonrpc.INTERNAL_ERROR_MESSAGE) from None


def _progress(state: LoadState) -> bytes:
    """A comment, which clients of this API pass over and people see."""
    done = 100 * state.bytes_done // max(state.bytes_total, 1)
    return f": {state.model_id} is {state.state}, {done} %\n\n".encode()


def problem(refusal: Refused, status: int | None = None) -> tuple[int, dict[str, Any]]:
    """The status and the body of a refusal."""
    usual, kind, code = _kind(refusal)
    if status == UNKNOWN_KEY:
        kind, code = "invalid_request_error", "invalid_api_key"
    param = refusal.param if isinstance(refusal, BadField) and refusal.param else None
    return status or usual, {"error": {"message": str(refusal), "type": kind, "param": param, "code": code}}


def _kind(refusal: Refused) -> tuple[int, str, str | None]:
    match refusal:
        case NotAllowed():
            return 403, "permission_error", "permission_denied"
        case NotFound():
            return 404, "invalid_request_error", "model_not_found"
        case Conflict():
            return 409, "invalid_request_error", "model_not_available"
        case BadInput():
            return 400, "invalid_request_error", None
        case Busy():
            return 429, "rate_limit_error", "rate_limit_exceeded"
        case NoSpace():
            return 503, "server_error", "no_space"
        case _:
            return 500, "server_error", None


def refused(refusal: Refused, status: int | None = None, headers: dict[str, str] | None = None) -> Response:
    status, body = problem(refusal, status)
    if isinstance(refusal, Busy):
        headers = {**(headers or {}), "retry-after": str(refusal.retry_after_s)}
    return _json(body, status, headers)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(jsonrpc.encode(content), status, headers, media_type="application/json")
