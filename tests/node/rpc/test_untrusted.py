"""Hostile nesting: it must be refused whatever Python's recursion limit is (a bare decoder overflows the stack)."""

import json

import eth  # noqa: F401 - raises the recursion limit to 100,000, as in a node
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.rpc.untrusted import DEPTH_MAX, NotJson, decode_json, depth

from .wire import call, post, serving

DEEP = [
    b"[" * 1_000_000,
    b'{"a":' * 700_000,
    b'[{"a":' * 500_000,
    b"[" * 1_000_000 + b"]" * 1_000_000,
    b'["]]]]", ' * 100_000,
    b'["\\"]]]]", ' * 100_000,
    b'["\\\\", ' * 100_000,
]


@pytest.mark.parametrize("body", DEEP, ids=range(len(DEEP)))
async def test_hostile_nesting_is_a_parse_error(body):
    """100 kB of brackets used to end the whole process."""
    async with serving() as served:
        reply = await post(served, body)
        assert reply.error == {"code": -32700, "message": "Parse error"}
        assert (await post(served, call("health"))).status == 200


def test_the_limit_is_exact():
    assert decode_json(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX) is not None
    with pytest.raises(NotJson, match="nested more than 64"):
        decode_json(b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1))


def test_brackets_in_strings_and_side_by_side_are_no_depth():
    code = "[" * 1000 + '"' + "{" * 1000 + "\\"
    assert decode_json(json.dumps([code, {"a": [[]] * 1000}]).encode()) == [code, {"a": [[]] * 1000}]


def real_depth(value):
    if isinstance(value, list):
        return 1 + max(map(real_depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(real_depth, value.values()), default=0)
    return 0


@given(
    st.recursive(
        st.integers() | st.text('[]{}"\\a\n'),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[]{}"\\', max_size=3), inner, max_size=3),
        max_leaves=20,
    )
)
def test_the_depth_is_that_of_the_value(value):
    assert depth(json.dumps(value).encode()) == real_depth(value)
    assert depth(json.dumps(value, indent=1).encode()) == real_depth(value)
