"""A blocking JSON-RPC client for the command line, over httpx. Raises what the node refused, by its code.

Knows no method: `call("getModelInfo", model_id="mistral-7b")` sends what it is given and returns the plain result.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import msgspec

from contracts.errors import BadInput, BadPeer, Busy, NotFound, Refused
from node.rpc.untrusted import NotJson, decode_json

CONNECT_TIMEOUT_S = 5.0

ANSWER_TIMEOUT_S = 60.0
"""Between two chunks of an answer. A stream is kept alive by comments; a load that is waited for has no bound."""

PORT_MAX = 65_535

SHOWN_BYTES_MAX = 120
"""How much of an answer that is none an error message repeats."""


@dataclass(frozen=True)
class Notification:
    """What the server says while a stream is under way."""

    method: str
    params: dict[str, Any]


class RpcClient:
    """One node's RPC address and, perhaps, a bearer token. Close it, or use it in a `with`."""

    def __init__(self, url: str, token: str | None = None, timeout_s: float | None = ANSWER_TIMEOUT_S) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise BadInput(f"{url!r} is no URL: the node's RPC address is like http://127.0.0.1:9944") from error
        if parsed.scheme not in {"http", "https"} or not parsed.host or (parsed.port or 0) > PORT_MAX:
            raise BadInput(f"{url!r} is no http URL: the node's RPC address is like http://127.0.0.1:9944")
        self.url = url
        self._ids = itertools.count(1)
        self._http = httpx.Client(
            base_url=parsed,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            # To read all authorities' certificates takes longer than most calls, and without TLS nobody shows one.
            verify=parsed.scheme == "https",
            # A proxy has no part in talking to this very machine.
            trust_env=not _is_loopback(parsed.host),
        )

    def call(self, method: str, /, **params: Any) -> Any:
        """The result. Raises the Refused subclass of the error's code."""
        request = self._request(method, params)
        with _ClearFailures(self.url, method):
            response = self._http.post("/", content=msgspec.json.encode(request), headers=_JSON)
        return _result(_answer(self.url, response.status_code, response.content), request["id"])

    def stream(self, method: str, /, **params: Any) -> Stream:
        """Ask with `"stream": true`: iterate over the notifications, then take `.result`."""
        return Stream(self.url, self._http, self._request(method, {**params, "stream": True}))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> RpcClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params}


class Stream:
    """A streamed answer. Iterating yields notifications as they come; leaving early stops the generation."""

    def __init__(self, url: str, http: httpx.Client, request: dict[str, Any]) -> None:
        self._url = url
        self._http = http
        self._request = request
        self._answer: dict[str, Any] | None = None

    @property
    def result(self) -> Any:
        """What the call returned; known once the iteration has ended."""
        assert self._answer is not None, "iterate over the stream first"
        return _result(self._answer, self._request["id"])

    def __iter__(self) -> Iterator[Notification]:
        method = self._request["method"]
        with (
            _ClearFailures(self._url, method),
            self._http.stream("POST", "/", content=msgspec.json.encode(self._request), headers=_JSON) as response,
        ):
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                self._answer = _answer(self._url, response.status_code, response.read())
            else:
                yield from self._notifications(response)
        # Raised here when the call was refused: whoever only iterates must not take that for the end of an answer.
        _ = self.result

    def _notifications(self, response: httpx.Response) -> Iterator[Notification]:
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            message = _decode(self._url, response.status_code, line.removeprefix("data:").encode())
            if "method" not in message:
                self._answer = message
                return
            yield Notification(message["method"], message.get("params", {}))
        raise BadPeer(
            f"{self._url} ended the stream without a result: the node stopped; see `aigen status` and ask again"
        )


_JSON = {"content-type": "application/json"}


class _ClearFailures:
    """Turns httpx's failures into one line that says what to do."""

    def __init__(self, url: str, method: str) -> None:
        self._url = url
        self._method = method

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            raise NotFound(
                f"nothing answers at {self._url} ({error}): start the node with `aigen start`, or name its address"
            ) from error
        if isinstance(error, httpx.TimeoutException):
            raise Busy(
                f"{self._url} did not answer {self._method} in time: ask again, or look at `aigen status`"
            ) from error
        if isinstance(error, httpx.HTTPError):
            raise BadPeer(f"the connection to {self._url} broke during {self._method}: {error}; ask again") from error


def _answer(url: str, status: int, body: bytes) -> dict[str, Any]:
    content = _decode(url, status, body)
    if "result" not in content and "error" not in content:
        raise BadPeer(f"{url} answered HTTP {status} without a result: is it an AIGEN node's RPC address?")
    return content


def _decode(url: str, status: int, body: bytes) -> dict[str, Any]:
    try:
        content = decode_json(body)
    except NotJson:
        content = None
    if not isinstance(content, dict):
        shown = body[:SHOWN_BYTES_MAX].decode(errors="replace")
        raise BadPeer(f"{url} answered HTTP {status} and no JSON-RPC ({shown!r}): is it an AIGEN node's RPC address?")
    return content


def _result(answer: dict[str, Any], id_: int) -> Any:
    error = answer.get("error")
    if isinstance(error, dict):
        kind = _kinds().get(error.get("code", 0), Refused)
        raise kind(str(error.get("message", "refused without a reason")))
    assert answer.get("id") == id_, f"asked with id {id_}, answered with {answer.get('id')}"
    return answer.get("result")


def _kinds() -> dict[int, type[Refused]]:
    return {kind.code: kind for kind in Refused.__subclasses__()}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
