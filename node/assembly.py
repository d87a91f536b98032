"""The parts of a running node, put together: ledger, replay, store, data and control plane, engine, RPC.

Owns the data directory's layout and which server starts before which. Knows no sequence: `node.startup` drives the
parts. RPC answers as soon as this is done, so that `aigen status` can show where the sequence stands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from contracts.errors import BadInput
from contracts.types import NodeId
from genesis import config as genesis_config
from ledger.consensus import Consensus
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.wallet import Wallet
from node.agreement import Agreement, StateMark
from node.config import Config, InferenceSettings
from node.inference.engine import REQUESTS_MAX, Engine, EngineSettings
from node.leases import Leases
from node.loading import Loading
from node.network.addresses import (
    ControlAddress,
    DataAddress,
    control_address,
    data_address,
    is_loopback,
    parse_control,
    parse_endpoints,
)
from node.network.control import ControlPlane
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.mdns import Mdns
from node.network.pace import Pace
from node.network.server import DataServer
from node.network.session import SyncLimits
from node.network.wire import DataLimits
from node.questions import Questions
from node.quota import Quota
from node.receipts import Receipts
from node.registry import Registry
from node.replay import Replay
from node.replication import Replication, peer_sources
from node.rpc.server import RpcServer
from node.service import Service, Steps
from node.share import Share
from node.storage.store import ShardStore

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
def open_ledger(directory: DataDirectory) -> Iterator[Ledger]:
    ledger = Ledger.open(directory.ledger, genesis_config.load(directory.genesis))
    try:
        yield ledger
    finally:
        ledger.close()


@dataclass(frozen=True)
class Parts:
    """The running parts that the start sequence drives."""

    config: Config
    ledger: Ledger
    replay: Replay
    control: ControlPlane
    replication: Replication
    service: Service


async def assemble(
    directory: DataDirectory,
    config: Config,
    operator: Key,
    identity: NodeIdentity,
    ledger: Ledger,
    nursery: trio.Nursery,
) -> Parts:
    """Put the parts together and start their servers; `nursery` runs them."""
    host = _advertised_host(config)
    steps, replay = Steps(), Replay(ledger)
    with steps.running("replay the ledger"):
        replay.catch_up()
        steps.note("replay the ledger", f"block {replay.number}")
    nursery.start_soon(ledger.watch_disk)
    nursery.start_soon(replay.run)
    store = ShardStore(directory.store, config.storage.disk_budget)
    wallet = Wallet(operator, ledger)
    shards = ledger.config.shards
    replication = Replication(
        config.node.role,
        Share(identity.node_id, shards.redundancy, Leases(shards.lease_s), shards.size),
        replay,
        store,
        Fetcher(
            store,
            identity,
            locate=lambda node_id: peer_sources(replay.state.members, node_id),
            members=lambda: tuple(replay.state.members.members),
            pace=Pace(config.network.download_rate),
            lanes_max=config.network.download_connections,
            compression=config.network.compression,
            plain=config.network.plain_tcp,
        ),
        wallet,
    )
    engine = _engine(config.inference)
    await nursery.start(engine.run)
    data_endpoint = await _serve_pieces(config, host, identity, replay, store, replication, nursery)
    consensus, agreement = Consensus(ledger, operator), Agreement()
    control, control_endpoint = await _join_peers(
        config, host, identity, ledger, consensus, _SharedState(replay, agreement), replay, data_endpoint, nursery
    )
    nursery.start_soon(consensus.run)

    loading = Loading(replication, engine, nursery)
    receipts = Receipts(identity, ledger.chain_id, ledger.genesis_hash) if config.inference.receipts else None
    service = Service(
        config=config,
        node_id=identity.node_id,
        endpoints=(str(control_endpoint), str(data_endpoint)),
        ledger=ledger,
        replay=replay,
        store=store,
        replication=replication,
        engine=engine,
        loading=loading,
        questions=Questions(replay, replication, loading, engine, ledger, _quota(config, ledger, operator), receipts),
        receipts=receipts,
        wallet=wallet,
        control=control.statistics,
        consensus=consensus,
        agreement=agreement,
        steps=steps,
    )
    urls: list[str] = await nursery.start(RpcServer(service, config.rpc, ledger=ledger).serve)
    log.info("RPC answers on %s", ", ".join(urls))
    if operator.address in ledger.authorities:
        log.info("this node's operator 0x%s is an authority: it proposes blocks and votes", operator.address.hex())
    return Parts(config, ledger, replay, control, replication, service)


class _Public:
    """The hashes of what is served to anybody, made anew when a model changes. Called in any thread."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._made: tuple[Registry, frozenset[bytes]] = (Registry(), frozenset())

    def __call__(self) -> frozenset[bytes]:
        registry = self._replay.state.registry
        made_of, hashes = self._made
        if made_of is not registry:
            hashes = registry.public_hashes()
            self._made = registry, hashes
        return hashes


@dataclass(frozen=True)
class _SharedState:
    """What this node's state is, for its peers to compare, and what comparing theirs comes to."""

    replay: Replay
    agreement: Agreement

    async def marks(self) -> tuple[StateMark, ...]:
        return await self.replay.marks()

    async def compare(self, node_id: NodeId, theirs: tuple[StateMark, ...]) -> None:
        self.agreement.compare(node_id, await self.replay.marks(), theirs)


def _engine(settings: InferenceSettings) -> Engine:
    return Engine(EngineSettings(settings.cache_size, settings.threads, quantization=settings.quantization))


def _quota(config: Config, ledger: Ledger, operator: Key) -> Quota:
    places = min(REQUESTS_MAX, config.rpc.concurrent_requests)
    return Quota(ledger.config.tiers, operator.address, places, trio.current_time)


async def _serve_pieces(
    config: Config,
    host: str,
    identity: NodeIdentity,
    replay: Replay,
    store: ShardStore,
    replication: Replication,
    nursery: trio.Nursery,
) -> DataAddress:
    """Start the data plane; where others reach it."""
    token = trio.lowlevel.current_trio_token()
    server = DataServer(
        identity,
        store,
        is_member=lambda node_id: node_id in replay.state.members.members,
        listen_host=config.network.listen,
        listen_port=config.network.data_port,
        on_damage=lambda shard_hash, index: token.run_sync_soon(replication.scrubbing.note_damage, shard_hash),
        on_asked=lambda shard_hash, node_id: token.run_sync_soon(replication.fetcher.hear_of, shard_hash, node_id),
        coming=replication.fetcher.coming,
        public=_Public(replay),
        limits=DataLimits(
            connections_max=config.network.upload_connections,
            connections_per_peer_max=config.network.connections_per_peer,
        ),
        pace=Pace(config.network.upload_rate),
        compression=config.network.compression,
        plain=config.network.plain_tcp,
    )
    port: int = await nursery.start(server.run)
    return data_address(host, port, config.network.plain_tcp)


async def _join_peers(
    config: Config,
    host: str,
    identity: NodeIdentity,
    ledger: Ledger,
    consensus: Consensus,
    state: _SharedState,
    replay: Replay,
    data_endpoint: DataAddress,
    nursery: trio.Nursery,
) -> tuple[ControlPlane, ControlAddress]:
    """Start the control plane; where others reach it."""

    def member_addresses() -> Iterator[ControlAddress]:
        for member in replay.state.members.members.values():
            try:
                yield from parse_endpoints(member.node_id, member.endpoints).control
            except BadInput as error:
                log.debug("member %s has an endpoint that is none: %s", member.node_id, error)

    neighbours: list[Mdns] = []
    control = ControlPlane(
        identity,
        ledger,
        consensus,
        state,
        listen_host=config.network.listen,
        listen_port=config.network.control_port,
        bootstrap=[parse_control(text) for text in config.network.bootstrap],
        members=lambda: [*member_addresses(), *(a for mdns in neighbours for a in mdns.addresses())],
        data_endpoint=data_endpoint,
        limits=SyncLimits(fast_blocks_min=config.ledger.fast_blocks if config.ledger.sync == "fast" else None),
    )
    port: int = await nursery.start(control.run)
    address = control_address(identity.node_id, host, port)
    if config.network.mdns and not is_loopback(config.network.listen):
        neighbours.append(Mdns(ledger.genesis_hash, address, config.network.listen))
        nursery.start_soon(neighbours[0].run)
    return control, address


def _advertised_host(config: Config) -> str:
    host = config.network.advertise or config.network.listen
    if host in {"0.0.0.0", "::"}:
        raise BadInput(
            f"network.listen is {host}: say in network.advertise at which name or address others reach this node"
        )
    return host
