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

from contracts.errors import NotFound
from contracts.types import Address, ModelId, NodeId, TransactionHash, Version
from ledger.consensus import Consensus
from ledger.ledger import Ledger
from ledger.proof import Proof
from ledger.prover import Shows
from ledger.transactions import Transaction
from ledger.wallet import Wallet
from node import views
from node.agreement import Agreement, StateMark
from node.config import Config
from node.inference.engine import Engine
from node.inference.spec import Parameters, Prompt
from node.loading import Loading
from node.network.control import ControlStatistics
from node.questions import Questions
from node.receipts import Receipt, Receipts
from node.registry import Model
from node.replay import Replay
from node.replication import Replication
from node.rpc import values
from node.rpc.port import Emit
from node.rpc.values import HealthStatus, LoadState, StartStep, StepState
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
"""The start sequence, in order."""


@dataclass
class Steps:
    """How far the start sequence is."""

    steps: dict[str, StartStep] = field(default_factory=lambda: {n: StartStep(n, "waiting", "") for n in STEP_NAMES})
    status: HealthStatus = "starting"

    def set(self, name: str, state: StepState, detail: str = "") -> None:
        assert name in self.steps
        self.steps[name] = StartStep(name, state, detail)

    def note(self, name: str, detail: str) -> None:
        """Say more about a step, its state as it is."""
        self.set(name, self.steps[name].state, detail)

    @contextmanager
    def running(self, name: str, detail: str = "") -> Iterator[None]:
        """A step from its beginning to its end; what it failed with stays visible."""
        self.set(name, "running", detail)
        try:
            yield
        except Exception as error:
            self.set(name, "failed", str(error))
            raise
        self.set(name, "done", self.steps[name].detail)

    def current(self) -> str:
        """The step under way, or the one that failed and is about to be tried again."""
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
    questions: Questions
    receipts: Receipts | None
    """None while they are switched off."""
    wallet: Wallet
    control: Callable[[], ControlStatistics]
    consensus: Consensus
    steps: Steps
    agreement: Agreement = field(default_factory=Agreement)
    started_at: int = field(default_factory=lambda: int(time.time()))
    _proving: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    """A search for an event may read the whole ledger: one at a time."""

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

    def models(self) -> tuple[values.ModelInfo, ...]:
        models = sorted(self._state.registry.models.values(), key=lambda model: model.registered)
        return tuple(views.model_info(self._state, model, self.loading.precision(model)) for model in models)

    def model(self, model_id: ModelId, version: Version | None) -> values.ModelInfo | None:
        try:
            model = self._state.registry.find(model_id, version)
        except NotFound:
            return None
        return views.model_info(self._state, model, self.loading.precision(model))

    def catalogue(self) -> tuple[values.CatalogueEntry, ...]:
        return views.catalogue(self._state, self.ledger.config)

    def shards(self, model_id: ModelId, version: Version) -> tuple[values.ShardInfo, ...]:
        return views.shard_infos(self._state, self._state.registry.models[model_id, version], self.replication.live())

    def authorities(self) -> tuple[values.AuthorityInfo, ...]:
        return views.authority_infos(self.ledger)

    def members(self) -> tuple[values.MemberInfo, ...]:
        return views.member_infos(self._state, self.replication.live())

    def account(self, account: Address) -> values.AccountInfo:
        return views.account_info(self.ledger, self._state, account, time.time())

    def chain(self) -> values.ChainInfo:
        return views.chain_info(self.ledger, self._state)

    async def state_hashes(self) -> tuple[StateMark, ...]:
        return await self.replay.marks()

    def block(self, at: int | bytes | None) -> values.BlockInfo | None:
        return views.block_info(self.ledger, at)

    def receipt(self, transaction_hash: TransactionHash) -> values.ReceiptInfo | None:
        return views.receipt_info(self.ledger, transaction_hash)

    async def prove(self, shows: Shows) -> Proof:
        return await trio.to_thread.run_sync(self.ledger.prove, shows, limiter=self._proving)

    # This node

    def node_info(self) -> values.NodeInfo:
        engine, store = self.engine.statistics(), self.store.statistics()
        fetched, control = self.replication.fetcher.statistics(), self.control()
        core = self.core_model()
        return values.NodeInfo(
            node_id=self.node_id,
            operator=self.operator,
            role=self.config.node.role,
            aigen_version=package_version("aigen"),
            status=self.steps.status,
            started_at=self.started_at,
            core_model=core[0] if core else None,
            endpoints=self.endpoints,
            peers=tuple(peer.node_id for peer in control.peers),
            lagging_peers=control.lagging,
            sync=control.sync,
            gossip=control.gossip,
            disk_budget=self.config.storage.disk_budget,
            disk_used=store.shard_bytes + store.partial_bytes + store.quantised_bytes,
            cache_budget=engine.cache.budget_bytes,
            cache_used=engine.cache.used_bytes,
            pieces_fetched=fetched.pieces_fetched,
            bytes_fetched=fetched.bytes_fetched,
            shards_short=self.replication.shards_short(),
            answers_waiting=engine.requests_waiting,
            quota=self.questions.quota.statistics(),
            fetching=fetched,
            state_alarms=self.agreement.alarms(),
            consensus=self.consensus.statistics(),
            steps=tuple(self._explained(step) for step in self.steps.steps.values()),
            models=self.load_states(),
        )

    def _explained(self, step: StartStep) -> StartStep:
        """While no peer is connected, the step about the network says why."""
        if step.name not in STEP_NAMES[:2] or step.state == "waiting" or self.control().peers:
            return step
        if step.name == STEP_NAMES[0] and step.state != "running":
            return step
        return msgspec.structs.replace(step, detail="; ".join(filter(None, (step.detail, self.peer_trouble()))))

    def peer_trouble(self) -> str:
        """Why the nodes that should be peers are none, in one line; empty when there are none to miss."""
        unreachable = self.control().unreachable
        return "; ".join(f"no connection to {node_id}: {reason}" for node_id, reason in unreachable.items())

    def core_model(self) -> tuple[ModelId, Version | None] | None:
        """The model this node pins: the one its config names, else the network's.

        The version is the one the ledger designates; None, the newest, for a model of this node's own choice.
        """
        name, core = self.config.node.model, self._state.registry.core
        if name and (core is None or core[0] != name):
            return ModelId(name), None
        return core

    def health(self) -> values.Health:
        status = self.steps.status
        return values.Health(status, status == "ready", self.replay.number, self.steps.current())

    def load_state(self, model_id: ModelId, version: Version) -> LoadState:
        return self.loading.state(self._state.registry.models[model_id, version])

    def load_states(self) -> tuple[LoadState, ...]:
        states = (self.loading.state(model) for model in self._state.registry.models.values())
        return tuple(state for state in states if state.state != "absent")

    def held_shards(self) -> tuple[values.HeldShard, ...]:
        found = []
        flights = {flight.shard_hash: flight for flight in self.replication.fetcher.statistics().flights}
        for model in self._state.registry.models.values():
            for index, shard_hash in enumerate(model.shard_hashes):
                size, flight = model.size_of_shard(index), flights.get(shard_hash)
                here = size if self.store.held(shard_hash) else flight.bytes_done if flight else 0
                if here:
                    announced = self.node_id in self._state.shards.holders_of(model.key, index)
                    found.append(
                        values.HeldShard(
                            shard_hash, model.model_id, model.version, index, model.shard_count, size, here, announced
                        )
                    )
        return tuple(found)

    @property
    def gives_receipts(self) -> bool:
        return self.receipts is not None

    def answer_receipt(self, receipt_id: str) -> Receipt | None:
        return None if self.receipts is None else self.receipts.find(receipt_id)

    # Acts

    def decode_transaction(self, raw: bytes) -> values.SignedTransaction:
        found: Transaction = self.ledger.decode(raw)
        return values.SignedTransaction(found.hash, found.sender, found.nonce, found.to, found.data)

    async def submit(self, raw: bytes) -> TransactionHash:
        return await self.ledger.submit(raw)

    async def check_tier(self, account: Address, model_id: ModelId, version: Version) -> values.TierCheck:
        return await self.questions.check_tier(account, model_id, version)

    async def load_model(self, model_id: ModelId, version: Version, wait: bool) -> LoadState:
        model = self._state.registry.models[model_id, version]
        if wait:
            return await self.loading.wait(model)
        self.loading.start(model)
        return self.loading.state(model)

    async def unload_model(self, model_id: ModelId, version: Version) -> LoadState:
        return await self.loading.unload(self._state.registry.models[model_id, version])

    async def verify_shards(self, model_id: ModelId | None) -> tuple[values.ShardCheck, ...]:
        results = await self.replication.scrubbing.scrub(lambda model: model_id in {None, model.model_id})
        return tuple(
            values.ShardCheck(
                result.model.shard_hashes[result.shard_index],
                result.model.model_id,
                result.model.version,
                result.shard_index,
                result.pieces_checked,
                result.bad_pieces,
            )
            for result in results
        )

    async def free_space(self, size: int) -> tuple[values.FreedShard, ...]:
        core = self.core_model()

        def keeps(model: Model) -> bool:
            is_in_use = self.loading.state(model).state not in {"absent", "failed"}
            return is_in_use or (core is not None and core[0] == model.model_id)

        return tuple(
            values.FreedShard(
                model.model_id, model.version, index, model.shard_hashes[index], model.size_of_shard(index)
            )
            for model, index in await self.replication.free(size, keeps)
        )

    async def chat(
        self,
        check: values.TierCheck,
        *,
        prompt: Prompt,
        parameters: Parameters,
        emit: Emit | None,
        receipt_id: str,
    ) -> values.Answered:
        model = self._state.registry.models[check.model_id, check.version]
        return await self.questions.answer(check, model, prompt, parameters, emit, receipt_id)
