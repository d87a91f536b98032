"""Everything a node knows from the ledger: the four projections folded together, and their snapshot. Pure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec
from immutables import Map

from contracts import events
from contracts.errors import Corrupt
from contracts.events import ContractEvent
from contracts.types import Address, NodeId, TransactionHash
from ledger.record import BlockRecord
from node import members, registry, shard_index, tiers
from node.members import Member, Members
from node.registry import Model, ModelKey, Registry
from node.shard_index import Mirror, ShardIndex
from node.tiers import Grant, Tier, TierCheck, Tiers


class State(msgspec.Struct, frozen=True):
    registry: Registry = Registry()
    tiers: Tiers = Tiers()
    members: Members = Members()
    shards: ShardIndex = ShardIndex()
    time: int = 0
    """Of the newest block: all the time that the ledger knows, in Unix seconds."""


def apply(state: State, event: ContractEvent, transaction_hash: TransactionHash) -> State:
    """The state after one event: each goes to the projections it concerns, the most frequent first."""
    match event:
        case events.ShardsAnnounced() | events.ShardsWithdrawn() | events.MirrorAdded() | events.MirrorRemoved():
            shards = shard_index.apply(state.shards, event)
            return State(state.registry, state.tiers, state.members, shards, state.time)
        case (
            events.TierChecked()
            | events.TierGranted()
            | events.TierRevoked()
            | events.TierDefined()
            | events.CheckPeriodSet()
        ):
            held = tiers.apply(state.tiers, event, transaction_hash)
            return State(state.registry, held, state.members, state.shards, state.time)
        case events.ModelRegistered() | events.ModelRetired() | events.ModelPublicSet() | events.CoreModelSet():
            models = registry.apply(state.registry, event)
            return State(models, state.tiers, state.members, state.shards, state.time)
        case events.NodeJoined() | events.LeaseRenewed() | events.NodeLeft():
            found, shards = members.apply(state.members, event, state.time), shard_index.apply(state.shards, event)
            return State(state.registry, state.tiers, found, shards, state.time)
        case (
            events.Enrolled()
            | events.Expelled()
            | events.AdminAdded()
            | events.AdminRemoved()
            | events.AuthorityAdded()
            | events.AuthorityRemoved()
        ):
            return state  # the ledger's own: ledger.accounts


def fold(state: State, records: Iterable[BlockRecord]) -> State:
    """The state after the blocks of `records`, which continue where `state` ends."""
    for record in records:
        state = State(state.registry, state.tiers, state.members, state.shards, record.timestamp)
        for transaction in record.transactions:
            for event in transaction.events:
                state = apply(state, event, TransactionHash(transaction.hash))
    return state


class _Snapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A State as plain lists in one order; what a value says of itself is not repeated as its key."""

    format: str
    models: list[Model]
    core: ModelKey | None
    tiers: list[Tier]
    grants: list[tuple[Address, Grant]]
    check_period_s: int
    checks: list[TierCheck]
    members: list[Member]
    announced: list[tuple[ModelKey, list[tuple[NodeId, list[int]]]]]
    mirrors: list[tuple[ModelKey, list[Mirror]]]
    time: int


SNAPSHOT_FORMAT = "aigen state 4"
"""Raise the number when the layout changes, or what a projection folds an event into."""

_decoder = msgspec.msgpack.Decoder(_Snapshot)
_encoder = msgspec.msgpack.Encoder()


def encode(state: State) -> bytes:
    """The same bytes for equal states, whatever their history and the process: to keep and to compare."""
    return _encoder.encode(
        _Snapshot(
            format=SNAPSHOT_FORMAT,
            models=_models(state.registry.models),
            core=state.registry.core,
            tiers=_tiers(state.tiers.tiers),
            grants=_grants(state.tiers.grants),
            check_period_s=state.tiers.check_period_s,
            checks=_checks(state.tiers.checks),
            members=_members(state.members.members),
            announced=[(key, _nodes(state.shards.announced[key])) for key in sorted(state.shards.announced)],
            mirrors=_mirrors(state.shards.mirrors),
            time=state.time,
        )
    )


class Part(NamedTuple):
    """A piece of a State that changes by itself: `value` is the very same object for as long as it does not."""

    name: tuple[str, ...]
    value: Any
    plain: Callable[[Any], Any]
    """Turns `value` into lists in one order."""

    def encode(self) -> bytes:
        """The same bytes for equal parts."""
        return _encoder.encode(self.plain(self.value))


def parts(state: State) -> Iterator[Part]:
    """All of `state`, in one order; the announcements, most of a large state, model by model."""
    yield Part(("models",), state.registry.models, _models)
    yield Part(("core",), state.registry.core, _itself)
    yield Part(("tiers",), state.tiers.tiers, _tiers)
    yield Part(("grants",), state.tiers.grants, _grants)
    yield Part(("check period",), state.tiers.check_period_s, _itself)
    yield Part(("checks",), state.tiers.checks, _checks)
    yield Part(("members",), state.members.members, _members)
    for key in sorted(state.shards.announced):
        yield Part(("announced", *key), state.shards.announced[key], _nodes)
    yield Part(("mirrors",), state.shards.mirrors, _mirrors)
    yield Part(("time",), state.time, _itself)


_first = operator.itemgetter(0)


def _itself(value: Any) -> Any:
    return value


def _models(models: Map[ModelKey, Model]) -> list[Model]:
    return sorted(models.values(), key=lambda model: model.registered)


def _tiers(found: Map[str, Tier]) -> list[Tier]:
    return sorted(found.values(), key=lambda tier: tier.name)


def _grants(grants: Map[Address, Grant]) -> list[tuple[Address, Grant]]:
    return sorted(grants.items(), key=_first)


def _checks(checks: Map[Address, Map[ModelKey, TierCheck]]) -> list[TierCheck]:
    return [of_account[key] for _, of_account in sorted(checks.items(), key=_first) for key in sorted(of_account)]


def _members(found: Map[NodeId, Member]) -> list[Member]:
    return sorted(found.values(), key=lambda member: member.node_id)


def _nodes(nodes: Map[NodeId, frozenset[int]]) -> list[tuple[NodeId, list[int]]]:
    return [(node_id, sorted(shards)) for node_id, shards in sorted(nodes.items(), key=_first)]


def _mirrors(found: Map[ModelKey, frozenset[Mirror]]) -> list[tuple[ModelKey, list[Mirror]]]:
    return [(key, sorted(found[key])) for key in sorted(found)]


def decode(data: bytes) -> State:
    """What `encode` made bytes of. Raises Corrupt for anything else."""
    try:
        plain = _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{len(data)} bytes are no snapshot of the state ({error}): replay the ledger") from error
    if plain.format != SNAPSHOT_FORMAT:
        raise Corrupt(f"the snapshot is of format {plain.format!r}, not {SNAPSHOT_FORMAT!r}: replay the ledger")
    checks: dict[Address, Map[ModelKey, TierCheck]] = {}
    for check in plain.checks:
        earlier = checks.get(check.account, Map[ModelKey, TierCheck]())
        checks[check.account] = earlier.set((check.model_id, check.version), check)
    announced: dict[ModelKey, Map[NodeId, frozenset[int]]] = {}
    for key, nodes in plain.announced:
        announced[key] = Map((node_id, frozenset(shards)) for node_id, shards in nodes)
    return State(
        registry=Registry(Map((model.key, model) for model in plain.models), plain.core),
        tiers=Tiers(
            Map((tier.name, tier) for tier in plain.tiers), Map(plain.grants), plain.check_period_s, Map(checks)
        ),
        members=Members(Map((member.node_id, member) for member in plain.members)),
        shards=ShardIndex(Map(announced), Map((key, frozenset(mirrors)) for key, mirrors in plain.mirrors)),
        time=plain.time,
    )
