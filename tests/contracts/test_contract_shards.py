"""Shards: only members announce, only what exists; mirrors are added and removed once."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.calls import (
    AddMirror,
    AnnounceShards,
    ExpelAccount,
    LeaveNode,
    RemoveMirror,
    RetireModel,
    WithdrawShards,
)
from contracts.events import MirrorAdded, MirrorRemoved, ShardsAnnounced, ShardsWithdrawn
from contracts.limits import MIRRORS_PER_MODEL_MAX, URI_BYTES_MAX
from contracts.types import SHARDS_PER_MODEL_MAX, ModelId, NodeId, Version
from tests.contracts.chain import (
    ADMIN,
    JOIN,
    MODEL,
    NODE_ID,
    OPERATOR,
    USER,
    Chain,
    Reverted,
    encode_loosely,
    hashes,
    model,
)

SMOL, V1, V2 = ModelId("smol"), Version("1.0"), Version("2.0")
ALL = (0, 1, 2, 3, 4)
ANNOUNCE = AnnounceShards(NODE_ID, SMOL, V1, ALL)
WITHDRAW = WithdrawShards(NODE_ID, SMOL, V1, ALL)
MIRROR = AddMirror(SMOL, V1, "http", "https://mirror.example/smol/")


def prepared() -> Chain:
    """MODEL with five shards, and a node of OPERATOR."""
    chain = Chain()
    chain.send(ADMIN, MODEL)
    chain.send(OPERATOR, JOIN)
    return chain


@pytest.fixture
def chain() -> Chain:
    return prepared()


def test_announce_again_and_withdraw(chain: Chain) -> None:
    for _ in range(2):
        assert chain.send(OPERATOR, ANNOUNCE) == [ShardsAnnounced(NODE_ID, SMOL, V1, ALL)]
    assert chain.send(OPERATOR, WITHDRAW) == [ShardsWithdrawn(NODE_ID, SMOL, V1, ALL)]
    some = msgspec.structs.replace(ANNOUNCE, shard_indices=(1, 4))
    assert chain.send(OPERATOR, some) == [ShardsAnnounced(NODE_ID, SMOL, V1, (1, 4))]


@pytest.mark.parametrize("call", [ANNOUNCE, WITHDRAW], ids=["announce", "withdraw"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"node_id": "12D3KooWnobody"}, "unknown node"),
        ({"node_id": ""}, "unknown node"),
        ({"model_id": "other"}, "unknown model"),
        ({"version": V2}, "unknown model"),
        ({"shard_indices": ()}, "no shard_indices given"),
        ({"shard_indices": (5,)}, "unknown shard"),
        ({"shard_indices": (0, 65535)}, "unknown shard"),
        ({"shard_indices": (1, 0)}, "not strictly ascending"),
        ({"shard_indices": (0, 2, 2)}, "not strictly ascending"),
    ],
)
def test_announce_and_withdraw_refuse(chain: Chain, call: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(OPERATOR, msgspec.structs.replace(call, **changes))


def test_only_the_operator_announces(chain: Chain) -> None:
    for other in (USER, ADMIN):
        with pytest.raises(Reverted, match="sender is not the node's operator"):
            chain.send(other, ANNOUNCE)
    # An operator of some node is not the operator of this one.
    chain.send(USER, msgspec.structs.replace(JOIN, node_id=NodeId("12D3KooWuser")))
    with pytest.raises(Reverted, match="sender is not the node's operator"):
        chain.send(USER, ANNOUNCE)
    with pytest.raises(Reverted, match="neither the node's operator nor an admin"):
        chain.send(USER, WITHDRAW)
    assert chain.send(ADMIN, WITHDRAW) == [ShardsWithdrawn(NODE_ID, SMOL, V1, ALL)]


def test_a_node_that_left_or_whose_operator_is_expelled_announces_nothing(chain: Chain) -> None:
    chain.send(ADMIN, ExpelAccount(OPERATOR.address))
    with pytest.raises(Reverted, match="sender is not enrolled"):
        chain.send(OPERATOR, ANNOUNCE)
    assert chain.send(OPERATOR, WITHDRAW) == [ShardsWithdrawn(NODE_ID, SMOL, V1, ALL)]
    chain.send(OPERATOR, LeaveNode(NODE_ID))
    for call in (ANNOUNCE, WITHDRAW):
        with pytest.raises(Reverted, match="unknown node"):
            chain.send(OPERATOR, call)


def test_a_retired_model_is_withdrawn_but_not_announced(chain: Chain) -> None:
    chain.send(ADMIN, MIRROR)
    chain.send(ADMIN, RetireModel(SMOL, V1))
    with pytest.raises(Reverted, match="model is retired"):
        chain.send(OPERATOR, ANNOUNCE)
    with pytest.raises(Reverted, match="model is retired"):
        chain.send(ADMIN, msgspec.structs.replace(MIRROR, backend="ipfs"))
    chain.send(OPERATOR, WITHDRAW)
    chain.send(ADMIN, RemoveMirror(SMOL, V1, MIRROR.backend, MIRROR.uri))


def test_all_shards_of_the_largest_model_in_one_call(chain: Chain) -> None:
    count = SHARDS_PER_MODEL_MAX
    size = MODEL.shard_size * count
    chain.send(ADMIN, model(version=V2, total_size=size, shard_count=count, shard_hashes=hashes(count)))
    indices = tuple(range(count))
    call = AnnounceShards(NODE_ID, SMOL, V2, indices)
    assert chain.send(OPERATOR, call) == [ShardsAnnounced(NODE_ID, SMOL, V2, indices)]


SHARED = prepared()
"""For calls that are undone at once."""


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=7) | st.sets(st.integers(0, 6)).map(sorted))
def test_indices_are_taken_when_they_exist_and_ascend(indices: list[int]) -> None:
    call = msgspec.structs.replace(ANNOUNCE, shard_indices=tuple(indices))
    if indices and indices == sorted(set(indices)) and indices[-1] < MODEL.shard_count:
        assert SHARED.attempt(OPERATOR, call.to, call.encode()) == [ShardsAnnounced(NODE_ID, SMOL, V1, tuple(indices))]
    else:
        with pytest.raises(Reverted, match=r"no shard_indices|unknown shard|strictly ascending"):
            SHARED.attempt(OPERATOR, call.to, call.encode())


@pytest.mark.parametrize(
    ("backend", "uri"),
    [
        ("http", "http://m"),
        ("http", "https://m"),
        ("http", "https://" + "m" * (URI_BYTES_MAX - 8)),
        ("ipfs", "ipfs://bafybeigdyrzt"),
        ("ipfs", "https://gateway.example"),
    ],
)
def test_mirrors_come_and_go(chain: Chain, backend: str, uri: str) -> None:
    mirror = (SMOL, V1, backend, uri)
    assert chain.send(ADMIN, AddMirror(*mirror)) == [MirrorAdded(*mirror)]
    assert chain.view("Shards", "is_mirror", *mirror)
    with pytest.raises(Reverted, match="mirror is already added"):
        chain.send(ADMIN, AddMirror(*mirror))
    assert chain.send(ADMIN, RemoveMirror(*mirror)) == [MirrorRemoved(*mirror)]
    with pytest.raises(Reverted, match="unknown mirror"):
        chain.send(ADMIN, RemoveMirror(*mirror))
    assert chain.send(ADMIN, AddMirror(*mirror)) == [MirrorAdded(*mirror)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": "other"}, "unknown model"),
        ({"version": V2}, "unknown model"),
        ({"backend": "ftp"}, "backend is not http or ipfs"),
        ({"backend": "peer"}, "backend is not http or ipfs"),
        ({"backend": ""}, "backend is not http or ipfs"),
        ({"uri": ""}, "uri is empty or not printable"),
        ({"uri": "https://a b"}, "uri is empty or not printable"),
        ({"uri": "https://"}, "must begin with http"),
        ({"uri": "http://"}, "must begin with http"),
        ({"uri": "file:///etc/passwd"}, "must begin with http"),
        ({"uri": "h"}, "must begin with http"),
    ],
)
def test_add_mirror_refuses(chain: Chain, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(ADMIN, msgspec.structs.replace(MIRROR, **changes))


def test_mirrors_are_bounded(chain: Chain) -> None:
    for i in range(MIRRORS_PER_MODEL_MAX):
        chain.send(ADMIN, msgspec.structs.replace(MIRROR, uri=f"https://mirror.example/{i}"))
    with pytest.raises(Reverted, match="already has 64 mirrors"):
        chain.send(ADMIN, MIRROR)
    chain.send(ADMIN, RemoveMirror(SMOL, V1, "http", "https://mirror.example/7"))
    chain.send(ADMIN, MIRROR)


def test_bytes_that_are_no_text_are_refused(chain: Chain) -> None:
    with pytest.raises(Reverted):
        chain.send_raw(ADMIN, MIRROR.to, encode_loosely(msgspec.structs.replace(MIRROR, uri=b"https://\xff")))
