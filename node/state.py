"""Everything a node knows from the ledger: the four projections folded together, and their snapshot. Pure."""

from __future__ import annotations

from collections.abc import Iterable

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


def apply(state: State, event: ContractEvent, transaction_hash: TransactionHash) -> State:
    """The state after one event: each goes to the projections it concerns, the most frequent first."""
    match event:
        case events.ShardsAnnounced() | events.ShardsWithdrawn() | events.MirrorAdded() | events.MirrorRemoved():
            return State(state.registry, state.tiers, state.members, shard_index.apply(state.shards, event))
        case (
            events.TierChecked()
            | events.TierGranted()
            | events.TierRevoked()
            | events.TierDefined()
            | events.CheckPeriodSet()
        ):
            held = tiers.apply(state.tiers, event, transaction_hash)
            return State(state.registry, held, state.members, state.shards)
        case events.ModelRegistered() | events.ModelRetired() | events.CoreModelSet():
            return State(registry.apply(state.registry, event), state.tiers, state.members, state.shards)
        case events.NodeJoined() | events.NodeLeft():
            shards = shard_index.apply(state.shards, event)
            return State(state.registry, state.tiers, members.apply(state.members, event), shards)
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
    announced: list[tuple[ModelKey, NodeId, list[int]]]
    mirrors: list[tuple[ModelKey, list[Mirror]]]


SNAPSHOT_FORMAT = "aigen state 1"

_decoder = msgspec.msgpack.Decoder(_Snapshot)


def encode(state: State) -> bytes:
    """The same bytes for equal states, whatever their history and the process: to keep, to hash and to compare."""
    checks = [check for of_account in state.tiers.checks.values() for check in of_account.values()]
    return msgspec.msgpack.encode(
        _Snapshot(
            format=SNAPSHOT_FORMAT,
            models=sorted(state.registry.models.values(), key=lambda model: model.registered),
            core=state.registry.core,
            tiers=sorted(state.tiers.tiers.values(), key=lambda tier: tier.name),
            grants=sorted(state.tiers.grants.items(), key=lambda grant: grant[0]),
            check_period_s=state.tiers.check_period_s,
            checks=sorted(checks, key=lambda check: (check.account, check.model_id, check.version)),
            members=sorted(state.members.members.values(), key=lambda member: member.node_id),
            announced=[
                (key, node_id, sorted(shards))
                for key, nodes in sorted(state.shards.announced.items(), key=lambda entry: entry[0])
                for node_id, shards in sorted(nodes.items(), key=lambda entry: entry[0])
            ],
            mirrors=[
                (key, sorted(mirrors))
                for key, mirrors in sorted(state.shards.mirrors.items(), key=lambda entry: entry[0])
            ],
        )
    )


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
    for key, node_id, shards in plain.announced:
        announced[key] = announced.get(key, Map[NodeId, frozenset[int]]()).set(node_id, frozenset(shards))
    return State(
        registry=Registry(Map((model.key, model) for model in plain.models), plain.core),
        tiers=Tiers(
            Map((tier.name, tier) for tier in plain.tiers), Map(plain.grants), plain.check_period_s, Map(checks)
        ),
        members=Members(Map((member.node_id, member) for member in plain.members)),
        shards=ShardIndex(Map(announced), Map((key, frozenset(mirrors)) for key, mirrors in plain.mirrors)),
    )
