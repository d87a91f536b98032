"""The node as its RPC sees it: answers from the projections, acts through the rooms below. Implements `NodePort`.

Knows no HTTP and no JSON; what may be asked by whom is `node.rpc`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as package_version

import msgspec
import trio

from contracts.addresses import ADDRESSES
from contracts.calls import CheckTier
from contracts.errors import NotFound
from contracts.events import ContractEvent, TierChecked
from contracts.types import Address, ModelId, NodeId, TransactionHash, Version
from ledger import seal
from ledger.ledger import Ledger
from ledger.transactions import Transaction
from ledger.wallet import Wallet
from node.config import Config
from node.inference.engine import Engine
from node.inference.spec import Completion, Message, Parameters
from node.loading import PROGRESS_INTERVAL_S, Loading, engine_key
from node.registry import Model
from node.replay import Replay
from node.replication import Replication
from node.rpc import port
from node.rpc.port import ChatDelta, Emit, HealthStatus, LoadState, StartStep, StepState
from node.state import State
from node.storage.store import ShardStore

STEP_NAMES = (
    "replay the ledger",
    "join the network",
    "check the core model",
    "locate its shards",
    "fetch missing shards",
    "verify SHA-256",
    "load and pin the core model",
    "announce shards",
)
"""The start sequence, in order (DESIGN section 5)."""


@dataclass
class Steps:
    """How far the start sequence is."""

    steps: dict[str, StartStep] = field(default_factory=lambda: {n: StartStep(n, "waiting", "") for n in STEP_NAMES})
    status: HealthStatus = "starting"

    def set(self, name: str, state: StepState, detail: str = "") -> None:
        assert name in self.steps
        self.steps[name] = StartStep(name, state, detail)

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """A step from its beginning to its end."""
        self.set(name, "running")
        try:
            yield
        except Exception as error:
            self.set(name, "failed", str(error))
            raise
        self.set(name, "done", self.steps[name].detail)

    def current(self) -> str:
        return next((step.name for step in self.steps.values() if step.state in {"running", "failed"}), "")


@dataclass
class Service:
    config: Config
    node_id: NodeId
    endpoints: tuple[str, ...]
    ledger: Ledger
    replay: Replay
    store: ShardStore
    replication: Replication
    engine: Engine
    loading: Loading
    wallet: Wallet
    peers: Callable[[], tuple[NodeId, ...]]
    steps: Steps
    started_at: int = field(default_factory=lambda: int(time.time()))
    _checking: dict[tuple[Address, ModelId, Version], trio.Lock] = field(default_factory=dict)

    @property
    def _state(self) -> State:
        return self.replay.state

    @property
    def chain_id(self) -> int:
        return self.ledger.chain_id

    @property
    def operator(self) -> Address:
        return self.wallet.address

    # The ledger

    def models(self) -> tuple[port.ModelInfo, ...]:
        models = sorted(self._state.registry.models.values(), key=lambda model: model.registered)
        return tuple(self._model_info(model) for model in models)

    def model(self, model_id: ModelId, version: Version | None) -> port.ModelInfo | None:
        try:
            return self._model_info(self._state.registry.find(model_id, version))
        except NotFound:
            return None

    def _model_info(self, model: Model) -> port.ModelInfo:
        return port.ModelInfo(
            model_id=model.model_id,
            version=model.version,
            total_size=model.total_size,
            shard_size=model.shard_size,
            shard_count=model.shard_count,
            shard_hashes=model.shard_hashes,
            manifest_hash=model.manifest_hash,
            minimum_tier=model.minimum_tier,
            core=self._state.registry.core == model.key,
            architecture=model.architecture,
            metadata=model.metadata,
            retired=model.retired,
        )

    def catalogue(self) -> tuple[port.CatalogueEntry, ...]:
        registered = {model_id for model_id, _ in self._state.registry.models}
        return tuple(
            port.CatalogueEntry(
                model_id=entry.model_id,
                title=entry.title,
                minimum_tier=entry.minimum_tier,
                approximate_size=entry.approximate_size,
                architecture=entry.architecture,
                parameters=entry.parameters,
                source=entry.source,
                registered=entry.model_id in registered,
            )
            for entry in self.ledger.config.catalogue
        )

    def shards(self, model_id: ModelId, version: Version) -> tuple[port.ShardInfo, ...]:
        model = self._state.registry.models[model_id, version]
        mirrors = sorted(self._state.shards.mirrors.get(model.key, frozenset()))
        mirrored = tuple(port.Location(None, _backend(mirror.backend), mirror.uri) for mirror in mirrors)
        return tuple(self._shard_info(model, index, mirrored) for index in range(model.shard_count))

    def _shard_info(self, model: Model, index: int, mirrored: tuple[port.Location, ...]) -> port.ShardInfo:
        members = self._state.members.members
        holders = sorted(self._state.shards.holders_of(model.key, index))
        peers = tuple(
            port.Location(node_id, "peer", next(iter(members[node_id].endpoints), ""))
            for node_id in holders
            if node_id in members
        )
        return port.ShardInfo(
            shard_index=index,
            total_shards=model.shard_count,
            shard_hash=model.shard_hashes[index],
            size=model.size_of_shard(index),
            copies=len(peers),
            locations=peers + mirrored,
        )

    def members(self) -> tuple[port.MemberInfo, ...]:
        announced: dict[NodeId, int] = {}
        for holders in self._state.shards.holders.values():
            for node_id in holders:
                announced[node_id] = announced.get(node_id, 0) + 1
        return tuple(
            port.MemberInfo(m.node_id, m.operator, m.role, m.endpoints, announced.get(m.node_id, 0))
            for m in sorted(self._state.members.members.values(), key=lambda member: member.node_id)
        )

    def account(self, account: Address) -> port.AccountInfo:
        found = self.ledger.account(account)
        grant = self._state.tiers.held(account, time.time())
        return port.AccountInfo(
            account=account,
            nonce=found.next_nonce,
            enrolled=found.enrolled,
            admin=found.admin,
            authority=found.authority,
            tier=grant.tier if grant else None,
            tier_until=grant.until if grant else None,
        )

    def chain(self) -> port.ChainInfo:
        head, config = self.ledger.head, self.ledger.config
        return port.ChainInfo(
            name=config.network.name,
            chain_id=self.chain_id,
            genesis_hash=self.ledger.genesis_hash,
            head_number=head.number,
            head_hash=head.hash,
            head_timestamp=head.timestamp,
            state_root=head.state_root,
            pending_transactions=self.ledger.statistics().pool_transactions,
            gas_limit=config.network.gas_limit,
            shard_size=config.shards.size,
            redundancy=config.shards.redundancy,
            check_period_s=self._state.tiers.check_period_s,
            admins=tuple(sorted(self.ledger.admins)),
            authorities=tuple(sorted(self.ledger.authorities)),
            tiers=tuple(
                port.TierInfo(tier.name, tier.rank, tier.cache_size)
                for tier in sorted(self._state.tiers.tiers.values(), key=lambda tier: tier.rank)
            ),
            contracts=dict(ADDRESSES),
        )

    def block(self, at: int | bytes | None) -> port.BlockInfo | None:
        try:
            number = (
                self.ledger.number_of(at) if isinstance(at, bytes) else self.ledger.head.number if at is None else at
            )
            record, header = self.ledger.record(number), self.ledger.header(number)
        except NotFound:
            return None
        return port.BlockInfo(
            number=number,
            hash=record.hash,
            parent_hash=bytes(header.parent_hash),
            timestamp=header.timestamp,
            state_root=bytes(header.state_root),
            gas_used=header.gas_used,
            proposer=seal.proposer_of(header) if number else None,
            signers=self.ledger.signers(number),
            transactions=tuple(TransactionHash(t.hash) for t in record.transactions) if number else (),
        )

    def receipt(self, transaction_hash: TransactionHash) -> port.ReceiptInfo | None:
        found = self.ledger.receipt(transaction_hash)
        if found is None:
            return None
        transaction = found.transaction
        return port.ReceiptInfo(
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

    # This node

    def node_info(self) -> port.NodeInfo:
        engine, store = self.engine.statistics(), self.store.statistics()
        fetched = self.replication.fetcher.statistics()
        return port.NodeInfo(
            node_id=self.node_id,
            operator=self.operator,
            role=self.config.node.role,
            aigen_version=package_version("aigen"),
            status=self.steps.status,
            started_at=self.started_at,
            core_model=self.core_model_id(),
            endpoints=self.endpoints,
            peers=self.peers(),
            disk_budget=self.config.storage.disk_budget,
            disk_used=store.shard_bytes + store.partial_bytes,
            cache_budget=engine.cache.budget_bytes,
            cache_used=engine.cache.used_bytes,
            pieces_fetched=fetched.pieces_fetched,
            bytes_fetched=fetched.bytes_fetched,
            steps=tuple(self.steps.steps.values()),
            models=self.load_states(),
        )

    def core_model_id(self) -> ModelId | None:
        """The model this node pins: its own config's, else the network's."""
        if self.config.node.model:
            return ModelId(self.config.node.model)
        return self._state.registry.core[0] if self._state.registry.core else None

    def health(self) -> port.Health:
        status = self.steps.status
        return port.Health(status, status == "ready", self.replay.number, self.steps.current())

    def load_state(self, model_id: ModelId, version: Version) -> LoadState:
        return self.loading.state(self._state.registry.models[model_id, version])

    def load_states(self) -> tuple[LoadState, ...]:
        states = (self.loading.state(model) for model in self._state.registry.models.values())
        return tuple(state for state in states if state.state != "absent")

    def held_shards(self) -> tuple[port.HeldShard, ...]:
        found = []
        for model in self._state.registry.models.values():
            for index, shard_hash in enumerate(model.shard_hashes):
                if self.store.held(shard_hash):
                    size = model.size_of_shard(index)
                    announced = self.node_id in self._state.shards.holders_of(model.key, index)
                    found.append(
                        port.HeldShard(
                            shard_hash, model.model_id, model.version, index, model.shard_count, size, size, announced
                        )
                    )
        return tuple(found)

    # Acts

    def decode_transaction(self, raw: bytes) -> port.SignedTransaction:
        found: Transaction = self.ledger.decode(raw)
        return port.SignedTransaction(found.hash, found.sender, found.nonce, found.to, found.data)

    async def submit(self, raw: bytes) -> TransactionHash:
        return await self.ledger.submit(raw)

    async def check_tier(self, account: Address, model_id: ModelId, version: Version) -> port.TierCheck:
        key = (account, model_id, version)
        async with self._checking.setdefault(key, trio.Lock()):
            check = self._state.tiers.standing_check(account, model_id, version, time.time())
            if check is not None:
                return port.TierCheck(
                    account,
                    model_id,
                    version,
                    check.held or None,
                    check.required,
                    check.granted,
                    check.until,
                    check.transaction_hash,
                )
            receipt = await self.wallet.send(CheckTier(account, model_id, version))
            await self.replay.wait_change(receipt.block_number - 1)
        event = next(event for event in receipt.transaction.events if isinstance(event, TierChecked))
        return port.TierCheck(
            account,
            model_id,
            version,
            event.held or None,
            event.required,
            event.granted,
            event.until,
            TransactionHash(receipt.transaction.hash),
        )

    async def load_model(self, model_id: ModelId, version: Version, wait: bool) -> LoadState:
        model = self._state.registry.models[model_id, version]
        if wait:
            return await self.loading.wait(model)
        self.loading.start(model)
        return self.loading.state(model)

    async def unload_model(self, model_id: ModelId, version: Version) -> LoadState:
        return await self.loading.unload(self._state.registry.models[model_id, version])

    async def verify_shards(self, model_id: ModelId | None) -> tuple[port.ShardCheck, ...]:
        results = await self.replication.scrub(lambda model: model_id in {None, model.model_id})
        return tuple(
            port.ShardCheck(
                result.model.shard_hashes[result.shard_index],
                result.model.model_id,
                result.model.version,
                result.shard_index,
                result.pieces_checked,
                result.bad_pieces,
            )
            for result in results
        )

    async def chat(
        self,
        account: Address,
        model_id: ModelId,
        version: Version,
        *,
        messages: tuple[Message, ...],
        parameters: Parameters,
        emit: Emit | None,
    ) -> Completion:
        model = self._state.registry.models[model_id, version]
        if not self.loading.is_loaded(model):
            await self._load_with_progress(model, emit)
        if emit is None:
            return await self.engine.complete(engine_key(model), messages, parameters)
        async with self.engine.generate(engine_key(model), messages, parameters) as answer:
            texts = []
            async for chunk in answer:
                texts.append(chunk.text)
                if chunk.text:
                    await emit(ChatDelta(chunk.text))
            assert chunk.finish_reason is not None
            assert chunk.usage is not None
        return Completion("".join(texts), chunk.finish_reason, chunk.usage)

    async def _load_with_progress(self, model: Model, emit: Emit | None) -> None:
        """Wait for a load, telling the asker how far it is."""
        if emit is None:
            await self.loading.wait(model)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_progress, model, emit)
            await self.loading.wait(model)
            nursery.cancel_scope.cancel()

    async def _tell_progress(self, model: Model, emit: Emit) -> None:
        while True:
            await emit(self.loading.state(model))
            await trio.sleep(PROGRESS_INTERVAL_S)


def _backend(name: str) -> port.Backend:
    return msgspec.convert(name, port.Backend)


def _event_info(event: ContractEvent) -> port.EventInfo:
    return port.EventInfo(type(event).__name__, {name: getattr(event, name) for name in event.__struct_fields__})
