"""JSON-RPC 2.0: bytes of a request in, bytes of the answer out, on jsonrpcserver's dispatch of one request.

jsonrpcserver's own async dispatch gathers on asyncio and fails a whole batch for one bad element; here every element
is checked and dispatched by itself, in a nursery with a limit. Knows no HTTP, no node and none of AIGEN's methods.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import trio
from jsonrpcserver.async_dispatcher import dispatch_request
from jsonrpcserver.codes import ERROR_INTERNAL_ERROR, ERROR_INVALID_REQUEST, ERROR_METHOD_NOT_FOUND, ERROR_PARSE_ERROR
from jsonrpcserver.dispatcher import to_response
from jsonrpcserver.request import Request
from jsonrpcserver.response import to_serializable_one
from jsonrpcserver.sentinels import NOID

from node.rpc.untrusted import NotJson, decode_json

VERSION = "2.0"

Method = Callable[..., Awaitable[Any]]
"""Takes the context, then the params by position or by name; returns jsonrpcserver's Success or Error."""

Answer = dict[str, Any]
"""A response object of the specification."""

INTERNAL_ERROR_MESSAGE = "Internal error: a bug in this node; its log has the details"


@dataclass(frozen=True)
class Call:
    """One element that is a request object of the specification."""

    method: str
    params: list[Any] | dict[str, Any]
    id: Any

    @property
    def is_notification(self) -> bool:
        return self.id is NOID

    @property
    def named_params(self) -> dict[str, Any]:
        """The params when they are given by name, bare or as the only element of an array; else nothing."""
        if isinstance(self.params, dict):
            return self.params
        return self.params[0] if len(self.params) == 1 and isinstance(self.params[0], dict) else {}


@dataclass(frozen=True)
class Batch:
    """An array of elements; those that are no request object are None."""

    elements: tuple[Call | None, ...]


Incoming = Call | Batch | Answer
"""What a body turned out to be: one call, a batch, or at once the answer that refuses it."""


def error_answer(code: int, message: str, id_: object = None) -> Answer:
    """The response object of an error."""
    return {"jsonrpc": VERSION, "error": {"code": code, "message": message}, "id": id_}


def notification(method: str, params: dict[str, Any]) -> bytes:
    """What the server sends unasked within a stream."""
    return msgspec.json.encode({"jsonrpc": VERSION, "method": method, "params": params})


def encode(answer: Answer | list[Answer]) -> bytes:
    return msgspec.json.encode(answer)


def parse(body: bytes, batch_size: int) -> Incoming:
    """Never raises: what is malformed becomes the answer that says so."""
    try:
        content = decode_json(body)
    except NotJson:
        return error_answer(ERROR_PARSE_ERROR, "Parse error")
    if not isinstance(content, list):
        call = _call(content)
        return error_answer(ERROR_INVALID_REQUEST, "Invalid Request") if call is None else call
    if not content:
        return error_answer(ERROR_INVALID_REQUEST, "Invalid Request")
    if len(content) > batch_size:
        return error_answer(
            ERROR_INVALID_REQUEST,
            f"the batch has {len(content)} elements, at most {batch_size} are taken (rpc.batch_size): split it",
        )
    return Batch(tuple(_call(element) for element in content))


def _call(element: object) -> Call | None:
    """The element as a request object; None when it is not one. Members the specification does not know are ignored."""
    if not isinstance(element, dict) or element.get("jsonrpc") != VERSION:
        return None
    method, params, id_ = element.get("method"), element.get("params", []), element.get("id", NOID)
    if not isinstance(method, str) or not isinstance(params, list | dict):
        return None
    if id_ is not NOID and (isinstance(id_, bool) or not isinstance(id_, str | int | float | None)):
        return None
    return Call(method, params, id_)


@dataclass(frozen=True)
class Dispatcher:
    """Runs calls against a table of methods.

    The elements of a batch run side by side, except those of `ordered` methods: they run one after another as they
    stand, so that transactions with consecutive nonces arrive in order.
    """

    methods: Mapping[str, Method]
    batch_concurrency: int
    ordered: frozenset[str] = frozenset()

    async def answer_call(self, call: Call | None, context: object) -> Answer | None:
        """The answer to one element; None to a notification."""
        if call is None:
            return error_answer(ERROR_INVALID_REQUEST, "Invalid Request")
        request = Request(call.method, call.params, call.id)
        _, result = await dispatch_request(dict(self.methods), context, request)
        if call.is_notification:
            return None
        answer: Answer = to_serializable_one(to_response(request, result))
        return _without_internals(answer)

    async def answer_batch(self, batch: Batch, context: object) -> list[Answer] | None:
        """The answers in the order of the elements; None when all were notifications."""
        answers: list[Answer | None] = [None] * len(batch.elements)
        limit = trio.Semaphore(self.batch_concurrency)

        async def run(indices: Sequence[int]) -> None:
            async with limit:
                for index in indices:
                    answers[index] = await self.answer_call(batch.elements[index], context)

        async with trio.open_nursery() as nursery:
            for indices in self._groups(batch):
                nursery.start_soon(run, indices)
        return [answer for answer in answers if answer is not None] or None

    def _groups(self, batch: Batch) -> list[list[int]]:
        ordered, groups = [], []
        for index, call in enumerate(batch.elements):
            if call is not None and call.method in self.ordered:
                ordered.append(index)
            else:
                groups.append([index])
        return [*groups, ordered] if ordered else groups


def _without_internals(answer: Answer) -> Answer:
    """jsonrpcserver adds the method's name or an exception's text as `data`; the specification's examples have none."""
    error = answer.get("error")
    if error is None or error["code"] not in {ERROR_METHOD_NOT_FOUND, ERROR_INTERNAL_ERROR}:
        return answer
    message = INTERNAL_ERROR_MESSAGE if error["code"] == ERROR_INTERNAL_ERROR else error["message"]
    return error_answer(error["code"], message, answer["id"])
