"""The fifteen request/response examples of section 7 of the JSON-RPC 2.0 specification, over real sockets."""

import json

import pytest
from jsonrpcserver import Success

from .wire import post, serving

# What the specification sends (-->) and what it gets back (<--); None: nothing.
EXAMPLES = [
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
        '{"jsonrpc": "2.0", "result": 19, "id": 1}',
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        '{"jsonrpc": "2.0", "result": -19, "id": 2}',
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        '{"jsonrpc": "2.0", "result": 19, "id": 3}',
    ),
    (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        '{"jsonrpc": "2.0", "result": 19, "id": 4}',
    ),
    ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    (
        '{"jsonrpc": "2.0", "method": "foobar", "id": "1"}',
        '{"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "1"}',
    ),
    (
        '{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]',
        '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}',
    ),
    (
        '{"jsonrpc": "2.0", "method": 1, "params": "bar"}',
        '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}',
    ),
    (
        '[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method" ]',
        '{"jsonrpc": "2.0", "error": {"code": -32700, "message": "Parse error"}, "id": null}',
    ),
    ("[]", '{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}'),
    ("[1]", '[{"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}]'),
    (
        "[1,2,3]",
        """[
            {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
            {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
            {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null}
        ]""",
    ),
    (
        """[
            {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
            {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
            {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
            {"foo": "boo"},
            {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
            {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
        ]""",
        """[
            {"jsonrpc": "2.0", "result": 7, "id": "1"},
            {"jsonrpc": "2.0", "result": 19, "id": "2"},
            {"jsonrpc": "2.0", "error": {"code": -32600, "message": "Invalid Request"}, "id": null},
            {"jsonrpc": "2.0", "error": {"code": -32601, "message": "Method not found"}, "id": "5"},
            {"jsonrpc": "2.0", "result": ["hello", 5], "id": "9"}
        ]""",
    ),
    (
        """[
            {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
            {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
        ]""",
        None,
    ),
]


class Methods:
    """What the specification's server has, and which of them ran."""

    def __init__(self):
        self.ran = []

    def table(self):
        return {
            name: getattr(self, name)
            for name in ("subtract", "update", "sum", "notify_hello", "notify_sum", "get_data")
        }

    async def subtract(self, _context, /, minuend, subtrahend):
        return Success(minuend - subtrahend)

    async def sum(self, _context, /, *terms):
        return Success(sum(terms))

    async def get_data(self, _context, /):
        return Success(["hello", 5])

    async def update(self, _context, /, *values):
        self.ran.append(("update", values))
        return Success(None)

    async def notify_hello(self, _context, /, *values):
        self.ran.append(("notify_hello", values))
        return Success(None)

    async def notify_sum(self, _context, /, *values):
        self.ran.append(("notify_sum", values))
        return Success(None)


def test_there_are_fifteen():
    assert len(EXAMPLES) == 15


@pytest.mark.parametrize(("sent", "expected"), EXAMPLES, ids=range(1, 16))
async def test_example(sent, expected):
    """Equal in every member and their order; only white space may differ."""
    async with serving(methods=Methods().table()) as served:
        reply = await post(served, sent.encode())
    if expected is None:
        assert (reply.status, reply.body) == (204, b"")
        return
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    assert reply.body.decode() == json.dumps(json.loads(expected), separators=(",", ":"))


async def test_notifications_are_carried_out():
    methods = Methods()
    async with serving(methods=methods.table()) as served:
        await post(served, EXAMPLES[4][0].encode())
        await post(served, EXAMPLES[14][0].encode())
    assert methods.ran[0] == ("update", (1, 2, 3, 4, 5))
    assert sorted(methods.ran[1:]) == [("notify_hello", (7,)), ("notify_sum", (1, 2, 4))]
