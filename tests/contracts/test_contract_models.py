"""Models: what is registered is whole and stays, and the core model is always one in use."""

from typing import Any

import pytest
from eth_abi.abi import encode
from eth_hash.auto import keccak
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts.calls import RegisterModel, RetireModel, SetCoreModel, SetPublic
from contracts.events import CoreModelSet, ModelPublicSet, ModelRegistered, ModelRetired
from contracts.limits import UINT64_MAX
from contracts.types import SHARDS_PER_MODEL_MAX, ModelId, Version
from tests.contracts.chain import ADMIN, MIB, MODEL, Chain, Reverted, encode_loosely, hashes, model

SMOL, V1, V2 = ModelId("smol"), Version("1.0"), Version("2.0")


def registered(call: RegisterModel) -> ModelRegistered:
    fields = {name: getattr(call, name) for name in call.__struct_fields__}
    return ModelRegistered(**fields, admin=ADMIN.address)


def test_register_logs_everything_and_stores_little(chain: Chain) -> None:
    assert chain.send(ADMIN, MODEL) == [registered(MODEL)]
    digest = keccak(encode(["bytes32[]"], [MODEL.shard_hashes]))
    assert chain.view("Models", "model", SMOL, V1) == (5, False, digest, MODEL.manifest_hash, "basic")
    assert chain.view("Models", "required_tier", SMOL, V1) == "basic"
    assert chain.view("Models", "active_shard_count", SMOL, V1) == 5
    assert chain.view("Models", "core_model_id") == ""


def test_register_as_core(chain: Chain) -> None:
    call = model(core=True)
    assert chain.send(ADMIN, call) == [registered(call), CoreModelSet(SMOL, V1)]
    assert (chain.view("Models", "core_model_id"), chain.view("Models", "core_version")) == (SMOL, V1)
    # The next core model simply takes its place.
    assert chain.send(ADMIN, model(core=True, version=V2))[1:] == [CoreModelSet(SMOL, V2)]


def test_register_once_and_for_all(chain: Chain) -> None:
    chain.send(ADMIN, MODEL)
    with pytest.raises(Reverted, match="model is already registered"):
        chain.send(ADMIN, MODEL)
    with pytest.raises(Reverted, match="model is already registered"):
        chain.send(ADMIN, model(total_size=1, shard_count=1, shard_hashes=hashes(1, "other"), minimum_tier="pro"))
    chain.send(ADMIN, RetireModel(SMOL, V1))
    with pytest.raises(Reverted, match="model is already registered"):
        chain.send(ADMIN, MODEL)
    chain.send(ADMIN, model(version=V2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": ""}, "model_id must match"),
        ({"model_id": "Smol"}, "model_id must match"),
        ({"model_id": ".smol"}, "model_id must match"),
        ({"version": ""}, "version must match"),
        ({"version": "1 0"}, "version must match"),
        ({"total_size": 0}, "total_size is zero"),
        ({"shard_size": 0}, "shard_size is zero"),
        ({"shard_size": MIB - 1}, "shard_size is not a multiple of 1 MiB"),
        ({"shard_size": MIB + 1}, "shard_size is not a multiple of 1 MiB"),
        ({"shard_count": 4}, "shard_count is not ceil"),
        ({"shard_count": 6}, "shard_count is not ceil"),
        ({"shard_count": 0}, "shard_count is not ceil"),
        ({"total_size": 5 * MIB + 1}, "shard_count is not ceil"),
        ({"total_size": 4 * MIB}, "shard_count is not ceil"),
        ({"total_size": 4 * MIB, "shard_count": 4}, "shard_count is not the number"),
        ({"shard_hashes": hashes(4)}, "shard_count is not the number"),
        ({"shard_hashes": hashes(6)}, "shard_count is not the number"),
        ({"shard_hashes": ()}, "shard_count is not the number"),
        ({"shard_hashes": (bytes(32), *hashes(4))}, "a shard hash is zero"),
        ({"shard_hashes": (*hashes(4), bytes(32))}, "a shard hash is zero"),
        ({"manifest_hash": bytes(32)}, "manifest_hash is zero"),
        ({"minimum_tier": "gold"}, "unknown tier"),
        ({"minimum_tier": ""}, "unknown tier"),
        ({"architecture": "lla\nma"}, "architecture is not printable ASCII"),
        ({"metadata": "tab\t"}, "metadata is not printable ASCII"),
        ({"metadata": "größer"}, "metadata is not printable ASCII"),
    ],
)
def test_register_refuses(chain: Chain, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Reverted, match=reason):
        chain.send(ADMIN, model(**changes))
    assert chain.view("Models", "model", SMOL, V1)[0] == 0


def test_register_takes_bytes_that_are_no_text_at_all(chain: Chain) -> None:
    # A log with such bytes would not decode, and no node could read the chain on.
    for argument in ("model_id", "version", "minimum_tier", "architecture", "metadata"):
        with pytest.raises(Reverted):
            chain.send_raw(ADMIN, MODEL.to, encode_loosely(model(**{argument: b"\xff\xfe"})))


def test_the_largest_registration_fits(chain: Chain) -> None:
    call = model(
        model_id="m" * 64,
        version="9" * 64,
        total_size=SHARDS_PER_MODEL_MAX * (4 << 30),
        shard_size=4 << 30,
        shard_count=SHARDS_PER_MODEL_MAX,
        shard_hashes=hashes(SHARDS_PER_MODEL_MAX),
        architecture="a" * 64,
        metadata="~" * 1024,
        core=True,
    )
    assert chain.send(ADMIN, call) == [registered(call), CoreModelSet(ModelId("m" * 64), Version("9" * 64))]


near = st.integers(-2, 2)


@settings(max_examples=150, deadline=None)
@given(
    shard_size=st.integers(1, 64).map(lambda n: n * MIB) | st.sampled_from([UINT64_MAX // MIB * MIB, 1 << 63]),
    shards=st.integers(0, 12),
    beside=st.sampled_from([-MIB, -1, 0, 1, MIB]),
    count_off=near,
    hashes_off=near,
)
@example(shard_size=UINT64_MAX // MIB * MIB, shards=1, beside=MIB - 1, count_off=0, hashes_off=0)
def test_shard_count_is_ceil_and_the_number_of_hashes(
    shard_size: int, shards: int, beside: int, count_off: int, hashes_off: int
) -> None:
    total_size = min(max(shards * shard_size + beside, 0), UINT64_MAX)
    ceiling = -(-total_size // shard_size)
    shard_count, hash_count = max(ceiling + count_off, 0), max(ceiling + hashes_off, 0)
    call = model(total_size=total_size, shard_size=shard_size, shard_count=shard_count, shard_hashes=hashes(hash_count))
    if total_size > 0 and shard_count == ceiling == hash_count:
        assert SHARED.attempt(ADMIN, call.to, call.encode()) == [registered(call)]
    else:
        with pytest.raises(Reverted, match=r"total_size is zero|shard_count is not"):
            SHARED.attempt(ADMIN, call.to, call.encode())


SHARED = Chain()
"""For calls that are undone at once."""


def test_retire(chain: Chain) -> None:
    chain.send(ADMIN, MODEL)
    assert chain.send(ADMIN, RetireModel(SMOL, V1)) == [ModelRetired(SMOL, V1)]
    assert chain.view("Models", "shard_count_of", SMOL, V1) == 5
    for view in ("required_tier", "active_shard_count"):
        with pytest.raises(Reverted, match="model is retired"):
            chain.view("Models", view, SMOL, V1)
    for call in (RetireModel(SMOL, V1), SetCoreModel(SMOL, V1), SetPublic(SMOL, V1, True)):
        with pytest.raises(Reverted, match="model is retired"):
            chain.send(ADMIN, call)


def test_a_model_is_public_once_it_is_said_until_it_is_taken_back(chain: Chain) -> None:
    chain.send(ADMIN, MODEL)
    chain.send(ADMIN, model(version=V2))
    with pytest.raises(Reverted, match="model is not public"):
        chain.send(ADMIN, SetPublic(SMOL, V1, False))
    assert chain.send(ADMIN, SetPublic(SMOL, V1, True)) == [ModelPublicSet(SMOL, V1, True)]
    assert [chain.view("Models", "is_public", SMOL, version) for version in (V1, V2)] == [True, False]
    with pytest.raises(Reverted, match="model is already public"):
        chain.send(ADMIN, SetPublic(SMOL, V1, True))
    assert chain.send(ADMIN, SetPublic(SMOL, V1, False)) == [ModelPublicSet(SMOL, V1, False)]
    assert not chain.view("Models", "is_public", SMOL, V1)


def test_a_retired_model_is_not_public(chain: Chain) -> None:
    chain.send(ADMIN, MODEL)
    chain.send(ADMIN, SetPublic(SMOL, V1, True))
    assert chain.send(ADMIN, RetireModel(SMOL, V1)) == [ModelRetired(SMOL, V1)]
    assert not chain.view("Models", "is_public", SMOL, V1)
    with pytest.raises(Reverted, match="model is retired"):
        chain.send(ADMIN, SetPublic(SMOL, V1, False))


def test_what_is_unknown_is_refused(chain: Chain) -> None:
    chain.send(ADMIN, MODEL)
    unknown = ModelId("1.0"), Version("smol")
    for call in (RetireModel(SMOL, V2), SetCoreModel(SMOL, V2), SetCoreModel(*unknown), SetPublic(SMOL, V2, True)):
        with pytest.raises(Reverted, match="unknown model"):
            chain.send(ADMIN, call)
    for view in ("required_tier", "active_shard_count", "shard_count_of"):
        with pytest.raises(Reverted, match="unknown model"):
            chain.view("Models", view, SMOL, V2)


def test_the_core_model_stays_until_another_is_core(chain: Chain) -> None:
    chain.send(ADMIN, model(core=True))
    chain.send(ADMIN, model(version=V2))
    with pytest.raises(Reverted, match="model is the core model"):
        chain.send(ADMIN, RetireModel(SMOL, V1))
    with pytest.raises(Reverted, match="already the core model"):
        chain.send(ADMIN, SetCoreModel(SMOL, V1))
    assert chain.send(ADMIN, SetCoreModel(SMOL, V2)) == [CoreModelSet(SMOL, V2)]
    assert chain.send(ADMIN, RetireModel(SMOL, V1)) == [ModelRetired(SMOL, V1)]
