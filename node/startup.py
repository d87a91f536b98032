"""The start sequence, readable as the sequence it is, and the parts it puts together (DESIGN section 5).

    replay the ledger -> join the network -> check core model metadata -> locate its shards -> fetch what is missing
    -> verify SHA-256 -> load the core model and pin it -> announce the shards -> ready for inference

RPC answers from the first moment, so that `aigen status` can show where the sequence stands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from contracts.calls import JoinNode
from contracts.errors import BadInput, NotFound, Refused
from genesis import config as genesis_config
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.wallet import Wallet
from node.config import Config
from node.inference.engine import Engine, EngineSettings
from node.loading import Loading
from node.members import REPLICATING_ROLES
from node.network.addresses import ControlAddress, control_address, data_address, parse_control, parse_endpoints
from node.network.control import ControlPlane
from node.network.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.server import DataServer
from node.registry import Model
from node.replay import Replay
from node.replication import RETRY_S, FetchProgress, Replication
from node.rpc.server import RpcServer
from node.service import Service, Steps
from node.storage.files import DirectoryLock
from node.storage.store import ShardStore

CATCH_UP_S = 15.0
"""How long a node waits for its peers' blocks before it goes on with the ledger it has."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataDirectory:
    """Where a node keeps everything."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def genesis(self) -> Path:
        return self.path / "genesis.toml"

    @property
    def identity(self) -> Path:
        return self.path / "node.key"

    @property
    def operator_key(self) -> Path:
        return self.path / "keys" / "operator.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def store(self) -> Path:
        return self.path / "store"


@contextmanager
def _open_ledger(directory: DataDirectory) -> Iterator[Ledger]:
    ledger = Ledger.open(directory.ledger, genesis_config.load(directory.genesis))
    try:
        yield ledger
    finally:
        ledger.close()


async def run(directory: DataDirectory, config: Config, operator: Key) -> None:
    """Run the node until cancelled. Raises Refused for what keeps it from starting or going on."""
    identity = NodeIdentity.load(directory.identity)
    lock = DirectoryLock(directory.path)
    lock.acquire()
    try:
        with _open_ledger(directory) as ledger:
            async with trio.open_nursery() as nursery:
                node = await _assemble(directory, config, operator, identity, ledger, nursery)
                await node.start_sequence(nursery)
                await trio.sleep_forever()
    finally:
        lock.release()


async def _assemble(
    directory: DataDirectory,
    config: Config,
    operator: Key,
    identity: NodeIdentity,
    ledger: Ledger,
    nursery: trio.Nursery,
) -> Node:
    """Put the parts together and start their servers; `nursery` runs them."""
    steps, replay = Steps(), Replay(ledger)
    with steps.running("replay the ledger"):
        replay.catch_up()
    nursery.start_soon(replay.run)
    store = ShardStore(directory.store, config.storage.disk_budget)
    wallet = Wallet(operator, ledger)
    fetcher = Fetcher(store, identity)
    replication = Replication(
        identity.node_id, config.node.role, ledger.config.shards.redundancy, replay, store, fetcher, wallet
    )
    engine = Engine(EngineSettings(config.inference.cache_size, config.inference.threads))
    await nursery.start(engine.run)

    token = trio.lowlevel.current_trio_token()
    data_server = DataServer(
        identity,
        store,
        is_member=lambda node_id: node_id in replay.state.members.members,
        listen_host=config.network.listen,
        listen_port=config.network.data_port,
        on_damage=lambda shard_hash, index: token.run_sync_soon(replication.note_damage, shard_hash),
    )
    data_port: int = await nursery.start(data_server.run)
    host = _advertised_host(config)
    data_endpoint = data_address(host, data_port)

    def member_addresses() -> Iterator[ControlAddress]:
        for member in replay.state.members.members.values():
            try:
                yield from parse_endpoints(member.node_id, member.endpoints).control
            except BadInput as error:
                log.warning("member %s has an endpoint that is none: %s", member.node_id, error)

    control = ControlPlane(
        identity,
        ledger,
        listen_host=config.network.listen,
        listen_port=config.network.control_port,
        bootstrap=[parse_control(text) for text in config.network.bootstrap],
        members=member_addresses,
        data_endpoint=data_endpoint,
    )
    control_port: int = await nursery.start(control.run)
    endpoints = (str(control_address(identity.node_id, host, control_port)), str(data_endpoint))

    service = Service(
        config=config,
        node_id=identity.node_id,
        endpoints=endpoints,
        ledger=ledger,
        replay=replay,
        store=store,
        replication=replication,
        engine=engine,
        loading=Loading(replication, engine, nursery),
        wallet=wallet,
        peers=lambda: tuple(peer.node_id for peer in control.statistics().peers),
        steps=steps,
    )
    rpc = RpcServer(service, config.rpc)
    urls: list[str] = await nursery.start(rpc.serve)
    log.info("RPC answers on %s", ", ".join(urls))
    if operator.address in ledger.authorities:
        nursery.start_soon(ledger.seal, operator)
        log.info("this node's operator 0x%s is an authority: it seals blocks", operator.address.hex())
    return Node(config, ledger, replay, control, replication, service)


def _advertised_host(config: Config) -> str:
    host = config.network.advertise or config.network.listen
    if host in {"0.0.0.0", "::"}:
        raise BadInput(
            f"network.listen is {host}: say in network.advertise at which name or address others reach this node"
        )
    return host


@dataclass(frozen=True)
class Node:
    """The running parts that the sequence drives."""

    config: Config
    ledger: Ledger
    replay: Replay
    control: ControlPlane
    replication: Replication
    service: Service

    async def start_sequence(self, nursery: trio.Nursery) -> None:
        """From a replayed ledger to ready for inference; what goes on for ever is left running in `nursery`."""
        steps = self.service.steps
        await self._catch_up()
        with steps.running("join the network"):
            await self._join()
        if self.config.node.role == "worker":
            await self._preload_core(nursery)
        else:
            await self._hold_share(nursery)
        nursery.start_soon(self.replication.run_scrub, self.config.storage.scrub_interval_s)
        steps.status = "ready"
        log.info("ready for inference")

    async def _catch_up(self) -> None:
        """Take the blocks that peers have and we lack; a node without peers goes on with what it has."""
        others = set(self.replay.state.members.members) - {self.service.node_id}
        if not self.config.network.bootstrap and not others:
            return
        with trio.move_on_after(CATCH_UP_S) as scope:
            await self.control.wait_caught_up()
        if scope.cancelled_caught:
            log.warning("no peer answered within %.0f s: going on from block %d", CATCH_UP_S, self.ledger.head.number)
        self.replay.catch_up()

    async def _join(self) -> None:
        """Be a member with today's role and endpoints, by a signed transaction when the ledger does not say so yet."""
        node_id, operator = self.service.node_id, self.service.operator
        while not self.ledger.account(operator).enrolled:
            shown = f"0x{operator.hex()}"
            detail = f"waiting for an admin to enrol this node's operator: aigen account enrol {shown}"
            self.service.steps.set("join the network", "running", detail)
            log.warning("%s", detail)
            await self.ledger.wait_head(self.ledger.head.number)
        self.replay.catch_up()
        member = self.replay.state.members.members.get(node_id)
        role, endpoints = self.config.node.role, self.service.endpoints
        if member is None or (member.role, member.endpoints) != (role, endpoints):
            receipt = await self.service.wallet.send(JoinNode(node_id, role, endpoints))
            await self.replay.wait_change(receipt.block_number - 1)
        self.service.steps.set("join the network", "running", f"{role} {node_id}")
        log.info("member of %s as %s %s", self.ledger.config.network.name, role, node_id)

    async def _hold_share(self, nursery: trio.Nursery) -> None:
        """A storage node or gateway has no core model: it holds its share of every model, as far as it can be had."""
        steps, role = self.service.steps, self.config.node.role
        steps.set("check the core model", "done", f"not for a {role} node")
        steps.set("locate its shards", "done", f"not for a {role} node")
        with steps.running("verify SHA-256"):
            checked = await self.replication.scrub()
            whole = sum(not result.bad_pieces for result in checked)
            steps.set("verify SHA-256", "running", f"{whole} of the {len(checked)} shards found here are whole")
        with steps.running("fetch missing shards"):
            await self.replication.settle()
        statistics = self.replication.statistics()
        steps.set("fetch missing shards", "done", f"{statistics.shards_held} of {statistics.shards_wanted} held")
        steps.set("load and pin the core model", "done", f"not for a {role} node")
        steps.set("announce shards", "done", "" if role in REPLICATING_ROLES else f"not for a {role} node")
        nursery.start_soon(self.replication.run)

    async def _preload_core(self, nursery: trio.Nursery) -> None:
        """Fetch, verify, load, pin and announce the core model; then take up this node's share of the others."""
        steps = self.service.steps
        with steps.running("check the core model"):
            model = await self._core_model(nursery)
        if model is None:
            for name in list(steps.steps)[3:]:
                steps.set(name, "done", "no core model")
            nursery.start_soon(self.replication.run)
            return
        while True:
            try:
                await self._bring_up(model)
                break
            except Refused as error:
                log.warning("%s; trying again in %.0f s", error, RETRY_S)
                await trio.sleep(RETRY_S)
        nursery.start_soon(self.replication.run)

    async def _core_model(self, nursery: trio.Nursery) -> Model | None:
        """This node's core model, once it is registered; None when neither the config nor the ledger names one."""
        steps, name = self.service.steps, self.service.core_model_id()
        if name is None:
            steps.set("check the core model", "running", "none is designated")
            return None
        try:
            model = self.replay.state.registry.find(name)
        except NotFound as error:
            steps.set("check the core model", "running", f"waiting until {name} is registered")
            log.warning("%s; waiting until an admin registers it", error)
            await self.replay.wait_until(lambda state: any(model_id == name for model_id, _ in state.registry.models))
            model = self.replay.state.registry.find(name)
        steps.set(
            "check the core model", "running", f"{model.model_id} version {model.version}, {model.shard_count} shards"
        )
        log.info("core model %s version %s: %d shards", model.model_id, model.version, model.shard_count)
        return model

    async def _bring_up(self, model: Model) -> None:
        steps, replication = self.service.steps, self.replication
        with steps.running("locate its shards"):
            places = sum(len(replication.sources(model, index)) for index in range(model.shard_count))
            steps.set("locate its shards", "running", f"{places} locations on other nodes")
        with steps.running("verify SHA-256"):
            # What is fetched is proved as it arrives; here it is what lay on the disk before.
            checked = await replication.scrub(lambda other: other.key == model.key)
        with steps.running("fetch missing shards"):
            await replication.hold_all(model, FetchProgress())
            already = sum(not result.bad_pieces for result in checked)
            steps.set("fetch missing shards", "running", f"{model.shard_count - already} of {model.shard_count}")
        steps.set("verify SHA-256", "done", f"{model.shard_count} of {model.shard_count} shards are whole")
        with steps.running("load and pin the core model"):
            self.service.loading.start(model, pin=True)
            await self.service.loading.wait(model)
        log.info("%s is loaded and pinned", model.model_id)
        with steps.running("announce shards"):
            await replication.announce(model)
