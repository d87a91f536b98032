"""The dispatcher beyond the specification's examples: odd ids, hostile bodies, and properties of any body at all."""

import json

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from jsonrpcserver import Success

from node.rpc import jsonrpc


async def echo(_context, /, *args, **kwargs):
    return Success([list(args), kwargs])


DISPATCHER = jsonrpc.Dispatcher({"echo": echo}, 4)


async def respond(body: bytes):
    incoming = jsonrpc.parse(body, 100)
    if isinstance(incoming, dict):
        return incoming
    if isinstance(incoming, jsonrpc.Batch):
        return await DISPATCHER.answer_batch(incoming, None)
    return await DISPATCHER.answer_call(incoming, None)


@pytest.mark.parametrize("id_", ["null", "0", "-1", "1.5", '""', '"é"', "123456789012345678901234567890"])
async def test_ids_come_back_as_they_were(id_):
    answer = await respond(b'{"jsonrpc":"2.0","method":"echo","id":%s}' % id_.encode())
    assert jsonrpc.encode(answer).decode().endswith(f'"id":{id_}}}')


@pytest.mark.parametrize("id_", ["true", "[]", "{}", "[1]"])
async def test_ids_that_are_none(id_):
    answer = await respond(b'{"jsonrpc":"2.0","method":"echo","id":%s}' % id_.encode())
    assert answer == jsonrpc.error_answer(-32600, "Invalid Request")


@pytest.mark.parametrize(
    "body",
    [
        b'{"jsonrpc":"1.0","method":"echo","id":1}',
        b'{"jsonrpc":2.0,"method":"echo","id":1}',
        b'{"method":"echo","id":1}',
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","method":null,"id":1}',
        b'{"jsonrpc":"2.0","method":"echo","params":null,"id":1}',
        b'{"jsonrpc":"2.0","method":"echo","params":1,"id":1}',
        b"1",
        b"null",
        b'"x"',
    ],
)
async def test_what_is_no_request(body):
    assert await respond(body) == jsonrpc.error_answer(-32600, "Invalid Request")


@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"NaN", b'"\\ud800"', b"1" * 10_000, b"{}{}"],
)
async def test_what_is_no_json(body):
    assert await respond(body) == jsonrpc.error_answer(-32700, "Parse error")


async def test_members_the_specification_does_not_know_are_ignored():
    assert (await respond(b'{"jsonrpc":"2.0","method":"echo","id":1,"traceparent":"x"}'))["result"] == [[], {}]


@pytest.mark.parametrize("name", ["self", "context", "_context", "args", "method", "", "a b"])
async def test_any_name_of_a_param_reaches_the_method(name):
    body = json.dumps({"jsonrpc": "2.0", "method": "echo", "id": 1, "params": {name: 1}})
    assert (await respond(body.encode()))["result"] == [[], {name: 1}]


async def test_params_that_do_not_fit_a_signature():
    async def two(_context, /, left, right):
        return Success(left + right)

    dispatcher = jsonrpc.Dispatcher({"two": two}, 1)
    answer = await dispatcher.answer_call(jsonrpc.Call("two", [1], 1), None)
    assert (answer["error"]["code"], answer["error"]["message"]) == (-32602, "Invalid params")


async def test_a_batch_runs_no_more_than_its_limit_at_once():
    running, most = 0, 0

    async def slow(_context, /):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await trio.testing.wait_all_tasks_blocked()
        running -= 1
        return Success(None)

    dispatcher = jsonrpc.Dispatcher({"slow": slow}, 3)
    answers = await dispatcher.answer_batch(jsonrpc.Batch((jsonrpc.Call("slow", [], 1),) * 10), None)
    assert (len(answers), most) == (10, 3)


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(body):
    answer = trio.run(respond, body)
    assert answer["error"]["code"] in {-32700, -32600}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
MEMBERS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON,
        "method": st.sampled_from(["echo", "nothing"]) | JSON,
        "params": JSON,
        "id": JSON,
    },
)


def is_request(element):
    return (
        isinstance(element, dict)
        and element.get("jsonrpc") == "2.0"
        and isinstance(element.get("method"), str)
        and isinstance(element.get("params", []), list | dict)
        and not isinstance(element.get("id"), bool | list | dict)
    )


@given(st.lists(MEMBERS | JSON, min_size=1, max_size=6))
def test_a_batch_answers_every_element_but_notifications_in_order(elements):
    body = json.dumps(elements)
    try:
        body.encode("utf-8").decode()
        decodable = not isinstance(jsonrpc.parse(body.encode(), 100), dict)
    except UnicodeEncodeError:
        decodable = False
    if not decodable:
        return
    answers = trio.run(respond, body.encode()) or []
    expected = [element for element in elements if not (is_request(element) and "id" not in element)]
    assert len(answers) == len(expected)
    for answer, element in zip(answers, expected, strict=True):
        assert set(answer) in ({"jsonrpc", "result", "id"}, {"jsonrpc", "error", "id"})
        assert answer["id"] == (element.get("id") if is_request(element) else None)
