"""A node's surroundings in memory: a ledger whose state a test sets, a wallet that records, a fetcher with a shelf."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import trio

from contracts import events
from contracts.calls import AnnounceShards, Call, RenewLease, WithdrawShards
from contracts.errors import Busy, Conflict, NotFound, Refused
from contracts.types import PIECE_SIZE, Address, ManifestHash, NodeId, TransactionHash
from genesis.schema import Tier
from ledger.consensus import ConsensusStatistics
from node import state as states
from node.config import Config
from node.inference.spec import (
    Chunk,
    LoadedModel,
    LoadStep,
    Message,
    ModelSpec,
    Parameters,
    Prompt,
    Usage,
)
from node.leases import Leases
from node.loading import Loading
from node.network.control import ControlStatistics, PeerStatus
from node.network.fetching.statistics import FetcherStatistics
from node.network.identity import NodeIdentity
from node.network.sources import PeerSource, Source
from node.network.statistics import GossipStatistics
from node.network.sync import SyncStatistics
from node.questions import Questions
from node.quota import Quota
from node.receipts import Receipts
from node.registry import Model
from node.replication import Replication
from node.service import Service, Steps
from node.share import Share
from node.state import State
from node.storage.artifact import FileSource, cut
from node.storage.manifest import Manifest, ManifestShard
from node.storage.store import ShardStore

OURS = NodeId("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")
THEIRS = NodeId("12D3KooWStKV9hPJBjeaQbxrrphSs1Nga4TL7EZ6JNZjVaTMsDWp")
OPERATOR = Address(b"\x11" * 20)
LEASE_S = 3_600
CHAIN_ID = 41_000
GENESIS_HASH = b"\x0e" * 32
DATA_ENDPOINT = "aigen+tls://127.0.0.1:9946"
TIERS = (Tier("basic", 1, 8, concurrent_answers=2, tokens_per_minute=1_500), Tier("unlimited", 3, 8, 0, 0))


class FakeReplay:
    """The state, moved by the test one event at a time."""

    def __init__(self) -> None:
        self.state = State()
        self.number = 0
        self._changed = trio.Event()

    def add(self, *found: events.ContractEvent, time: int = 0) -> None:
        """A block with these events, at the time of the one before it unless a later one is given."""
        self.state = msgspec.structs.replace(self.state, time=max(time, self.state.time))
        for event in found:
            self.state = states.apply(self.state, event, TransactionHash(bytes(32)))
        self.number += 1
        self._changed.set()
        self._changed = trio.Event()

    def catch_up(self) -> None:
        """Nothing is ever behind here."""

    async def wait_change(self, after: int) -> None:
        while self.number <= after:
            await self._changed.wait()

    async def wait_until(self, holds: Callable[[State], bool]) -> State:
        while not holds(self.state):
            await self.wait_change(self.number)
        return self.state


@dataclass
class FakeWallet:
    """Turns calls into the events the contracts would make, unless told to fail or to wait."""

    replay: FakeReplay
    sent: list[Call] = field(default_factory=list)
    failures: list[Refused] = field(default_factory=list)
    open: bool = True
    address: Address = OPERATOR

    async def send(self, call: Call) -> Any:
        await trio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        if not self.open:
            await trio.sleep_forever()
        self.sent.append(call)
        match call:
            case AnnounceShards() | WithdrawShards():
                kind = events.ShardsAnnounced if isinstance(call, AnnounceShards) else events.ShardsWithdrawn
                self.replay.add(kind(call.node_id, call.model_id, call.version, tuple(call.shard_indices)))
            case RenewLease():
                self.replay.add(events.LeaseRenewed(call.node_id, call.room))
        return SimpleNamespace(block_number=self.replay.number)


class FakeFetcher:
    """Fetches out of another store on this disk. `unavailable` names what no source gives."""

    def __init__(self, store: ShardStore, shelf: ShardStore) -> None:
        self._store = store
        self._shelf = shelf
        self.unavailable: dict[bytes, Refused] = {}
        self.liars: set[NodeId] = set()
        """Nodes that have not what they announced."""
        self.fetched: list[bytes] = []
        self.pieces = 0

    async def fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[Source]) -> Manifest:
        await trio.lowlevel.checkpoint()
        if not self._store.has_manifest(manifest_hash):
            self._store.put_manifest(self._shelf.manifest_bytes(manifest_hash), manifest_hash)
        return self._store.manifest(manifest_hash)

    async def fetch_shard(
        self, shard: ManifestShard, sources: Iterable[Source], progress: Callable[[int], None]
    ) -> None:
        await trio.lowlevel.checkpoint()
        if shard.sha256 in self.unavailable:
            raise self.unavailable[shard.sha256]
        if not list(sources):
            raise Busy(f"nobody is known to have shard {shard.sha256.hex()}")
        with self._store.open_partial(shard.sha256, shard.size, shard.pieces) as partial:
            progress(shard.size - partial.missing_bytes)
            for index in partial.missing():
                partial.write(index, self._shelf.read_piece(shard.sha256, index))
                self.pieces += 1
                progress(shard.size - partial.missing_bytes)
            partial.commit()
        self.fetched.append(shard.sha256)

    async def proves(self, shard: ManifestShard, source: Source) -> bool:
        await trio.lowlevel.checkpoint()
        assert isinstance(source, PeerSource)
        return source.node_id not in self.liars

    def statistics(self) -> FetcherStatistics:
        return FetcherStatistics(shards_fetched=len(self.fetched), pieces_fetched=self.pieces)


@dataclass
class Surroundings:
    """Our replication beside one other node that has the model whole."""

    replay: FakeReplay
    wallet: FakeWallet
    store: ShardStore
    fetcher: FakeFetcher
    replication: Replication
    manifest: Manifest

    @property
    def model(self) -> Model:
        return next(iter(self.replay.state.registry.models.values()))

    def announced(self) -> frozenset[int]:
        return self.replay.state.shards.announced_by(OURS, self.model.key)

    def held(self) -> set[int]:
        return {i for i, shard_hash in enumerate(self.model.shard_hashes) if self.store.held(shard_hash)}

    def path(self, index: int) -> Path:
        return self.store.path(self.model.shard_hashes[index])


def surroundings(path: Path, shard_count: int = 4, role: str = "storage") -> Surroundings:
    """Both nodes are members, the other one has announced every shard."""
    path.mkdir(parents=True, exist_ok=True)
    source, size = path / "model.safetensors", 2 * PIECE_SIZE
    source.write_bytes(Random(1).randbytes(shard_count * size - 1000))
    shelf, store = ShardStore(path / "shelf"), ShardStore(path / "store")
    manifest = cut([FileSource(source.name, source)], shelf, size)
    manifest_hash = manifest.manifest_hash()
    shelf.put_manifest(manifest.encode(), manifest_hash)
    replay = FakeReplay()
    count = len(manifest.shards)
    replay.add(
        events.TierDefined("basic", 1, 8),
        events.NodeJoined(OURS, OPERATOR, role, (DATA_ENDPOINT,)),
        events.NodeJoined(THEIRS, OPERATOR, "storage", (DATA_ENDPOINT,)),
        events.ModelRegistered(
            model_id="m",
            version="1",
            total_size=manifest.total_size,
            shard_size=size,
            shard_count=count,
            shard_hashes=tuple(shard.sha256 for shard in manifest.shards),
            manifest_hash=manifest_hash,
            minimum_tier="basic",
            core=True,
            architecture="LlamaForCausalLM",
            metadata="",
            admin=OPERATOR,
        ),
        events.ShardsAnnounced(THEIRS, "m", "1", tuple(range(count))),
        events.LeaseRenewed(OURS, 1 << 40),
        events.LeaseRenewed(THEIRS, 1 << 40),
    )
    wallet, fetcher = FakeWallet(replay), FakeFetcher(store, shelf)
    share = Share(OURS, 3, Leases(LEASE_S), size)
    replication = Replication(role, share, replay, store, fetcher, wallet, clock=lambda: replay.state.time)  # type: ignore[arg-type]
    return Surroundings(replay, wallet, store, fetcher, replication, manifest)


class FakeAnswer:
    """Says every message again, a token each, and ends when `gate` lets it; the prompt is a token each too."""

    def __init__(self, prompt: tuple[Message, ...], gate: trio.Event) -> None:
        self.tokens = len(prompt)
        self._left: list[Chunk] = [Chunk(message.content) for message in prompt]
        self._last: list[Chunk] = [Chunk("", "stop", Usage(len(prompt), len(prompt)))]
        self._gate = gate

    def __aiter__(self) -> FakeAnswer:
        return self

    async def __anext__(self) -> Chunk:
        await trio.lowlevel.checkpoint()
        if self._left:
            self.tokens += 1
            return self._left.pop(0)
        await self._gate.wait()
        if not self._last:
            raise StopAsyncIteration
        return self._last.pop()


class FakeEngine:
    """Loads at once, or when `gate` opens; answers with an echo, whose end waits for `answers`. `failures` are raised
    first."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.gate.set()
        self.answers = trio.Event()
        self.answers.set()
        self.asked: list[tuple[str, int]] = []
        self.failures: list[Refused] = []
        self.steps: list[LoadStep] = []
        self.specs: list[tuple[ModelSpec, bool]] = []
        self._models: dict[str, LoadedModel] = {}

    async def load(
        self, spec: ModelSpec, pin: bool = False, on_step: Callable[[LoadStep], None] = lambda step: None
    ) -> LoadedModel:
        spec.check()
        for step in self.steps:
            on_step(step)
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        self.specs.append((spec, pin))
        known = self._models.get(spec.key)
        pinned = pin or (known is not None and known.pinned)
        self._models[spec.key] = LoadedModel(spec.key, "LlamaForCausalLM", "bf16", 1, 1, 1, 1, 0.1, pinned)
        return self._models[spec.key]

    async def unload(self, key: str) -> None:
        if self._models[key].pinned:
            raise Conflict(f"{key} is pinned")
        self.evict(key)

    def evict(self, key: str) -> None:
        """It goes, as another model's load may have it go."""
        del self._models[key]

    def unpin(self, key: str) -> None:
        self._models[key] = msgspec.structs.replace(self._models[key], pinned=False)

    def pin_only(self, key: str) -> None:
        for other in self.loaded():
            if other.key != key:
                self.unpin(other.key)

    def load_in(self, key: str, precision: str) -> None:
        """What is loaded is so in another precision from now on."""
        self._models[key] = msgspec.structs.replace(self._models[key], precision=precision)

    def loaded(self) -> tuple[LoadedModel, ...]:
        return tuple(self._models.values())

    @asynccontextmanager
    async def generate(
        self, key: str, prompt: Prompt, parameters: Parameters, account: str = "", weight: int = 1
    ) -> AsyncIterator[FakeAnswer]:
        if key not in self._models:
            raise NotFound(f"{key} is not loaded")
        self.asked.append((account, weight))
        assert not isinstance(prompt, str)
        yield FakeAnswer(prompt, self.answers)


class FakeLedger:
    """As much of a ledger as the start sequence asks: who is enrolled, and when the head moves."""

    def __init__(self, replay: FakeReplay) -> None:
        self._replay = replay
        self.enrolled = True
        self.blocks: dict[TransactionHash, int] = {}
        """Where transactions are."""
        self.config = SimpleNamespace(network=SimpleNamespace(name="test"))

    @property
    def head(self) -> Any:
        return SimpleNamespace(number=self._replay.number)

    def receipt(self, transaction_hash: TransactionHash) -> Any:
        return SimpleNamespace(block_number=self.blocks.get(transaction_hash, self._replay.number))

    async def wait_head(self, after: int) -> Any:
        await self._replay.wait_change(after)
        return self.head

    def account(self, address: Address) -> Any:
        return SimpleNamespace(enrolled=self.enrolled)


class FakeControl:
    """Peers that are there or not."""

    def __init__(self) -> None:
        self.connected = True
        self.peers: tuple[NodeId, ...] = ()
        self.unreachable: dict[NodeId, str] = {}
        self.sync = SyncStatistics("idle", 0, 0, 0, 0)

    def statistics(self) -> ControlStatistics:
        peers = tuple(PeerStatus(node_id, 0, None, 0, 0) for node_id in self.peers)
        return ControlStatistics(peers, self.unreachable, (), self.sync, 0, 0, 0, 0, 0, GossipStatistics())

    async def wait_peers(self) -> None:
        if not self.connected:
            await trio.sleep_forever()

    async def wait_caught_up(self) -> None:
        await self.wait_peers()
        if self.sync.mode != "idle":
            await trio.sleep_forever()


class FakeConsensus:
    """Nothing is ever decided."""

    def statistics(self) -> ConsensusStatistics:
        return ConsensusStatistics(False, 1, 0, 0, 2.0, 0, 0)


def service(
    around: Surroundings,
    engine: FakeEngine,
    nursery: trio.Nursery,
    config: Config | None = None,
    control: FakeControl | None = None,
) -> Service:
    """The real service over the fakes."""
    loading = Loading(around.replication, engine, nursery)  # type: ignore[arg-type]
    quota = Quota(TIERS, OPERATOR, 8, trio.current_time)
    ledger: Any = FakeLedger(around.replay)
    config = config or Config()
    receipts = Receipts(NodeIdentity.generate(), CHAIN_ID, GENESIS_HASH) if config.inference.receipts else None
    return Service(
        config=config,
        node_id=OURS,
        endpoints=(DATA_ENDPOINT,),
        ledger=ledger,
        replay=around.replay,  # type: ignore[arg-type]
        store=around.store,
        replication=around.replication,
        engine=engine,  # type: ignore[arg-type]
        loading=loading,
        questions=Questions(around.replay, around.replication, loading, engine, ledger, quota, receipts),  # type: ignore[arg-type]
        receipts=receipts,
        wallet=around.wallet,  # type: ignore[arg-type]
        control=(control or FakeControl()).statistics,
        consensus=FakeConsensus(),  # type: ignore[arg-type]
        steps=Steps(),
    )
