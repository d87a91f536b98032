"""Typed events: equal to the ABI, decoded from logs, kept and read back without loss."""

import json
import typing
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.abi import contracts
from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.errors import BadInput, Corrupt
from contracts.events import EVENT_TYPES, ContractEvent, decode_events, decode_log, encode_events
from contracts.types import Address, EvidenceHash, ManifestHash, ModelId, NodeId, ShardHash, Version
from tests.contracts.chain import ADMIN, JOIN, MODEL, OPERATOR, Chain, dev_block, model

ABI_TYPES: dict[str, tuple[Any, ...]] = {
    "address": (Address,),
    "address[]": (tuple[Address, ...],),
    "bool": (bool,),
    "bytes32": (ManifestHash, EvidenceHash),
    "bytes32[]": (tuple[ShardHash, ...],),
    "string": (str, ModelId, NodeId, Version),
    "string[]": (tuple[str, ...],),
    "uint8": (int,),
    "uint16[]": (tuple[int, ...],),
    "uint32": (int,),
    "uint64": (int,),
}
"""Which Python types may stand for a type of the ABI."""


def state_changing() -> list[tuple[str, str]]:
    """Each function of the artifacts that is no view, with its contract."""
    artifacts = json.loads(files("contracts").joinpath("artifacts.json").read_text())
    return [
        (name, entry["name"])
        for name, artifact in artifacts["contracts"].items()
        for entry in artifact["abi"]
        if entry["type"] == "function" and entry["stateMutability"] not in ("view", "pure")
    ]


def test_events_are_exactly_those_of_the_abi() -> None:
    assert sorted(EVENT_TYPES) == sorted(e for name in CONTRACT_NAMES for e in contracts()[name].events)


@pytest.mark.parametrize("contract", CONTRACT_NAMES)
def test_an_event_has_the_fields_of_its_abi(contract: Any) -> None:
    for abi in contracts()[contract].events.values():
        event_type = EVENT_TYPES[abi.name]
        assert event_type.__struct_fields__ == abi.fields
        hints = typing.get_type_hints(event_type)
        for field, abi_type in zip(abi.fields, abi.types, strict=True):
            assert hints[field] in ABI_TYPES[abi_type], f"{abi.name}.{field}"
        # Only addresses are topics: a topic holds no text, just its hash.
        assert all(t == "address" for t, is_topic in zip(abi.types, abi.indexed, strict=True) if is_topic)


def test_no_two_events_share_a_topic_at_one_address() -> None:
    topics = [(name, abi.topic) for name in CONTRACT_NAMES for abi in contracts()[name].events.values()]
    assert len(set(topics)) == len(topics)


def test_the_record_keeps_everything() -> None:
    chain = Chain()
    events = [*dev_block().events, *chain.send(ADMIN, model(core=True)), *chain.send(OPERATOR, JOIN)]
    data = encode_events(events)
    assert decode_events(data) == events
    assert encode_events(decode_events(data)) == data
    assert decode_events(encode_events([])) == []


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", encode_events(list(dev_block().events))[:-1], msgspec.msgpack.encode([{"type": "Unknown"}])],
)
def test_a_damaged_record_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="rebuild it"):
        decode_events(data)


uint64 = st.integers(0, 2**64 - 1)
NUMBERS: dict[Any, st.SearchStrategy[Any]] = {int: uint64, tuple[int, ...]: st.lists(uint64).map(tuple)}


def any_event() -> st.SearchStrategy[Any]:
    def fields_of(event_type: Any) -> st.SearchStrategy[Any]:
        hints = typing.get_type_hints(event_type)
        return st.builds(event_type, **{f: NUMBERS.get(hint, st.from_type(hint)) for f, hint in hints.items()})

    return st.sampled_from(list(EVENT_TYPES.values())).flatmap(fields_of)


@settings(max_examples=100, deadline=None)
@given(st.lists(any_event(), max_size=5))
def test_any_events_come_back_from_the_record(events: list[ContractEvent]) -> None:
    assert decode_events(encode_events(events)) == events


def test_logs_of_others_are_none() -> None:
    topic = contracts()["Accounts"].events["Enrolled"].topic
    assert decode_log(bytes(20), [topic, bytes(32)], b"") is None
    assert decode_log(ADDRESSES["Tiers"], [topic, bytes(32)], b"") is None
    assert decode_log(ADDRESSES["Accounts"], [], b"") is None
    assert decode_log(ADDRESSES["Accounts"], [bytes(32)], b"") is None


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(name, e) for name in CONTRACT_NAMES for e in contracts()[name].events]),
    st.lists(st.binary(min_size=32, max_size=32), max_size=3),
    st.binary(max_size=200) | st.lists(st.integers(0, 300), max_size=12).map(lambda n: b"".join(map(word, n))),
)
def test_a_forged_log_is_refused_or_decodes(which: tuple[Any, str], topics: list[bytes], data: bytes) -> None:
    contract, event = which
    abi = contracts()[contract].events[event]
    try:
        decoded = decode_log(ADDRESSES[contract], [abi.topic, *topics], data)
    except BadInput:
        return
    assert isinstance(decoded, EVENT_TYPES[event])


def word(n: int) -> bytes:
    return n.to_bytes(32)


def test_a_log_decodes_to_what_was_sent() -> None:
    [event] = Chain().send(ADMIN, MODEL)
    assert all(getattr(event, field) == getattr(MODEL, field) for field in MODEL.__struct_fields__)
