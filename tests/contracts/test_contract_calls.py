"""Typed calls: equal to the ABI, encoded and decoded without loss, refused early with the numbers."""

import typing
from typing import Any

import pytest
from eth_abi.abi import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.abi import contracts, encode_function
from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.calls import CALL_TYPES, NO_REASON, EnrolAccounts, JoinNode, decode_call, revert_reason
from contracts.errors import BadInput
from contracts.limits import ITEMS_MAX, TEXT_BYTES_MAX
from contracts.types import Address, NodeId
from tests.contracts.chain import MODEL, model
from tests.contracts.test_contract_events import ABI_TYPES, state_changing


def test_calls_are_exactly_the_functions_that_change_state() -> None:
    typed = [(t.contract, t.function) for t in CALL_TYPES]
    assert sorted(typed) == sorted(state_changing())
    assert {t.contract for t in CALL_TYPES} == set(CONTRACT_NAMES)


@pytest.mark.parametrize("call_type", CALL_TYPES, ids=lambda t: t.__name__)
def test_a_call_has_the_arguments_of_its_function(call_type: Any) -> None:
    abi = contracts()[call_type.contract].functions[call_type.function]
    assert call_type.__struct_fields__ == abi.arguments
    hints = typing.get_type_hints(call_type)
    for argument, abi_type in zip(abi.arguments, abi.types, strict=True):
        assert hints[argument] in ABI_TYPES[abi_type], argument
        assert abi_type not in ("string", "string[]") or argument in TEXT_BYTES_MAX
        assert not abi_type.endswith("[]") or argument in ITEMS_MAX


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "address": st.binary(min_size=20, max_size=20),
    "bytes32": st.binary(min_size=32, max_size=32),
    "bool": st.booleans(),
    "string": st.text(max_size=2),  # 8 bytes at most: fits every argument
    **{f"uint{n}": st.integers(0, 2**n - 1) for n in (8, 16, 32, 64)},
}


def arguments_of(call_type: Any) -> st.SearchStrategy[Any]:
    abi = contracts()[call_type.contract].functions[call_type.function]
    strategies = [
        st.lists(VALUES[t.removesuffix("[]")], max_size=4).map(tuple) if t.endswith("[]") else VALUES[t]
        for t in abi.types
    ]
    return st.tuples(*strategies).map(lambda values: call_type(*values))


some_calls = st.sampled_from(CALL_TYPES).flatmap(arguments_of)


@settings(max_examples=200, deadline=None)
@given(some_calls)
def test_decoding_undoes_encoding(call: Any) -> None:
    data = call.encode()
    assert decode_call(call.to, data) == call
    values = [getattr(call, f) for f in call.__struct_fields__]
    assert data == encode_function(call.contract, call.function, values)


@settings(max_examples=200, deadline=None)
@given(some_calls, st.binary(max_size=64), st.integers(0, 100))
def test_decoding_never_fails_on_what_anybody_sends(call: Any, noise: bytes, at: int) -> None:
    data = bytearray(call.encode())
    data[at : at + len(noise)] = noise
    decoded = decode_call(call.to, bytes(data))
    assert decoded is None or isinstance(decoded, CALL_TYPES)
    assert decode_call(call.to, noise) is None or noise[:4] == data[:4]


def test_decoding_knows_what_is_not_ours() -> None:
    assert decode_call(bytes(20), MODEL.encode()) is None
    assert decode_call(ADDRESSES["Tiers"], MODEL.encode()) is None
    assert decode_call(b"", b"") is None
    assert decode_call(MODEL.to, MODEL.encode()[:-32]) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (model(metadata="m" * 1025), "metadata has 1025 bytes, at most 1024 fit"),
        (model(model_id="ä" * 33), "model_id has 66 bytes, at most 64 fit"),
        (EnrolAccounts((Address(bytes(20)),) * 257), "accounts has 257 items, at most 256 fit"),
        (JoinNode(NodeId("1"), "worker", ("e" * 129,)), "endpoints has 129 bytes, at most 128 fit"),
        (model(total_size=2**64), "does not fit its type"),
        (model(total_size=-1), "does not fit its type"),
        (model(manifest_hash=bytes(33)), "does not fit its type"),
        (model(metadata="\ud800"), "does not fit its type"),
        (EnrolAccounts((Address(bytes(19)),)), "does not fit its type"),
    ],
)
def test_encoding_refuses_what_no_argument_can_hold(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call.encode()


def test_revert_reason() -> None:
    assert revert_reason(bytes.fromhex("08c379a0") + encode(["string"], ["why"])) == "why"
    assert "code 17" in revert_reason(bytes.fromhex("4e487b71") + encode(["uint256"], [17]))
    for output in (b"", b"\x08\xc3\x79\xa0", bytes.fromhex("08c379a0") + encode(["string"], [""]), b"whatever"):
        assert revert_reason(output) == NO_REASON


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", bytes.fromhex("08c379a0"), bytes.fromhex("4e487b71")]))
def test_revert_reason_always_has_words(output: bytes, selector: bytes) -> None:
    assert revert_reason(selector + output)
