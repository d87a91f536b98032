"""What the node answers: frozen values, their fields named as in the JSON answers, where bytes become 0x-hex."""

from __future__ import annotations

from typing import Literal

import msgspec

from contracts.types import Address, ManifestHash, ModelId, NodeId, ShardHash, TransactionHash, Version
from ledger.consensus import ConsensusStatistics
from node.inference.spec import Completion, DrawnToken
from node.network.fetching.statistics import FetcherStatistics
from node.network.statistics import GossipStatistics
from node.network.sync import SyncStatistics
from node.quota import QuotaStatistics
from node.receipts import Receipt

Backend = Literal["peer", "http", "ipfs"]
"""How a location is fetched."""

ModelState = Literal["absent", "fetching", "verifying", "loading", "loaded", "unloading", "failed"]
"""Where this node stands with a model. `absent`: not loaded and nothing under way."""

HealthStatus = Literal["starting", "ready", "stopping"]
"""Whether this node answers questions yet, or no longer."""

StepState = Literal["waiting", "running", "done", "failed"]
"""How far one step of the start sequence is."""


class ModelInfo(msgspec.Struct, frozen=True):
    """A model registered on the ledger. `core` is True for the one designated now; one that is `public` is served to
    nodes that are no members too. `precision` is what this node has it loaded in, None when it has not."""

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
    retired: bool
    public: bool
    precision: str | None = None


class CatalogueEntry(msgspec.Struct, frozen=True):
    """A model the genesis file names as one to bring; `registered` once any version of it is on the ledger."""

    model_id: ModelId
    title: str
    minimum_tier: str
    approximate_size: int
    architecture: str
    parameters: int
    source: str
    registered: bool


class Location(msgspec.Struct, frozen=True):
    """Where a shard is held. `node_id` is None for a mirror (backend `http` or `ipfs`)."""

    node_id: NodeId | None
    backend: Backend
    uri: str


class ShardInfo(msgspec.Struct, frozen=True):
    """A shard of a model and where it is held. `copies` counts the nodes that are there, not mirrors, and not `silent`:
    nodes that announced it and let their lease run out."""

    shard_index: int
    total_shards: int
    shard_hash: ShardHash
    size: int
    copies: int
    locations: tuple[Location, ...]
    silent: tuple[NodeId, ...]


class MemberInfo(msgspec.Struct, frozen=True):
    """A node that joined the network on the ledger. It said at `seen_at` (Unix seconds) that it is there, and that it
    would take `room` more bytes of shards, None if it never did; `live`: its lease is not over."""

    node_id: NodeId
    operator: Address
    role: str
    endpoints: tuple[str, ...]
    shards_announced: int
    seen_at: int
    room: int | None
    live: bool


class AccountInfo(msgspec.Struct, frozen=True):
    """An account as the ledger sees it now. `tier` is None when none is held or it expired; `nonce` is the next to use.

    The nonce counts the account's transactions in this node's pool too, so that two sent in a row do not collide.
    """

    account: Address
    nonce: int
    enrolled: bool
    admin: bool
    authority: bool
    tier: str | None
    tier_until: int | None


class TierInfo(msgspec.Struct, frozen=True):
    """A tier the ledger defines; `cache_size` in bytes. The limits are those of an account on a node; 0 is none."""

    name: str
    rank: int
    cache_size: int
    concurrent_answers: int
    tokens_per_minute: int


class TierCheck(msgspec.Struct, frozen=True):
    """A decision recorded on the ledger, in a block. `held` is None when the account had no tier; `until` in Unix
    seconds."""

    account: Address
    model_id: ModelId
    version: Version
    held: str | None
    required: str
    granted: bool
    until: int
    transaction_hash: TransactionHash
    block_number: int


class SignedTransaction(msgspec.Struct, frozen=True):
    """A raw transaction that decoded and carries a good signature for this chain. Its call is not checked yet."""

    transaction_hash: TransactionHash
    sender: Address
    nonce: int
    to: Address
    data: bytes


class EventInfo(msgspec.Struct, frozen=True):
    """A decoded contract log: `name` as in the contract (`ModelRegistered`), `fields` with the ABI's names."""

    name: str
    fields: dict[str, object]


class ReceiptInfo(msgspec.Struct, frozen=True):
    """How a final transaction ended. `reason` is None when it succeeded, else why the contract refused."""

    transaction_hash: TransactionHash
    block_number: int
    block_hash: bytes
    sender: Address
    nonce: int
    to: Address
    gas_used: int
    succeeded: bool
    reason: str | None
    events: tuple[EventInfo, ...]


class BlockInfo(msgspec.Struct, frozen=True):
    """A final block. `proposer` is None for block 0; `signers` are the authorities of its certificate."""

    number: int
    hash: bytes
    parent_hash: bytes
    timestamp: int
    state_root: bytes
    gas_used: int
    proposer: Address | None
    signers: tuple[Address, ...]
    transactions: tuple[TransactionHash, ...]


class ChainInfo(msgspec.Struct, frozen=True):
    """The ledger this node follows. `contracts` maps each contract's name to its address."""

    name: str
    chain_id: int
    genesis_hash: bytes
    head_number: int
    head_hash: bytes
    head_timestamp: int
    state_root: bytes
    pending_transactions: int
    gas_limit: int
    shard_size: int
    redundancy: int
    lease_s: int
    check_period_s: int
    admins: tuple[Address, ...]
    authorities: tuple[Address, ...]
    tiers: tuple[TierInfo, ...]
    contracts: dict[str, Address]


class LoadState(msgspec.Struct, frozen=True):
    """Where this node stands with one model; `detail` says in one line what it is doing, or why it failed. `bytes_done`
    never goes back; `rate` came a second of late, `time_left_s` is None at 0. `precision` is what it is loaded in."""

    model_id: ModelId
    version: Version
    state: ModelState
    pinned: bool
    bytes_done: int
    bytes_total: int
    rate: int
    time_left_s: int | None
    detail: str
    precision: str | None = None


class StartStep(msgspec.Struct, frozen=True):
    """One step of the start sequence."""

    name: str
    state: StepState
    detail: str


class AuthorityInfo(msgspec.Struct, frozen=True):
    """An authority, or a former one that was seen to lie. `evidence` is the proof, encoded; a transaction that removes
    the authority cites `evidence_hash`."""

    account: Address
    in_force: bool
    evidence_hash: bytes | None
    evidence: bytes | None


class NodeInfo(msgspec.Struct, frozen=True):
    """This node: who it is, what it does and how much it has. Sizes in bytes; `core_model` is None without one.
    `pieces_fetched` and `bytes_fetched` came from elsewhere since this one started. `state_alarms` has a line for each
    peer whose state after some block is not this node's; `lagging_peers` stay behind what others have. `shards_short`:
    the shards of the network with too few copies. `answers_waiting`: asked for, and not begun."""

    node_id: NodeId
    operator: Address
    role: str
    aigen_version: str
    status: HealthStatus
    started_at: int
    core_model: ModelId | None
    endpoints: tuple[str, ...]
    peers: tuple[NodeId, ...]
    lagging_peers: tuple[NodeId, ...]
    sync: SyncStatistics
    gossip: GossipStatistics
    disk_budget: int
    disk_used: int
    cache_budget: int
    cache_used: int
    pieces_fetched: int
    bytes_fetched: int
    shards_short: int
    answers_waiting: int
    quota: QuotaStatistics
    fetching: FetcherStatistics
    state_alarms: tuple[str, ...]
    consensus: ConsensusStatistics
    steps: tuple[StartStep, ...]
    models: tuple[LoadState, ...]


class Health(msgspec.Struct, frozen=True):
    """Enough to know whether to send questions here. `step` names the step of the start sequence under way."""

    status: HealthStatus
    ready: bool
    head_number: int
    step: str


class FreedShard(msgspec.Struct, frozen=True):
    """A shard that this node gave up, because enough others have it."""

    model_id: ModelId
    version: Version
    shard_index: int
    shard_hash: ShardHash
    size: int


class HeldShard(msgspec.Struct, frozen=True):
    """A shard on this node's disk, whole (`bytes_held` == `size`) or being fetched."""

    shard_hash: ShardHash
    model_id: ModelId
    version: Version
    shard_index: int
    total_shards: int
    size: int
    bytes_held: int
    announced: bool


class ShardCheck(msgspec.Struct, frozen=True):
    """What re-hashing one held shard found. A shard with bad pieces is no longer served and is fetched again."""

    shard_hash: ShardHash
    model_id: ModelId
    version: Version
    shard_index: int
    pieces_checked: int
    bad_pieces: tuple[int, ...]


class Answered(msgspec.Struct, frozen=True):
    """A whole answer, and its receipt unless this node gives none."""

    completion: Completion
    receipt: Receipt | None


class ChatChunk(msgspec.Struct, frozen=True):
    """The next chunk of an answer's text, and its tokens if logprobs are asked for."""

    content: str
    tokens: tuple[DrawnToken, ...] = ()
