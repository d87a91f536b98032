"""What the RPC room reads of the ledger: its port's values, made from the ledger and the state folded from it.

Pure but for the ledger's own reads; knows neither this node nor who asks.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from contracts.addresses import ADDRESSES
from contracts.errors import NotFound
from contracts.events import ContractEvent
from contracts.types import Address, NodeId, TransactionHash
from genesis.config import GenesisConfig
from ledger import seal
from ledger.ledger import Ledger
from node.members import Member
from node.network.addresses import DATA_SCHEMES
from node.quota import Limits, limits_of
from node.registry import Model
from node.rpc import values
from node.state import State
from node.tiers import Tier


def model_info(state: State, model: Model, precision: str | None) -> values.ModelInfo:
    return values.ModelInfo(
        model_id=model.model_id,
        version=model.version,
        total_size=model.total_size,
        shard_size=model.shard_size,
        shard_count=model.shard_count,
        shard_hashes=model.shard_hashes,
        manifest_hash=model.manifest_hash,
        minimum_tier=model.minimum_tier,
        core=state.registry.core == model.key,
        architecture=model.architecture,
        metadata=model.metadata,
        retired=model.retired,
        public=model.public,
        precision=precision,
    )


def catalogue(state: State, config: GenesisConfig) -> tuple[values.CatalogueEntry, ...]:
    registered = {model_id for model_id, _ in state.registry.models}
    return tuple(
        values.CatalogueEntry(
            model_id=entry.model_id,
            title=entry.title,
            minimum_tier=entry.minimum_tier,
            approximate_size=entry.approximate_size,
            architecture=entry.architecture,
            parameters=entry.parameters,
            source=entry.source,
            registered=entry.model_id in registered,
        )
        for entry in config.catalogue
    )


def shard_infos(state: State, model: Model, live: frozenset[NodeId]) -> tuple[values.ShardInfo, ...]:
    """The shards of a model in order, each with its holders and the model's mirrors. `live`: who is there."""
    mirrors = sorted(state.shards.mirrors.get(model.key, frozenset()))
    mirrored = tuple(
        values.Location(None, msgspec.convert(mirror.backend, values.Backend), mirror.uri) for mirror in mirrors
    )
    return tuple(_shard_info(state, model, index, live, mirrored) for index in range(model.shard_count))


def _data_endpoint(member: Member) -> str:
    """Where a member serves pieces, as it says; empty when none of its endpoints is of the data plane."""
    return next((endpoint for endpoint in member.endpoints if endpoint.partition(":")[0] in DATA_SCHEMES), "")


def _shard_info(
    state: State, model: Model, index: int, live: frozenset[NodeId], mirrored: tuple[values.Location, ...]
) -> values.ShardInfo:
    members = state.members.members
    holders = [node_id for node_id in sorted(state.shards.holders_of(model.key, index)) if node_id in members]
    peers = tuple(
        values.Location(node_id, "peer", _data_endpoint(members[node_id])) for node_id in holders if node_id in live
    )
    return values.ShardInfo(
        shard_index=index,
        total_shards=model.shard_count,
        shard_hash=model.shard_hashes[index],
        size=model.size_of_shard(index),
        copies=len(peers),
        locations=peers + mirrored,
        silent=tuple(node_id for node_id in holders if node_id not in live),
    )


def member_infos(state: State, live: frozenset[NodeId]) -> tuple[values.MemberInfo, ...]:
    announced: Counter[NodeId] = Counter()
    for nodes in state.shards.announced.values():
        announced.update({node_id: len(shards) for node_id, shards in nodes.items()})
    return tuple(
        values.MemberInfo(
            m.node_id, m.operator, m.role, m.endpoints, announced[m.node_id], m.seen_at, m.room, m.node_id in live
        )
        for m in sorted(state.members.members.values(), key=lambda member: member.node_id)
    )


def authority_infos(ledger: Ledger) -> tuple[values.AuthorityInfo, ...]:
    """The authorities in ascending order of their addresses, and whoever was seen to lie."""
    found = []
    for account in sorted(ledger.authorities | ledger.evidence.keys()):
        evidence = ledger.evidence.get(account)
        proof = (None, None) if evidence is None else (evidence.hash, evidence.encode())
        found.append(values.AuthorityInfo(account, account in ledger.authorities, *proof))
    return tuple(found)


def account_info(ledger: Ledger, state: State, account: Address, now: float) -> values.AccountInfo:
    found = ledger.account(account)
    grant = state.tiers.held(account, now)
    return values.AccountInfo(
        account=account,
        nonce=found.next_nonce,
        enrolled=found.enrolled,
        admin=found.admin,
        authority=found.authority,
        tier=grant.tier if grant else None,
        tier_until=grant.until if grant else None,
    )


def chain_info(ledger: Ledger, state: State) -> values.ChainInfo:
    head, config = ledger.head, ledger.config
    return values.ChainInfo(
        name=config.network.name,
        chain_id=ledger.chain_id,
        genesis_hash=ledger.genesis_hash,
        head_number=head.number,
        head_hash=head.hash,
        head_timestamp=head.timestamp,
        state_root=head.state_root,
        pending_transactions=ledger.statistics().pool_transactions,
        gas_limit=config.network.gas_limit,
        shard_size=config.shards.size,
        redundancy=config.shards.redundancy,
        lease_s=config.shards.lease_s,
        check_period_s=state.tiers.check_period_s,
        admins=tuple(sorted(ledger.admins)),
        authorities=tuple(sorted(ledger.authorities)),
        tiers=tuple(
            _tier_info(tier, limits_of(config.tiers, tier.name))
            for tier in sorted(state.tiers.tiers.values(), key=lambda tier: tier.rank)
        ),
        contracts={str(name): address for name, address in ADDRESSES.items()},
    )


def _tier_info(tier: Tier, limits: Limits) -> values.TierInfo:
    return values.TierInfo(tier.name, tier.rank, tier.cache_size, limits.concurrent_answers, limits.tokens_per_minute)


def block_info(ledger: Ledger, at: int | bytes | None) -> values.BlockInfo | None:
    """A final block by number or hash, the head for None; None when it is not known here."""
    try:
        number = ledger.number_of(at) if isinstance(at, bytes) else ledger.head.number if at is None else at
        record, header = ledger.record(number), ledger.history.header(number)
    except NotFound:
        return None
    return values.BlockInfo(
        number=number,
        hash=record.hash,
        parent_hash=bytes(header.parent_hash),
        timestamp=header.timestamp,
        state_root=bytes(header.state_root),
        gas_used=header.gas_used,
        proposer=seal.proposer_of(header) if number else None,
        signers=ledger.history.signers(number),
        transactions=tuple(TransactionHash(t.hash) for t in record.transactions) if number else (),
    )


def receipt_info(ledger: Ledger, transaction_hash: TransactionHash) -> values.ReceiptInfo | None:
    """None while the transaction is in no final block."""
    found = ledger.receipt(transaction_hash)
    if found is None:
        return None
    transaction = found.transaction
    return values.ReceiptInfo(
        transaction_hash=transaction_hash,
        block_number=found.block_number,
        block_hash=found.block_hash,
        sender=Address(transaction.sender),
        nonce=transaction.nonce,
        to=Address(transaction.to),
        gas_used=transaction.gas_used,
        succeeded=transaction.reason is None,
        reason=transaction.reason,
        events=tuple(_event_info(event) for event in transaction.events),
    )


def _event_info(event: ContractEvent) -> values.EventInfo:
    return values.EventInfo(type(event).__name__, {name: getattr(event, name) for name in event.__struct_fields__})
