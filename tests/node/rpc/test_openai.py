"""OpenAI's API as OpenAI's own client sees it, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import openai
import pydantic
import pytest
import trio

from ledger.keys import Key
from node import receipts
from node.inference.spec import Message
from node.rpc import token
from node.rpc.jsonrpc import INTERNAL_ERROR_MESSAGE
from node.rpc.limits import RpcLimits
from tests.tools import npm_libraries, run_node

from .fake import BASIC, CHAIN_ID, IDENTITY, NOW, OPERATOR, STRANGER, FakeNode
from .wire import Served, connect, request, send, serving

HERE = Path(__file__).parent
MODEL = "mistral-7b"
T = TypeVar("T")


made: list[openai.OpenAI] = []


@pytest.fixture(autouse=True)
def _all_closed() -> Iterator[None]:
    """A client keeps connections open; left to the collector they are a warning, in whichever test that runs."""
    yield
    while made:
        made.pop().close()


def client(served: Served, key: Key = OPERATOR, api_key: str | None = None) -> openai.OpenAI:
    api_key = api_key or token.mint(key, CHAIN_ID, int(NOW) + 60)
    made.append(openai.OpenAI(base_url=f"{served.url}/v1", api_key=api_key, max_retries=0))
    return made[-1]


async def asked(call: Callable[[], T]) -> T:
    """The client blocks."""
    return await trio.to_thread.run_sync(call)


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


async def test_models() -> None:
    async with serving() as served:
        them = client(served)
        listed = await asked(them.models.list)
        one = await asked(partial(them.models.retrieve, MODEL))
    active = {model.model_id for model in served.node.models() if not model.retired}
    assert {model.id for model in listed.data} == active
    assert (one.id, one.object) == (MODEL, "model")


async def test_a_conversation() -> None:
    async with serving() as served:
        done = await asked(partial(client(served).chat.completions.create, **said("one two three")))
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "one two three", "stop")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 3, 6)
    assert (done.object, done.created, done.id[:9]) == ("chat.completion", int(NOW), "chatcmpl-")
    assert done.model.startswith(f"{MODEL}@")


async def test_a_conversation_in_parts_of_text_with_a_developer() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    ]
    async with serving() as served:
        done = await asked(partial(client(served).chat.completions.create, model=MODEL, messages=messages))
    assert done.choices[0].message.content == "one two"


async def test_a_stream() -> None:
    async with serving() as served:
        create = partial(client(served).chat.completions.create, **said("one two three"), stream=True)
        chunks = await asked(lambda: list(create(stream_options={"include_usage": True})))
    assert [chunk.choices[0].delta.content for chunk in chunks[:-2]] == ["", "one", " two", " three"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_helper_that_puts_a_stream_together() -> None:
    def whole(them: openai.OpenAI) -> Any:
        with them.chat.completions.stream(**said("one two three")) as stream:
            for _ in stream:
                pass
            return stream.get_final_completion()

    async with serving() as served:
        done = await asked(lambda: whole(client(served)))
    assert done.choices[0].message.content == "one two three"


async def test_a_plain_text_whole_and_in_parts() -> None:
    async with serving() as served:
        create = partial(client(served).completions.create, model=MODEL, prompt="one two")
        done = await asked(create)
        chunks = await asked(lambda: list(create(stream=True)))
    assert (done.choices[0].text, done.choices[0].finish_reason, done.object) == ("one two", "stop", "text_completion")
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_probabilities_of_a_conversation_whole_and_in_parts() -> None:
    async with serving() as served:
        create = partial(client(served).chat.completions.create, **said("one two"), logprobs=True, top_logprobs=1)
        done = await asked(create)
        chunks = await asked(lambda: list(create(stream=True)))
    told = done.choices[0].logprobs.content
    assert [(one.token, one.bytes, one.logprob) for one in told] == [
        ("one", list(b"one"), -1.5),
        (" two", list(b" two"), -1.5),
    ]
    assert [[other.token for other in one.top_logprobs] for one in told] == [["one"], ["one"]]
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [[one.token for one in some.content] if some else [] for some in streamed] == [[], ["one"], [" two"], []]


async def test_probabilities_of_a_plain_text() -> None:
    async with serving() as served:
        create = partial(client(served).completions.create, model=MODEL, prompt="one two", logprobs=2)
        told = (await asked(create)).choices[0].logprobs
        chunks = await asked(lambda: list(create(stream=True)))
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["one", " two"], [-1.5, -1.5], [0, 3])
    assert told.top_logprobs == [{"one": -1.5, " two": -1.5}] * 2
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices[0].logprobs] == [[0], [3]]


class City(pydantic.BaseModel):
    city: str
    country: str | None


async def test_an_answer_that_fits_a_class() -> None:
    """The schema is the client's own doing; the fake engine says what it is told to."""
    node = FakeNode()
    async with serving(node) as served:
        parse = client(served).chat.completions.parse
        done = await asked(partial(parse, **said('{"city":"Oslo","country":null}'), response_format=City))
    assert done.choices[0].message.parsed == City(city="Oslo", country=None)
    assert json.loads(node.parameters[0].json_schema or "")["required"] == ["city", "country"]


async def test_json_mode() -> None:
    node = FakeNode()
    async with serving(node) as served:
        create = client(served).chat.completions.create
        await asked(partial(create, **said("{}"), response_format={"type": "json_object"}))
        await asked(partial(create, **said("{}"), response_format={"type": "text"}))
    assert [one.json_schema for one in node.parameters] == ['{"type": "object"}', None]


async def test_the_client_for_javascript() -> None:
    libraries = npm_libraries("openai")
    async with serving() as served:
        job = {"url": served.url, "token": token.mint(OPERATOR, CHAIN_ID, int(NOW) + 60), "model": MODEL}
        found = await asked(partial(run_node, libraries, HERE / "openai_js" / "client.mjs", job))
    assert found == {
        "models": [MODEL, "codegen-16b"],
        "whole": ["one two", "stop", 5],
        "parts": ["", "one", " two", " three", None],
        "usage": 6,
        "receipt": [True, True],
        "helped": "one two three",
        "text": "four five",
        "refusals": [
            ["NotFoundError", 404, "model_not_found", None],
            ["BadRequestError", 400, None, "n"],
            ["AuthenticationError", 401, "invalid_api_key", None],
        ],
    }


# Receipts


async def test_a_whole_answer_has_its_receipt_in_a_header() -> None:
    node = FakeNode()
    async with serving(node) as served:
        completions = client(served).chat.completions
        raw = await asked(partial(completions.with_raw_response.create, **said("one two three", seed=7)))
        text = await asked(partial(client(served).completions.with_raw_response.create, model=MODEL, prompt="one"))
    receipt = receipts.decode(raw.headers["x-aigen-receipt"].encode())
    assert raw.headers["x-aigen-receipt-id"] == receipt.receipt_id
    assert raw.parse().id == f"chatcmpl-{receipt.receipt_id}"
    assert node.answer_receipt(receipt.receipt_id) == receipt
    assert (receipt.node_id, receipt.account) == (IDENTITY.node_id, f"0x{OPERATOR.address.hex()}")
    assert receipt.prompt_hash == receipts.prompt_hash((Message("user", "one two three"),))
    assert receipt.answer_hash == receipts.answer_hash("one two three")
    assert (receipt.parameters["seed"], receipt.parameters["temperature"]) == (7, 1)
    other = receipts.decode(text.headers["x-aigen-receipt"].encode())
    assert text.parse().id == f"cmpl-{other.receipt_id}"
    assert other.prompt_hash == receipts.prompt_hash("one")


async def test_a_stream_names_its_receipt_first_and_has_it_at_its_end() -> None:
    node = FakeNode()
    node.words = trio.Semaphore(0)
    body = b'{"model": "mistral-7b", "stream": true, "messages": [{"role": "user", "content": "one"}]}'
    async with serving(node) as served, await connect(served) as stream:
        await stream.send_all(request(body, target="/v1/chat/completions"))
        text = b""
        while b"mistral-7b is loaded" not in text:
            text += await stream.receive_some()
        head = dict(line.split(": ", 1) for line in text.decode().split("\r\n\r\n")[0].splitlines()[1:])
        receipt_id = head["x-aigen-receipt-id"]
        assert "x-aigen-receipt" not in head
        assert node.answer_receipt(receipt_id) is None
        node.words.release()
        while b"[DONE]" not in text:
            text += await stream.receive_some()
    lines = text.decode().split("\n\n")
    (comment,) = [line for line in lines if ": x-aigen-receipt: " in line]
    assert lines.index(comment) < next(at for at, line in enumerate(lines) if "[DONE]" in line)
    receipt = receipts.decode(comment.partition(": x-aigen-receipt: ")[2].encode())
    assert (receipt.receipt_id, node.answer_receipt(receipt_id)) == (receipt_id, receipt)
    assert receipt.answer_hash == receipts.answer_hash("one")


async def test_the_client_passes_over_the_receipt_in_a_stream() -> None:
    async with serving() as served:
        create = partial(client(served).chat.completions.with_raw_response.create, **said("one two"), stream=True)
        raw = await asked(create)
        chunks = await asked(lambda: list(raw.parse()))
        receipt = served.node.answer_receipt(raw.headers["x-aigen-receipt-id"])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"
    assert receipt is not None
    assert chunks[0].id == f"chatcmpl-{receipt.receipt_id}"
    assert receipt.answer_hash == receipts.answer_hash("one two")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_receipts_switched_off(stream: bool) -> None:
    node = FakeNode()
    node.written = None
    body = json.dumps(said("one two", stream=stream)).encode()
    async with serving(node) as served:
        reply = await send(served, request(body, target="/v1/chat/completions"))
    assert reply.status == 200
    assert not [name for name in reply.headers if "receipt" in name]
    assert b"receipt" not in reply.body


async def test_a_refusal_has_no_receipt() -> None:
    async with serving() as served:
        body = json.dumps({**said("one"), "model": "codegen-16b"}).encode()
        reply = await send(served, request(body, target="/v1/chat/completions"))
    assert reply.status == 403
    assert not [name for name in reply.headers if "receipt" in name]


async def test_limits_and_versions_are_heeded() -> None:
    async with serving() as served:
        create = client(served).chat.completions.create
        version = served.node.model(MODEL, None).version
        named = {**said("one two three"), "model": f"{MODEL}@{version}"}
        assert (await asked(partial(create, **named, max_tokens=2))).choices[0].message.content == "one two"
        done = await asked(partial(create, **named, max_tokens=2, max_completion_tokens=1))
    assert done.choices[0].message.content == "one"


REFUSALS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None, str]] = {
    "an unknown model": ({"model": "nobody"}, openai.NotFoundError, None, "no model 'nobody'"),
    "an unknown version": ({"model": f"{MODEL}@9"}, openai.NotFoundError, None, "version '9'"),
    "a temperature": ({"temperature": 3}, openai.BadRequestError, None, "temperature is 3"),
    "several answers": ({"n": 2}, openai.BadRequestError, "n", "n is not served here"),
    "a penalty": ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty", "not served"),
    "others' probabilities alone": (
        {"top_logprobs": 2},
        openai.BadRequestError,
        "top_logprobs",
        "set logprobs to true",
    ),
    "too many probabilities": ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, None, "logprobs is 21"),
    "a schema without its type": (
        {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
        openai.BadRequestError,
        "response_format",
        "if, and only if",
    ),
    "no schema": ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format", "only if"),
    "tools": ({"tools": []}, openai.BadRequestError, "tools", "unknown field 'tools'"),
    "a misspelt field": ({"extra_body": {"max_token": 1}}, openai.BadRequestError, "max_token", "unknown field"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        openai.BadRequestError,
        "messages",
        "",
    ),
    "no messages": ({"messages": []}, openai.BadRequestError, None, "0 messages"),
    "what the engine refuses": (said("two lines"), openai.BadRequestError, None, "first"),
}


@pytest.mark.parametrize(("given", "kind", "param", "message"), REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_refusals(
    given: dict[str, Any], kind: type[openai.APIStatusError], param: str | None, message: str, stream: bool
) -> None:
    async with serving() as served:
        create = partial(client(served).chat.completions.create, **{**said("one"), **given}, stream=stream)
        with pytest.raises(kind) as refused:
            await asked(create)
    assert message in refused.value.message
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


async def test_who_may_not_ask() -> None:
    async with serving() as served:
        for path in ("chat.completions", "models"):
            nobody = client(served, api_key="sk-nobody")
            call = partial(nobody.chat.completions.create, **said("one")) if "chat" in path else nobody.models.list
            with pytest.raises(openai.AuthenticationError, match="not one of AIGEN's") as unknown:
                await asked(call)
            assert unknown.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError, match="neither enrolled nor holds a tier"):
            await asked(partial(client(served, STRANGER).chat.completions.create, **said("one")))


async def test_who_is_known_and_has_not_the_tier() -> None:
    node = FakeNode()
    async with serving(node) as served:
        large = next(model for model in node.models() if model.minimum_tier == "pro")
        ask = {**said("one"), "model": large.model_id}
        for stream in (False, True):
            with pytest.raises(openai.PermissionDeniedError, match="needs tier pro"):
                await asked(partial(client(served, BASIC).chat.completions.create, **ask, stream=stream))


async def test_too_many_are_told_when_to_come_back() -> None:
    node = FakeNode()
    node.words = trio.Semaphore(0)
    limits = RpcLimits(concurrent_requests=1, turn_timeout_s=0.05)
    async with serving(node, limits=limits) as served, trio.open_nursery() as nursery:
        nursery.start_soon(asked, partial(client(served).chat.completions.create, **said("one")))
        await node.chats_begun.wait()
        with pytest.raises(openai.RateLimitError) as refused:
            await asked(partial(client(served).chat.completions.create, **said("two")))
        assert refused.value.response.headers["retry-after"] == "1"
        node.words.release()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_who_has_used_its_limit_is_told_when_there_is_more(stream: bool) -> None:
    async with serving() as served:
        with pytest.raises(openai.RateLimitError, match="try again in 17 s") as refused:
            await asked(partial(client(served).chat.completions.create, **said("too much"), stream=stream))
    assert refused.value.response.headers["retry-after"] == "17"
    assert (refused.value.status_code, refused.value.type, refused.value.code) == (
        429,
        "rate_limit_error",
        "rate_limit_exceeded",
    )


async def test_a_bug_says_no_more_than_that(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served:
        for stream in (False, True):
            create = partial(client(served).chat.completions.create, **said("crash"), stream=stream)
            with pytest.raises(openai.InternalServerError) as failed:
                await asked(create)
            assert failed.value.message.endswith(INTERNAL_ERROR_MESSAGE) or INTERNAL_ERROR_MESSAGE in str(failed.value)
    assert "/secret/path" in caplog.text


async def test_who_leaves_stops_the_answer() -> None:
    node = FakeNode()
    node.words = trio.Semaphore(1)
    body = b'{"model": "mistral-7b", "stream": true, "messages": [{"role": "user", "content": "one two"}]}'
    async with serving(node) as served:
        async with await connect(served) as stream:
            await stream.send_all(request(body, target="/v1/chat/completions"))
            text = b""
            while b'"one"' not in text:
                text += await stream.receive_some()
        while not node.chats_cancelled:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"[]", {}, 400, "no JSON object"),
        (b"{}", {}, 400, "missing required field 'model'"),
        (b"{}", {"content-type": "text/plain"}, 415, "content-type"),
        (b"[" * 1_000, {}, 400, "nested"),
    ],
)
async def test_bodies_that_are_none(body: bytes, headers: dict[str, str], status: int, message: str) -> None:
    async with serving() as served:
        reply = await send(served, request(body, headers, target="/v1/chat/completions"))
    assert reply.status == status
    assert message in reply.json["error"]["message"]
    assert set(reply.json) == {"error"}
