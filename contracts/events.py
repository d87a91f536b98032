"""The typed events: what the contracts log, the only thing that changes a projection.

Owns one frozen value for each event of the ABI (same names, same fields, same order: a test compares them), their
decoding from logs and their codec for the ledger's event record. Knows no block and no projection.
Sizes are bytes, `until` is a Unix time in seconds, a duration ends in `_s`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Final, get_args

import msgspec

from contracts.abi import EventAbi, contracts, decode_values
from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.errors import BadInput, Corrupt
from contracts.types import Address, EvidenceHash, ManifestHash, ModelId, NodeId, ShardHash, Version

# Accounts


class Enrolled(msgspec.Struct, frozen=True, tag=True):
    """An account may send transactions from here on."""

    account: Address


class Expelled(msgspec.Struct, frozen=True, tag=True):
    """An account may no longer send transactions; its tier stays until it ends or is revoked."""

    account: Address


class AdminAdded(msgspec.Struct, frozen=True, tag=True):
    """An enrolled account became an admin."""

    account: Address


class AdminRemoved(msgspec.Struct, frozen=True, tag=True):
    """An account is no longer an admin; it stays enrolled."""

    account: Address


class AuthorityAdded(msgspec.Struct, frozen=True, tag=True):
    """An enrolled account became an authority, the last in their order."""

    account: Address


class AuthorityRemoved(msgspec.Struct, frozen=True, tag=True):
    """An account is no longer an authority; the others keep their order, and it stays enrolled. `evidence` names the
    proof that it lied; zero when that is not why."""

    account: Address
    evidence: EvidenceHash = EvidenceHash(bytes(32))


# Tiers


class TierDefined(msgspec.Struct, frozen=True, tag=True):
    """A tier exists, or its recommended cache changed; its rank never does. `cache_size` is in bytes."""

    name: str
    rank: int
    cache_size: int


class TierGranted(msgspec.Struct, frozen=True, tag=True):
    """An account holds a tier before the second `until`, instead of what it held."""

    account: Address
    tier: str
    until: int


class TierRevoked(msgspec.Struct, frozen=True, tag=True):
    """An account holds no tier."""

    account: Address


class CheckPeriodSet(msgspec.Struct, frozen=True, tag=True):
    """Tier checks from here on hold for this many seconds at most."""

    period_s: int


class TierChecked(msgspec.Struct, frozen=True, tag=True):
    """A decision: whether `account` may use a model, holding before the second `until`. `held` is "" for none."""

    account: Address
    model_id: ModelId
    version: Version
    held: str
    required: str
    granted: bool
    until: int
    checker: Address


# Models


class ModelRegistered(msgspec.Struct, frozen=True, tag=True):
    """A model exists. With `core`, a CoreModelSet follows it in the same transaction."""

    model_id: ModelId
    version: Version
    total_size: int
    shard_size: int
    shard_count: int
    shard_hashes: tuple[ShardHash, ...]
    manifest_hash: ManifestHash
    minimum_tier: str
    core: bool
    architecture: str
    metadata: str
    admin: Address


class ModelRetired(msgspec.Struct, frozen=True, tag=True):
    """A model is out of use for good."""

    model_id: ModelId
    version: Version


class ModelPublicSet(msgspec.Struct, frozen=True, tag=True):
    """From here on a model's bytes are served to anybody, or to members alone. One that is retired is not public."""

    model_id: ModelId
    version: Version
    is_public: bool


class CoreModelSet(msgspec.Struct, frozen=True, tag=True):
    """This model is the core model, and no other."""

    model_id: ModelId
    version: Version


# Members


class NodeJoined(msgspec.Struct, frozen=True, tag=True):
    """A node is a member; of a member already: its role and endpoints are these now."""

    node_id: NodeId
    operator: Address
    role: str
    endpoints: tuple[str, ...]


class NodeLeft(msgspec.Struct, frozen=True, tag=True):
    """A node is no member; what it announced ended with it."""

    node_id: NodeId


class LeaseRenewed(msgspec.Struct, frozen=True, tag=True):
    """A node is there, and would take `room` more bytes of shards: what it announced stands for another lease."""

    node_id: NodeId
    room: int


# Shards


class ShardsAnnounced(msgspec.Struct, frozen=True, tag=True):
    """A node holds these shards, counted from 0 and ascending; again: it still does."""

    node_id: NodeId
    model_id: ModelId
    version: Version
    shard_indices: tuple[int, ...]


class ShardsWithdrawn(msgspec.Struct, frozen=True, tag=True):
    """A node does not hold these shards, counted from 0 and ascending, whether or not it announced them."""

    node_id: NodeId
    model_id: ModelId
    version: Version
    shard_indices: tuple[int, ...]


class MirrorAdded(msgspec.Struct, frozen=True, tag=True):
    """A model's bytes are also at `uri`, served by `backend` (`http` or `ipfs`)."""

    model_id: ModelId
    version: Version
    backend: str
    uri: str


class MirrorRemoved(msgspec.Struct, frozen=True, tag=True):
    """A model's bytes are no longer sought at `uri`."""

    model_id: ModelId
    version: Version
    backend: str
    uri: str


ContractEvent = (
    Enrolled
    | Expelled
    | AdminAdded
    | AdminRemoved
    | AuthorityAdded
    | AuthorityRemoved
    | TierDefined
    | TierGranted
    | TierRevoked
    | CheckPeriodSet
    | TierChecked
    | ModelRegistered
    | ModelRetired
    | ModelPublicSet
    | CoreModelSet
    | NodeJoined
    | NodeLeft
    | LeaseRenewed
    | ShardsAnnounced
    | ShardsWithdrawn
    | MirrorAdded
    | MirrorRemoved
)

EVENT_TYPES: Final[Mapping[str, type[Any]]] = MappingProxyType({t.__name__: t for t in get_args(ContractEvent)})
"""Each event's type by its name in the ABI."""


@cache
def _abi_of() -> Mapping[tuple[bytes, bytes], EventAbi]:
    """Each event's ABI by the address that logs it and its topic."""
    abis = contracts()
    return {(ADDRESSES[name], abi.topic): abi for name in CONTRACT_NAMES for abi in abis[name].events.values()}


def decode_log(address: bytes, topics: Sequence[bytes], data: bytes) -> ContractEvent | None:
    """The event of one log, or None when none of our contracts logs such a thing.

    Raises BadInput when the topic is ours and the rest is not what that event consists of: our contracts never
    do that, but a log that was read from someone else's node may.
    """
    abi = _abi_of().get((bytes(address), bytes(topics[0]))) if topics else None
    if abi is None:
        return None
    if len(topics) - 1 != sum(abi.indexed):
        raise BadInput(f"a log of {abi.name} has {len(topics)} topics, not {1 + sum(abi.indexed)}: it is not genuine")
    plain_types = [t for t, is_topic in zip(abi.types, abi.indexed, strict=True) if not is_topic]
    plain = iter(decode_values(plain_types, data))
    indexed = iter(topics[1:])
    values = [
        decode_values([abi_type], next(indexed))[0] if is_topic else next(plain)
        for abi_type, is_topic in zip(abi.types, abi.indexed, strict=True)
    ]
    event: ContractEvent = EVENT_TYPES[abi.name](*values)
    return event


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[ContractEvent]] = msgspec.msgpack.Decoder(list[ContractEvent])


def encode_events(events: Iterable[ContractEvent]) -> bytes:
    """Events as MessagePack, for the ledger's event record; the same events always give the same bytes."""
    return _encoder.encode(list(events))


def decode_events(data: bytes) -> list[ContractEvent]:
    """What `encode_events` wrote. Raises Corrupt when the bytes are something else."""
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise Corrupt(
            f"an event record of {len(data)} bytes is damaged ({error}): rebuild it from the blocks"
        ) from error
