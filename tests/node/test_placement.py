"""Placement: the same answer everywhere, copies apart where there is a choice, and little moved when nodes change."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from contracts.types import Address, NodeId, ShardHash
from node.placement import Candidate, keepers

NODE_IDS = st.sets(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=12)
OPERATORS = [Address(bytes([number]) * 20) for number in range(12)]


def candidates(node_ids: Iterable[str]) -> list[Candidate]:
    """All of one operator and host."""
    return [Candidate(NodeId(node_id), OPERATORS[0], "10.0.0.1") for node_id in sorted(node_ids)]


def spread(operators: list[int], hosts: list[int]) -> list[Candidate]:
    found = enumerate(zip(operators, hosts, strict=False))
    return [Candidate(NodeId(f"n{i}"), OPERATORS[operator], f"10.0.0.{host}") for i, (operator, host) in found]


def shard(number: int) -> ShardHash:
    return ShardHash(sha256(number.to_bytes(8, "big")).digest())


@given(NODE_IDS, st.integers(0, 1000), st.randoms())
def test_the_order_of_candidates_does_not_matter(node_ids: set[str], number: int, random: Random) -> None:
    ordered = candidates(node_ids)
    shuffled = list(ordered)
    random.shuffle(shuffled)
    assert keepers(shard(number), ordered, 3) == keepers(shard(number), shuffled, 3)


@given(NODE_IDS, st.integers(0, 1000))
def test_as_many_keepers_as_there_may_be_and_each_once(node_ids: set[str], number: int) -> None:
    found = keepers(shard(number), candidates(node_ids), 3)
    assert len(found) == len(set(found)) == min(3, len(node_ids))


@given(NODE_IDS, st.integers(0, 1000))
def test_one_that_leaves_moves_only_its_own_shards(node_ids: set[str], number: int) -> None:
    everybody = keepers(shard(number), candidates(node_ids), 3)
    for gone in node_ids:
        left = keepers(shard(number), candidates(node_ids - {gone}), 3)
        stayed = tuple(node_id for node_id in everybody if node_id != gone)
        assert left[: len(stayed)] == stayed


@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=12), st.lists(st.integers(0, 5), min_size=12), st.integers(0, 99)
)
def test_copies_lie_apart_where_there_is_a_choice(operators: list[int], hosts: list[int], number: int) -> None:
    nodes = spread(operators, hosts)
    chosen = [next(node for node in nodes if node.node_id == keeper) for keeper in keepers(shard(number), nodes, 3)]
    for place, node in enumerate(chosen):
        before = chosen[:place]
        others = [other for other in nodes if other not in chosen[: place + 1]]
        assert all(node.shares_with(before) <= other.shares_with(before) for other in others)


def test_no_operator_has_two_copies_while_there_are_three_operators() -> None:
    nodes = spread([0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5])
    for number in range(100):
        chosen = keepers(shard(number), nodes, 3)
        assert len({node.operator for node in nodes if node.node_id in chosen}) == 3


def test_a_host_that_is_not_known_is_not_everybodys() -> None:
    nodes = [Candidate(NodeId(f"n{i}"), OPERATORS[i]) for i in range(3)]
    assert nodes[0].shares_with(nodes[1:]) == 0


def test_the_load_is_spread() -> None:
    node_ids = {f"node-{number}" for number in range(10)}
    held = [node_id for number in range(1000) for node_id in keepers(shard(number), candidates(node_ids), 3)]
    assert all(200 < held.count(NodeId(node_id)) < 400 for node_id in node_ids), "300 each on average"
