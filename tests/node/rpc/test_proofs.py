"""`getProof`: what it asks of the ledger for each kind, and whom and what it refuses. Over the fake node."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from contracts import events
from contracts.types import Address, ManifestHash, ModelId, NodeId, Version
from node.rpc.caller import NOBODY
from node.rpc.params import TRANSACTION_HEX_MAX

from .fake import BASIC, NODE_ID, PRO, TIERLESS, FakeNode
from .test_methods import BAD_INPUT, NOT_ALLOWED, NOT_FOUND, hexed, refusal, result

PRO_ACCOUNT, OTHER = hexed(PRO.address), Address(b"\x77" * 20)

REGISTERED = events.ModelRegistered(
    model_id=ModelId("mistral-7b"),
    version=Version("1"),
    total_size=1,
    shard_size=1,
    shard_count=1,
    shard_hashes=(),
    manifest_hash=ManifestHash(bytes(32)),
    minimum_tier="basic",
    core=True,
    architecture="",
    metadata="",
    admin=OTHER,
)
GRANTED = events.TierGranted(PRO.address, "pro", 1)
ANNOUNCED = events.ShardsAnnounced(NODE_ID, ModelId("mistral-7b"), Version("1"), (1, 3))

MODEL = {"kind": "model", "model_id": "mistral-7b"}
TIER = {"kind": "tier", "account": PRO_ACCOUNT}
SHARD = {"kind": "shard", "model_id": "mistral-7b", "shard_index": 3, "node_id": NODE_ID}


@pytest.mark.parametrize(
    ("params", "event", "others"),
    [
        (MODEL, REGISTERED, [{"model_id": "codegen-16b"}, {"version": "2"}]),
        (TIER, GRANTED, [{"account": BASIC.address}]),
        (SHARD, ANNOUNCED, [{"model_id": "x"}, {"version": "2"}, {"node_id": NodeId("x")}, {"shard_indices": (1, 2)}]),
    ],
    ids=["model", "tier", "shard"],
)
async def test_each_kind_looks_for_its_event_and_no_other(
    params: dict[str, Any], event: events.ContractEvent, others: list[dict[str, Any]]
) -> None:
    node = FakeNode()
    answered = await result(node, "getProof", params)
    assert set(answered) >= {"format", "genesis_hash", "way", "transaction", "receipt", "standing"}
    (shows,) = node.asked
    assert shows(event)
    assert not any(shows(msgspec.structs.replace(event, **change)) for change in others)
    assert [shows(other) for other in (REGISTERED, GRANTED, ANNOUNCED)].count(True) == 1
    assert not shows(events.ShardsWithdrawn(NODE_ID, ModelId("mistral-7b"), Version("1"), (3,)))


async def test_retired_model_can_be_proved_and_a_version_named() -> None:
    node = FakeNode()
    await result(node, "getProof", {"kind": "model", "model_id": "old-model", "version": "1"})
    assert node.asked[0](msgspec.structs.replace(REGISTERED, model_id="old-model"))


@pytest.mark.parametrize(
    ("params", "code", "words"),
    [
        ({}, BAD_INPUT, "missing required field 'kind'"),
        ({"kind": "block"}, BAD_INPUT, "'block'"),
        ({"kind": "model"}, BAD_INPUT, "takes model_id, version?; given were none"),
        ({"kind": "tier"}, BAD_INPUT, "takes account; given were none"),
        ({"kind": "shard", "model_id": "mistral-7b"}, BAD_INPUT, "takes model_id, shard_index, node_id, version?"),
        ({**MODEL, "account": PRO_ACCOUNT}, BAD_INPUT, "given were account, model_id"),
        ({**TIER, "model_id": "mistral-7b"}, BAD_INPUT, "given were account, model_id"),
        ({**MODEL, "model_id": "nobody"}, NOT_FOUND, "no model 'nobody'"),
        ({**MODEL, "version": "9"}, NOT_FOUND, "version '9'"),
        ({**TIER, "account": "0x12"}, BAD_INPUT, "40 hex digits"),
        ({**TIER, "account": hexed(TIERLESS.address)}, NOT_FOUND, "holds no tier now"),
        ({**SHARD, "shard_index": 4}, BAD_INPUT, "shards 0 to 3"),
        ({**SHARD, "shard_index": -1}, BAD_INPUT, "shards 0 to 3"),
        ({**SHARD, "node_id": "12D3KooWother"}, NOT_FOUND, "does not announce shard 3"),
        ({**SHARD, "node_id": "x" * TRANSACTION_HEX_MAX}, NOT_FOUND, "does not announce shard 3"),
    ],
)
async def test_what_is_not_asked_of_the_ledger(params: dict[str, Any], code: int, words: str) -> None:
    node = FakeNode()
    found, line = await refusal(node, "getProof", params)
    assert (found, len(line) < 400) == (code, True)
    assert words in line
    assert not node.asked


async def test_nobody_may_have_the_ledger_searched() -> None:
    node = FakeNode()
    code, _ = await refusal(node, "getProof", MODEL, NOBODY)
    assert code == NOT_ALLOWED
    assert not node.asked
