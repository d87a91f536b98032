"""Rules that hold for all contracts: who may call what, what a name is, which bounds texts and lists have."""

import re
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts import calls
from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.events import TierDefined
from contracts.limits import ITEMS_MAX, TEXT_BYTES_MAX
from contracts.types import NAME_PATTERN, Address, ModelId, Version
from genesis.checks import GAS_LIMIT_MIN
from tests.contracts.chain import (
    ADMIN,
    AUTHORITY,
    JOIN,
    MODEL,
    NODE_ID,
    NOW,
    OPERATOR,
    STRANGER,
    USER,
    Chain,
    Reverted,
    encode_loosely,
    hashes,
    model,
)

SMOL, V1 = ModelId("smol"), Version("1.0")

ADMIN_CALLS = [
    calls.EnrolAccounts((STRANGER.address,)),
    calls.ExpelAccount(USER.address),
    calls.AddAdmin(USER.address),
    calls.RemoveAdmin(ADMIN.address),
    calls.AddAuthority(USER.address),
    calls.RemoveAuthority(AUTHORITY.address),
    calls.DefineTier("max", 9, 1),
    calls.GrantTier(USER.address, "basic", NOW + 1),
    calls.RevokeTier(USER.address),
    calls.SetCheckPeriod(1),
    MODEL,
    calls.RetireModel(SMOL, V1),
    calls.SetPublic(SMOL, V1, True),
    calls.SetCoreModel(SMOL, V1),
    calls.AddMirror(SMOL, V1, "http", "https://m"),
    calls.RemoveMirror(SMOL, V1, "http", "https://m"),
]
OTHER_CALLS = [
    calls.CheckTier(USER.address, SMOL, V1),
    JOIN,
    calls.LeaveNode(NODE_ID),
    calls.RenewLease(NODE_ID, 1),
    calls.AnnounceShards(NODE_ID, SMOL, V1, (0,)),
    calls.WithdrawShards(NODE_ID, SMOL, V1, (0,)),
]
SHARED = Chain()
"""For calls that are undone at once."""


def name(call: Any) -> str:
    return type(call).__name__


def test_every_call_is_either_for_admins_or_not() -> None:
    assert {type(c) for c in ADMIN_CALLS + OTHER_CALLS} == set(calls.CALL_TYPES)


@pytest.mark.parametrize("call", ADMIN_CALLS, ids=name)
def test_what_is_for_admins_is_for_nobody_else(call: calls.Call) -> None:
    for sender in (USER, OPERATOR, AUTHORITY, STRANGER):
        with pytest.raises(Reverted, match=r"^sender is not an admin$"):
            SHARED.attempt(sender, call.to, call.encode())


@pytest.mark.parametrize("call", OTHER_CALLS, ids=name)
def test_the_rest_is_not_for_strangers(call: calls.Call) -> None:
    chain = Chain()
    chain.send(ADMIN, MODEL)
    chain.send(OPERATOR, JOIN)
    with pytest.raises(Reverted, match=r"^sender is "):
        chain.send(STRANGER, call)


@pytest.mark.parametrize("call", ADMIN_CALLS + OTHER_CALLS, ids=name)
def test_no_call_takes_money_and_none_accepts_cut_arguments(call: calls.Call) -> None:
    chain = Chain()
    chain.state.set_balance(ADMIN.address, 1)
    for data, value in ((call.encode(), 1), (call.encode()[:35], 0), (call.encode()[:4], 0)):
        with pytest.raises(Reverted, match="without a reason"):
            chain.send_raw(ADMIN, call.to, data, value)


def test_a_contract_is_neither_a_wallet_nor_a_catch_all() -> None:
    chain = Chain()
    chain.state.set_balance(ADMIN.address, 1)
    for contract in CONTRACT_NAMES:
        for data, value in ((b"", 0), (b"", 1), (b"\0\0\0\0", 0), (bytes(100), 0)):
            with pytest.raises(Reverted):
                chain.send_raw(ADMIN, ADDRESSES[contract], data, value)


NAME = re.compile(NAME_PATTERN.encode())
a_byte = st.sampled_from(b"az09._-") | st.sampled_from(b"AZ@[`{/: \x00\x7f\x80\xff,+~!\n") | st.integers(0, 255)
some_bytes = st.lists(a_byte, max_size=66).map(bytes) | st.text(max_size=20).map(str.encode)
nearly_names = st.from_regex(NAME_PATTERN, fullmatch=True).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(nearly_names | some_bytes)
@example(b"a" * 64)
@example(b"a" * 65)
@example(b"")
@example(b"a\n")
def test_a_tier_is_named_as_the_pattern_says(text: bytes) -> None:
    call = calls.DefineTier("x", 9, 1)
    data = encode_loosely(msgspec.structs.replace(call, name=text))
    if NAME.fullmatch(text) and text not in (b"basic", b"pro", b"unlimited"):
        [event] = SHARED.attempt(ADMIN, call.to, data)
        assert isinstance(event, TierDefined)
        assert event.name == text.decode()
    else:
        with pytest.raises(Reverted):
            SHARED.attempt(ADMIN, call.to, data)


@settings(max_examples=150, deadline=None)
@given(nearly_names | some_bytes, st.sampled_from(["model_id", "version"]))
def test_a_model_is_named_as_the_pattern_says(text: bytes, argument: str) -> None:
    data = encode_loosely(msgspec.structs.replace(MODEL, **{argument: text}))
    if NAME.fullmatch(text):
        [event] = SHARED.attempt(ADMIN, MODEL.to, data)
        assert getattr(event, argument) == text.decode()
    else:
        with pytest.raises(Reverted):
            SHARED.attempt(ADMIN, MODEL.to, data)


ALPHABETS = {
    "node_id": "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz",
    "endpoints": "".join(map(chr, range(0x21, 0x7F))),
    "architecture": "".join(map(chr, range(0x20, 0x7F))),
    "metadata": "".join(map(chr, range(0x20, 0x7F))),
}


@pytest.mark.parametrize("argument", ALPHABETS)
def test_each_text_has_exactly_its_alphabet(argument: str) -> None:
    call, sender = (JOIN, OPERATOR) if argument in ("node_id", "endpoints") else (MODEL, ADMIN)
    for code in range(256):
        text = b"1" + bytes([code]) + b"1"
        value = (text,) if argument == "endpoints" else text
        data = encode_loosely(msgspec.structs.replace(call, **{argument: value}))
        if chr(code) in ALPHABETS[argument]:
            SHARED.attempt(sender, call.to, data)
        else:
            with pytest.raises(Reverted, match=argument.removesuffix("s")):
                SHARED.attempt(sender, call.to, data)


AT_THE_BOUND: dict[str, list[tuple[calls.Call, str]]] = {
    "model_id": [(MODEL, "a")],
    "version": [(MODEL, "a")],
    "name": [(calls.DefineTier("x", 9, 1), "a")],
    "architecture": [(MODEL, "a")],
    "metadata": [(MODEL, "a")],
    "node_id": [(JOIN, "1")],
    "endpoints": [(JOIN, "/")],
    "uri": [(calls.AddMirror(SMOL, V1, "ipfs", "x"), "u")],
}


@pytest.mark.parametrize("argument", AT_THE_BOUND)
def test_texts_fit_up_to_their_bound(argument: str) -> None:
    chain = Chain()
    chain.send(ADMIN, msgspec.structs.replace(MODEL, version=V1 if argument == "uri" else Version("0")))
    for call, letter in AT_THE_BOUND[argument]:
        for size in (TEXT_BYTES_MAX[argument], TEXT_BYTES_MAX[argument] + 1):
            value = (letter * size,) if argument == "endpoints" else letter * size
            data = encode_loosely(msgspec.structs.replace(call, **{argument: value}))
            sender = OPERATOR if call is JOIN else ADMIN
            if size == TEXT_BYTES_MAX[argument]:
                assert chain.attempt(sender, call.to, data)
            else:
                with pytest.raises(Reverted, match="without a reason"):
                    chain.attempt(sender, call.to, data)


def test_lists_fit_up_to_their_bound_and_then_the_abi_refuses() -> None:
    over: list[calls.Call] = [
        calls.EnrolAccounts((USER.address,) * (ITEMS_MAX["accounts"] + 1)),
        msgspec.structs.replace(JOIN, endpoints=("/",) * (ITEMS_MAX["endpoints"] + 1)),
        msgspec.structs.replace(MODEL, shard_hashes=hashes(ITEMS_MAX["shard_hashes"] + 1)),
        calls.AnnounceShards(NODE_ID, SMOL, V1, (0,) * (ITEMS_MAX["shard_indices"] + 1)),
    ]
    for call in over:
        with pytest.raises(Reverted, match="without a reason"):
            SHARED.attempt(ADMIN, call.to, encode_loosely(call))


def test_any_one_call_fits_into_the_smallest_block() -> None:
    chain = Chain()
    accounts = tuple(Address(h[:20]) for h in hashes(ITEMS_MAX["accounts"], "account"))
    chain.send(ADMIN, calls.EnrolAccounts(accounts))
    assert chain.gas_used < GAS_LIMIT_MIN // 4
    count = ITEMS_MAX["shard_hashes"]
    size = MODEL.shard_size * count
    chain.send(
        ADMIN, model(total_size=size, shard_count=count, shard_hashes=hashes(count), metadata="m" * 1024, core=True)
    )
    assert chain.gas_used < GAS_LIMIT_MIN // 4
