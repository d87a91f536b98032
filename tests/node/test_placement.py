"""Placement: the same answer everywhere, and as little moved as can be when the members change."""

from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from contracts.types import Address, NodeId, ShardHash
from node.members import Member
from node.placement import keepers

NODE_IDS = st.sets(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=12)


def members(node_ids: set[str], role: str = "storage") -> list[Member]:
    return [Member(NodeId(node_id), Address(bytes(20)), role, ()) for node_id in sorted(node_ids)]


def shard(number: int) -> ShardHash:
    return ShardHash(sha256(number.to_bytes(8, "big")).digest())


@given(NODE_IDS, st.integers(0, 1000), st.randoms())
def test_the_order_of_members_does_not_matter(node_ids: set[str], number: int, random: object) -> None:
    ordered = members(node_ids)
    shuffled = list(ordered)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert keepers(shard(number), ordered, 3) == keepers(shard(number), shuffled, 3)


@given(NODE_IDS, st.integers(0, 1000))
def test_as_many_keepers_as_there_may_be_and_each_once(node_ids: set[str], number: int) -> None:
    found = keepers(shard(number), members(node_ids), 3)
    assert len(found) == len(set(found)) == min(3, len(node_ids))


@given(NODE_IDS, st.integers(0, 1000))
def test_a_member_that_leaves_moves_only_its_own_shards(node_ids: set[str], number: int) -> None:
    everybody = keepers(shard(number), members(node_ids), 3)
    for gone in node_ids:
        left = keepers(shard(number), members(node_ids - {gone}), 3)
        stayed = tuple(node_id for node_id in everybody if node_id != gone)
        assert left[: len(stayed)] == stayed


def test_gateways_keep_nothing() -> None:
    assert keepers(shard(1), members({"a", "b"}, "gateway"), 3) == ()


def test_the_load_is_spread() -> None:
    node_ids = {f"node-{number}" for number in range(10)}
    held = [node_id for number in range(1000) for node_id in keepers(shard(number), members(node_ids), 3)]
    assert all(200 < held.count(NodeId(node_id)) < 400 for node_id in node_ids), "300 each on average"
