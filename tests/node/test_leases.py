"""Who is there: leases on the ledger's clock, a grace on this process's; and what of that makes a node's share."""

from __future__ import annotations

import math

import msgspec
import pytest

from contracts import events
from contracts.events import ContractEvent
from contracts.types import Address, ModelId, NodeId, ShardHash, TransactionHash, Version
from node import state as states
from node.leases import GRACE, Leases
from node.share import Share
from node.state import State

LEASE_S = 80
GRACE_S = LEASE_S * GRACE
NODES = [NodeId(f"node-{letter}") for letter in "abcdef"]
SIZE = 1 << 20


def later(state: State, time: int, *found: ContractEvent) -> State:
    """After a block of this time."""
    state = State(state.registry, state.tiers, state.members, state.shards, time)
    for event in found:
        state = states.apply(state, event, TransactionHash(bytes(32)))
    return state


def joined(node_id: NodeId, role: str = "storage") -> events.NodeJoined:
    return events.NodeJoined(node_id, Address(node_id.encode().ljust(20, b"\0")), role, ())


def renewed(node_id: NodeId, room: int = 1 << 40) -> events.LeaseRenewed:
    return events.LeaseRenewed(node_id, room)


def model(name: str = "m", shards: int = 8) -> events.ModelRegistered:
    hashes = tuple(ShardHash(f"{name} {i}".encode().ljust(32, b"\1")) for i in range(shards))
    return events.ModelRegistered(
        model_id=ModelId(name), version=Version("1"), total_size=shards * SIZE, shard_size=SIZE, shard_count=shards,
        shard_hashes=hashes, manifest_hash=bytes(32), minimum_tier="basic", core=False, architecture="", metadata="",
        admin=Address(bytes(20)),
    )  # fmt: skip


def announced(node_id: NodeId, *indices: int) -> events.ShardsAnnounced:
    return events.ShardsAnnounced(node_id, ModelId("m"), Version("1"), indices)


def share(node_id: NodeId) -> Share:
    return Share(node_id, 3, Leases(LEASE_S), SIZE)


def indices(share: Share, state: State, moment: float = 0.0) -> set[int]:
    return {index for _, index in share.wanted(state, moment)}


START = later(State(), 1000, *map(joined, NODES), model())


def test_a_member_is_there_until_its_lease_and_the_grace_are_over() -> None:
    leases = Leases(LEASE_S)
    quiet = later(START, 1000 + LEASE_S - 1, *map(renewed, NODES[1:]))
    assert leases.live(quiet, 0.0) == set(NODES)
    assert leases.next_change(0.0) == math.inf
    over = later(quiet, 1000 + LEASE_S)
    assert leases.live(over, 5.0) == set(NODES)
    assert leases.next_change(5.0) == 5.0 + GRACE_S
    assert leases.live(over, 5.0 + GRACE_S) == set(NODES[1:])
    back = later(over, 1000 + LEASE_S + 1, renewed(NODES[0]))
    assert leases.live(back, 100.0) == set(NODES)


def test_a_network_that_slept_finds_nobody_gone() -> None:
    """The first renewal after a day makes everybody else late, for as long as it takes them to renew."""
    leases = Leases(LEASE_S)
    asleep = START
    assert leases.live(asleep, 0.0) == set(NODES)
    morning = later(asleep, 90_000, renewed(NODES[0]))
    assert leases.live(morning, 1.0) == set(NODES)
    awake = later(morning, 90_001, *map(renewed, NODES[1:4]))
    assert leases.live(awake, 2.0) == set(NODES)
    assert leases.live(awake, 1.0 + GRACE_S) == set(NODES[:4]), "two did not wake up"


def test_a_second_silence_has_a_grace_of_its_own() -> None:
    leases = Leases(LEASE_S)
    over = later(START, 1000 + LEASE_S, *map(renewed, NODES[1:]))
    leases.live(over, 0.0)
    back = later(over, 1000 + LEASE_S + 1, renewed(NODES[0]))
    leases.live(back, 1.0)
    again = later(back, 1001 + 2 * LEASE_S, *map(renewed, NODES[1:]))
    assert NODES[0] in leases.live(again, GRACE_S + 1.0)


@pytest.mark.parametrize(
    ("seen_at", "now", "due"), [(1000, 1000.0, 40.0), (1039, 1039.5, 0.5), (1039, 1040.0, 0.0), (1000, 2000.0, 0.0)]
)
def test_all_renew_at_the_halves_of_a_lease(seen_at: int, now: float, due: float) -> None:
    assert Leases(LEASE_S).renewal_due(seen_at, now) == due


def test_three_of_the_live_ones_hold_a_shard() -> None:
    shares = [share(node_id) for node_id in NODES]
    for index in range(8):
        assert sum(index in indices(one, START) for one in shares) == 3
    over = later(START, 1000 + LEASE_S, *map(renewed, NODES[1:]))
    for one in shares:
        one.wanted(over, 0.0)
    for index in range(8):
        assert sum(index in indices(one, over, GRACE_S) for one in shares[1:]) == 3, "the first one is gone"


def test_what_is_announced_is_wanted_whoever_should_hold_it() -> None:
    everything = later(START, 1001, announced(NODES[0], *range(8)))
    assert indices(share(NODES[0]), everything) == set(range(8))
    gateway = later(State(), 1000, joined(NODES[0], "gateway"), model())
    assert indices(share(NODES[0]), gateway) == set()
    assert indices(share(NODES[0]), later(gateway, 1001, announced(NODES[0], 2))) == {2}


def test_who_has_no_room_is_given_nothing_new_and_keeps_what_it_has() -> None:
    one = share(NODES[0])
    before = indices(one, START)
    kept = min(before)
    full = later(START, 1001, announced(NODES[0], kept), renewed(NODES[0], SIZE - 1))
    assert indices(one, full) == {kept}
    others = [share(node_id) for node_id in NODES[1:]]
    for index in before - {kept}:
        assert sum(index in indices(other, full) for other in others) == 3
    assert sum(kept in indices(other, full) for other in others) == 2
    assert indices(one, later(full, 1002, renewed(NODES[0], SIZE))) == before


def test_short_are_those_with_too_few_live_copies() -> None:
    one = share(NODES[0])
    held = later(START, 1001, *(announced(node_id, 0, 1) for node_id in NODES[:3]), announced(NODES[3], 1))
    assert {index for _, index in one.short(held, 0.0)} == set(range(2, 8))
    over = later(held, 1001 + LEASE_S, *map(renewed, NODES[1:]))
    later_held = one.short(over, 0.0)
    assert {index for _, index in later_held} == set(range(2, 8)), "late is not gone"
    mine = share(NODES[1])
    mine.short(over, 0.0)
    assert {index for _, index in mine.short(over, GRACE_S)} == {0, *range(2, 8)}
    retired = later(over, 2000, events.ModelRetired(ModelId("m"), Version("1")))
    assert mine.short(retired, GRACE_S) == ()


def test_spare_is_what_others_should_hold_and_enough_of_them_do() -> None:
    keeper = {index: [n for n in NODES if index in indices(share(n), START)] for index in range(8)}
    index, holder = next((i, n) for i in range(8) for n in NODES if n not in keeper[i])
    one = share(holder)
    two = later(START, 1001, announced(holder, index), *(announced(n, index) for n in keeper[index][:2]))
    asked = {two.registry.find("m").shard_hashes[index]}
    assert not one.spare(two, asked, 0.0), "two others"
    three = later(two, 1002, announced(keeper[index][2], index))
    assert one.spare(three, asked, 0.0) == asked
    assert not one.spare(three, asked, 0.0, keeps=lambda found: found.model_id == "m")
    assert not one.spare(three, {ShardHash(bytes(32))}, 0.0), "no model has it"
    assert not share(keeper[index][0]).spare(three, asked, 0.0), "it is one of the three"
    over = later(three, 1002 + LEASE_S, *(renewed(n) for n in NODES if n != keeper[index][0]))
    one.spare(over, asked, 0.0)
    assert not one.spare(over, asked, GRACE_S), "one of the others is gone"
    twin = later(three, 1003, msgspec.structs.replace(model("twin"), shard_hashes=model().shard_hashes))
    assert not one.spare(twin, asked, 0.0), "another model with the same bytes has too few"
    retired = later(two, 1003, events.ModelRetired(ModelId("m"), Version("1")))
    assert one.spare(retired, asked, 0.0) == asked
