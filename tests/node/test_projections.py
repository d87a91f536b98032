"""The projections: each event's effect, and fold(events) == fold(snapshot + rest) through encode and decode."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import events
from contracts.errors import Corrupt, NotFound
from contracts.events import EVENT_TYPES, ContractEvent
from contracts.types import Address, ManifestHash, ModelId, NodeId, ShardHash, TransactionHash, Version
from ledger.record import BlockRecord, TransactionRecord
from node import state
from node.shard_index import Mirror
from node.state import State

NAMES = ("one", "two", "three")
NODES = tuple(NodeId(f"12D3K{letter}") for letter in "abcd")
ACCOUNTS = tuple(Address(bytes([i]) * 20) for i in range(1, 5))
V1 = Version("1")
ACCOUNT_EVENTS = ("Enrolled", "Expelled", "AdminAdded", "AdminRemoved", "AuthorityAdded", "AuthorityRemoved")

models = st.sampled_from(NAMES).map(ModelId)
versions = st.sampled_from(("1", "2")).map(Version)
nodes = st.sampled_from(NODES)
accounts = st.sampled_from(ACCOUNTS)
indices = st.sets(st.integers(0, 5), min_size=1).map(lambda found: tuple(sorted(found)))
tiers = st.sampled_from(("basic", "pro"))
times = st.integers(1, 1 << 40)


def registered(model_id: str = "one", version: str = "1", core: bool = False) -> events.ModelRegistered:
    return events.ModelRegistered(
        ModelId(model_id), Version(version), 10, 4, 3, (ShardHash(b"\1" * 32),) * 3, ManifestHash(b"\2" * 32), "basic",
        core, "llama", "{}", ACCOUNTS[0],
    )  # fmt: skip


def announced(node_id: str, *shards: int, model_id: str = "one") -> events.ShardsAnnounced:
    return events.ShardsAnnounced(NodeId(node_id), ModelId(model_id), V1, shards)


def withdrawn(node_id: str, *shards: int, model_id: str = "one") -> events.ShardsWithdrawn:
    return events.ShardsWithdrawn(NodeId(node_id), ModelId(model_id), V1, shards)


def checked(account: Address = ACCOUNTS[0], until: int = 100) -> events.TierChecked:
    return events.TierChecked(account, ModelId("one"), V1, "basic", "basic", True, until, ACCOUNTS[1])


TRANSACTION = TransactionHash(b"\7" * 32)


def after(*sequence: ContractEvent, start: State | None = None) -> State:
    found = start or State()
    for event in sequence:
        found = state.apply(found, event, TRANSACTION)
    return found


# One by one


def test_models_are_found_by_name_and_newest_version() -> None:
    found = after(registered(), registered(version="2"), registered("two")).registry
    assert found.find("one").version == "2"
    assert found.find("one", "1").version == "1"
    assert sorted(model.registered for model in found.models.values()) == [0, 1, 2]
    for name, version in (("none", None), ("one", "3")):
        with pytest.raises(NotFound, match="aigen model list"):
            found.find(name, version)


def test_retired_versions_are_found_only_when_no_other_is_meant() -> None:
    both = (registered(), registered(version="2"))
    assert after(*both, events.ModelRetired(ModelId("one"), Version("2"))).registry.find("one").version == "1"
    all_retired = [events.ModelRetired(ModelId("one"), Version(version)) for version in ("1", "2")]
    found = after(*both, *all_retired).registry.find("one")
    assert (found.version, found.retired) == ("2", True)
    assert after(*both, *all_retired).registry.find("one", "1").retired


def test_a_model_is_public_until_that_is_taken_back_or_it_is_retired() -> None:
    def public(version: str, is_public: bool = True) -> events.ModelPublicSet:
        return events.ModelPublicSet(ModelId("one"), Version(version), is_public)

    both = after(registered(), registered(version="2"), registered("two"))
    assert both.registry.public_hashes() == frozenset()
    found = after(public("2"), start=both)
    assert [found.registry.find("one", version).public for version in ("1", "2")] == [False, True]
    assert found.registry.public_hashes() == {b"\1" * 32, b"\2" * 32}
    assert after(public("2", False), start=found) == both
    retired = after(events.ModelRetired(ModelId("one"), Version("2")), start=found).registry
    assert not retired.find("one", "2").public
    assert retired.public_hashes() == frozenset()


def test_core_model_is_the_one_set_last() -> None:
    sets = [events.CoreModelSet(ModelId(name), V1) for name in ("one", "two")]
    assert after(registered(), registered("two"), *sets).registry.core == ("two", "1")


def test_last_shard_is_shorter() -> None:
    model = after(registered()).registry.find("one")
    assert [model.size_of_shard(i) for i in range(3)] == [4, 4, 2]


def test_a_tier_weighs_by_its_place_among_the_others() -> None:
    defined = (events.TierDefined(name, rank, 8) for name, rank in (("pro", 20), ("basic", 7), ("unlimited", 255)))
    held = after(*defined).tiers
    assert [held.weight(name) for name in ("", "basic", "pro", "unlimited")] == [1, 1, 2, 3]


def test_tiers_end_at_their_time_and_with_their_revocation() -> None:
    held = after(events.TierGranted(ACCOUNTS[0], "pro", 100))
    grant = held.tiers.held(ACCOUNTS[0], 99.9)
    assert grant is not None
    assert grant.tier == "pro"
    assert held.tiers.held(ACCOUNTS[0], 100) is None
    assert held.tiers.held(ACCOUNTS[1], 1) is None
    assert after(events.TierRevoked(ACCOUNTS[0]), start=held).tiers.held(ACCOUNTS[0], 1) is None


@pytest.mark.parametrize("change", [events.TierGranted(ACCOUNTS[0], "pro", 9), events.TierRevoked(ACCOUNTS[0])])
def test_check_stands_until_its_end_or_a_change_of_the_grant(change: ContractEvent) -> None:
    found = after(events.TierGranted(ACCOUNTS[0], "basic", 500), checked())
    standing = found.tiers.standing_check(ACCOUNTS[0], ModelId("one"), V1, 99)
    assert standing is not None
    assert standing.transaction_hash == TRANSACTION
    assert found.tiers.standing_check(ACCOUNTS[0], ModelId("one"), V1, 100) is None
    assert found.tiers.standing_check(ACCOUNTS[0], ModelId("two"), V1, 1) is None
    assert after(change, start=found).tiers.standing_check(ACCOUNTS[0], ModelId("one"), V1, 1) is None


def test_members_join_change_and_leave_with_what_they_announced() -> None:
    joined = events.NodeJoined(NODES[0], ACCOUNTS[0], "worker", ("a",))
    moved = events.NodeJoined(NODES[0], ACCOUNTS[0], "storage", ("b",))
    found = after(joined, announced(NODES[0], 0, 2), announced(NODES[1], 0), moved)
    assert found.members.members[NODES[0]].role == "storage"
    assert found.shards.holders_of(("one", V1), 0) == {NODES[0], NODES[1]}
    left = after(events.NodeLeft(NODES[0]), start=found)
    assert not left.members.members
    assert left.shards.holders == {("one", V1, 0): {NODES[1]}}
    assert left.shards.announced_by(NODES[0], (ModelId("one"), V1)) == frozenset()


def test_announcing_again_and_withdrawing_what_was_never_announced_change_nothing() -> None:
    found = after(announced(NODES[0], 0, 1))
    assert after(announced(NODES[0], 1), start=found) == found
    assert (
        after(withdrawn(NODES[0], 2), withdrawn(NODES[1], 0), withdrawn(NODES[0], 0, model_id="two"), start=found)
        == found
    )
    assert after(withdrawn(NODES[0], 0, 1), start=found) == State()


def test_mirrors_are_added_and_removed() -> None:
    added = events.MirrorAdded(ModelId("one"), V1, "http", "http://a")
    assert after(added).shards.mirrors[ModelId("one"), V1] == {Mirror("http", "http://a")}
    assert after(added, events.MirrorRemoved(ModelId("one"), V1, "http", "http://a")) == State()


@pytest.mark.parametrize("name", ACCOUNT_EVENTS)
def test_the_ledgers_own_events_change_nothing_here(name: str) -> None:
    assert after(EVENT_TYPES[name](ACCOUNTS[0])) == State()


def test_a_lease_begins_with_joining_and_is_renewed() -> None:
    joined = state.fold(State(), records([events.NodeJoined(NODES[0], ACCOUNTS[0], "storage", ("a",))], 100))
    member = joined.members.members[NODES[0]]
    assert (member.seen_at, member.room, joined.time) == (100, None, 100)
    assert (member.is_live(109, 10), member.is_live(110, 10)) == (True, False)
    renewed = state.fold(joined, records([events.LeaseRenewed(NODES[0], 7)], 105))
    assert renewed.members.members[NODES[0]] == msgspec.structs.replace(member, seen_at=105, room=7)
    again = state.fold(renewed, records([events.NodeJoined(NODES[0], ACCOUNTS[0], "worker", ())], 120))
    found = again.members.members[NODES[0]]
    assert (found.role, found.seen_at, found.room) == ("worker", 120, 7), "what it said of its room stands"


# All together


mirrored = (models, versions, st.just("http"), st.sampled_from(("http://a", "http://b")))
any_event = st.one_of(
    st.builds(events.ShardsAnnounced, nodes, models, versions, indices),
    st.builds(events.ShardsWithdrawn, nodes, models, versions, indices),
    st.builds(registered, models, versions, st.booleans()),
    st.builds(events.ModelRetired, models, versions),
    st.builds(events.CoreModelSet, models, versions),
    st.builds(events.ModelPublicSet, models, versions, st.booleans()),
    st.builds(events.NodeJoined, nodes, accounts, st.sampled_from(("worker", "storage")), st.just(("a", "b"))),
    st.builds(events.NodeLeft, nodes),
    st.builds(events.LeaseRenewed, nodes, times),
    st.builds(events.TierDefined, tiers, st.integers(1, 255), times),
    st.builds(events.TierGranted, accounts, tiers, times),
    st.builds(events.TierRevoked, accounts),
    st.builds(events.CheckPeriodSet, times),
    st.builds(checked, accounts, times),
    st.builds(events.MirrorAdded, *mirrored),
    st.builds(events.MirrorRemoved, *mirrored),
    *(st.builds(EVENT_TYPES[name], accounts) for name in ACCOUNT_EVENTS),
)


def possible(drawn: list[ContractEvent]) -> list[ContractEvent]:
    """The events that the contracts' rules would let follow one another."""
    found: list[ContractEvent] = []
    now = State()
    for event in drawn:
        if _is_possible(now, event):
            found.append(event)
            now = after(event, start=now)
    return found


def possible_samples() -> list[ContractEvent]:
    """One of each event that a projection folds."""
    return [
        announced(NODES[0], 0), withdrawn(NODES[0], 0), registered(), events.ModelRetired(ModelId("one"), V1),
        events.CoreModelSet(ModelId("one"), V1), events.NodeJoined(NODES[0], ACCOUNTS[0], "worker", ()),
        events.NodeLeft(NODES[0]), events.LeaseRenewed(NODES[0], 1), events.ModelPublicSet(ModelId("one"), V1, True),
        events.TierDefined("pro", 1, 1), events.TierGranted(ACCOUNTS[0], "pro", 1),
        events.TierRevoked(ACCOUNTS[0]), events.CheckPeriodSet(1), checked(),
        events.MirrorAdded(ModelId("one"), V1, "http", "a"), events.MirrorRemoved(ModelId("one"), V1, "http", "a"),
    ]  # fmt: skip


def test_every_event_is_folded() -> None:
    """A new event that nobody matches would fall out as None."""
    assert {*ACCOUNT_EVENTS, *(type(event).__name__ for event in possible_samples())} == set(EVENT_TYPES)
    for event in possible_samples():
        before = after(*possible_samples()[2:3], events.NodeJoined(NODES[0], ACCOUNTS[0], "worker", ()))
        before = after(events.TierGranted(ACCOUNTS[0], "basic", 1), start=before)
        assert isinstance(after(event, start=before), State)


def _is_possible(now: State, event: ContractEvent) -> bool:
    match event:
        case events.ModelRegistered():
            return (event.model_id, event.version) not in now.registry.models
        case events.ModelRetired() | events.CoreModelSet() | events.ModelPublicSet():
            return (event.model_id, event.version) in now.registry.models
        case events.NodeLeft() | events.LeaseRenewed():
            return event.node_id in now.members.members
        case events.TierRevoked():
            return event.account in now.tiers.grants
    return True


def records(sequence: list[ContractEvent], time: int = 0) -> list[BlockRecord]:
    """A block for each, a second apart."""
    return [
        BlockRecord(n, b"", time + n, (TransactionRecord(n.to_bytes(32), b"", n, b"", 1, None, (event,)),))
        for n, event in enumerate(sequence)
    ]


@settings(max_examples=150, deadline=None)
@given(drawn=st.lists(any_event, max_size=40), at=st.floats(0, 1))
def test_snapshot_and_rest_give_what_all_gives(drawn: list[ContractEvent], at: float) -> None:
    sequence = records(possible(drawn))
    cut = round(at * len(sequence))
    whole = state.fold(State(), sequence)
    snapshot = state.encode(state.fold(State(), sequence[:cut]))
    assert state.fold(state.decode(snapshot), sequence[cut:]) == whole
    assert state.decode(state.encode(whole)) == whole
    assert state.encode(state.decode(state.encode(whole))) == state.encode(whole)


@settings(max_examples=50, deadline=None)
@given(
    order=st.permutations(
        [announced(node, i, model_id=name) for node in NODES[:2] for i in (0, 1) for name in ("one", "two")]
    )
)
def test_equal_states_have_equal_bytes_whatever_their_history(order: list[ContractEvent]) -> None:
    extra = [announced(NODES[3], 0), withdrawn(NODES[3], 0)]
    assert state.encode(after(*order, *extra)) == state.encode(after(*sorted(order, key=msgspec.json.encode)))


@pytest.mark.parametrize("data", [b"", b"\xc0", b"nonsense", msgspec.msgpack.encode(["aigen state 1"])])
def test_no_snapshot(data: bytes) -> None:
    with pytest.raises(Corrupt, match="replay the ledger"):
        state.decode(data)


def test_snapshot_of_another_format() -> None:
    plain = msgspec.msgpack.decode(state.encode(State()))
    with pytest.raises(Corrupt, match="format"):
        state.decode(msgspec.msgpack.encode(["aigen state 0", *plain[1:]]))
