"""The control plane: stays connected to the network's nodes and keeps the ledger in step with them.

Owns the list of sessions, the dialling and the judgement over peers. Correctness rests on pull sync alone: each node
asks each connected peer for the blocks after its own head and checks what it gets; gossip is only sooner. Knows no
models and no shards.
"""

import functools
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from contracts.errors import BadPeer, NotAllowed, Refused
from contracts.types import NodeId
from node.network.addresses import ControlAddress, DataAddress
from node.network.failures import first_failure
from node.network.gossip import Gossip, topic
from node.network.host import FRAME_S_MAX, Host, open_host
from node.network.identity import NodeIdentity
from node.network.mesh import Mesh
from node.network.messages import (
    ANSWER_BYTES_MAX,
    REQUEST_BYTES_MAX,
    Answer,
    Deliver,
    Delivered,
    GetBlocks,
    GetNodes,
    Hello,
    Request,
    Submitted,
    SubmitTransactions,
    TurnedAway,
    Welcome,
    decode_answer,
    decode_request,
    encode,
    shorten,
)
from node.network.peers import PeerBook
from node.network.ports import ConsensusPort, LedgerPort, StartedPort, StatePort
from node.network.session import Session, SyncLimits
from node.network.statistics import GossipStatistics
from node.network.sync import Sync, SyncStatistics

log = logging.getLogger(__name__)

PEERS_MAX = 64
"""Sessions at a time. Beyond this, only bootstrap peers and members are still let in, up to twice as many."""

ASKED_MAX = 3
"""Peers that are asked for every block, of those that hear of blocks by gossip."""

DIALS_MAX = 8


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One connected peer, as `aigen status` shows it."""

    node_id: NodeId
    head_number: int
    data_address: DataAddress | None
    blocks_received: int
    transactions_sent: int


@dataclass(frozen=True, slots=True)
class ControlStatistics:
    """The control plane at one moment."""

    peers: tuple[PeerStatus, ...]
    """Connected peers of this network."""
    unreachable: dict[NodeId, str]
    """Nodes that are not connected, with the reason."""
    lagging: tuple[NodeId, ...]
    """Connected nodes that stay behind what the others have: stuck, or serving an old chain."""
    sync: SyncStatistics
    blocks_received: int
    blocks_served: int
    transactions_received: int
    transactions_sent: int
    requests_refused: int
    gossip: GossipStatistics


class ControlPlane:
    """Build it, then `await nursery.start(control.run)`; cancel the nursery to stop it."""

    def __init__(
        self,
        identity: NodeIdentity,
        ledger: LedgerPort,
        consensus: ConsensusPort,
        state: StatePort,
        *,
        listen_host: str,
        listen_port: int,
        bootstrap: Sequence[ControlAddress] = (),
        members: Callable[[], Iterable[ControlAddress]] = tuple,
        data_endpoint: DataAddress | None = None,
        limits: SyncLimits | None = None,
    ) -> None:
        """`members` is asked every few seconds for the control addresses on the ledger; `data_endpoint` is told to
        peers, so that a node can be fetched from before the ledger has its address."""
        self._identity = identity
        self._ledger = ledger
        self._consensus = consensus
        self._state = state
        consensus.on_offence = lambda peer, reason: self._on_offence(NodeId(peer), reason)
        self._listen = (listen_host, listen_port)
        self._bootstrap = tuple(bootstrap)
        self._members = members
        self._data_endpoint = str(data_endpoint) if data_endpoint else None
        self._limits = limits or SyncLimits()
        self._book = PeerBook(identity.node_id)
        self._sessions: dict[NodeId, Session] = {}
        self._dialling: set[NodeId] = set()
        self._sync = Sync(
            ledger, lambda: [s for s in self._sessions.values() if s.is_welcome], self._limits.fast_blocks_min
        )
        self._gossip = Gossip(ledger, self._sync, self._tell, self._sessions.get, self._submit)
        self._changed = trio.Event()
        self._host: Host | None = None
        self._mesh: Mesh | None = None
        self._nursery: trio.Nursery | None = None
        self._blocks_served = 0
        self._transactions_received = 0
        self._requests_refused = 0
        self._gone_blocks_received = 0
        self._gone_transactions_sent = 0

    @property
    def port(self) -> int:
        """The port it listens on, once it runs."""
        assert self._host is not None
        return self._host.port

    def statistics(self) -> ControlStatistics:
        welcome = [s for s in self._sessions.values() if s.is_welcome]
        return ControlStatistics(
            peers=tuple(
                PeerStatus(s.node_id, s.head_number, s.data_address, s.blocks_received, s.transactions_sent)
                for s in welcome
            ),
            # One that is just being greeted again is no peer yet: the reason stands until it is.
            unreachable={n: r for n, r in self._book.reasons().items() if n not in {s.node_id for s in welcome}},
            lagging=tuple(s.node_id for s in welcome if s.is_lagging()),
            sync=self._sync.statistics(),
            blocks_received=self._gone_blocks_received + sum(s.blocks_received for s in self._sessions.values()),
            blocks_served=self._blocks_served,
            transactions_received=self._transactions_received,
            transactions_sent=self._gone_transactions_sent + sum(s.transactions_sent for s in self._sessions.values()),
            requests_refused=self._requests_refused,
            gossip=self._mesh.statistics() if self._mesh else GossipStatistics(),
        )

    def data_addresses(self) -> dict[NodeId, DataAddress]:
        """Where connected peers say they serve pieces."""
        return {s.node_id: s.data_address for s in self._sessions.values() if s.data_address is not None}

    async def wait_peers(self, count: int = 1) -> None:
        """Return once `count` peers of this network are connected; the caller sets the deadline."""
        while sum(s.is_welcome for s in self._sessions.values()) < count:
            await self._changed.wait()

    async def wait_caught_up(self) -> None:
        """Return once a peer is connected and the ledger is as far as every connected peer says it is."""
        while True:
            await self.wait_peers()
            head = self._ledger.head.number
            if all(s.head_number <= head for s in self._sessions.values() if s.is_welcome):
                return
            # The peer that is ahead may also go away; then `_changed` is what moves.
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_first, functools.partial(self._ledger.wait_head, head), nursery.cancel_scope)
                nursery.start_soon(_first, self._changed.wait, nursery.cancel_scope)

    async def run(self, *, task_status: StartedPort = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, dial and sync until cancelled. Started (with the port) once it listens; Conflict: port in use."""
        host, port = self._listen
        frame_s_max = min(FRAME_S_MAX, self._limits.answer_s_max)
        async with (
            open_host(
                self._identity,
                host,
                port,
                serve=self._serve,
                request_bytes_max=REQUEST_BYTES_MAX,
                frame_s_max=frame_s_max,
            ) as self._host,
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            self._host.on_connected = self._on_connected
            self._host.on_disconnected = self._on_disconnected
            self._host.on_offence = self._on_offence
            self._mesh = self._host.mesh(topic(self._ledger.genesis_hash), self._gossip.take)
            nursery.start_soon(self._mesh.run)
            nursery.start_soon(self._gossip.run)
            log.info("control plane listens on %s:%d as %s", host, self._host.port, self._identity.node_id)
            task_status.started(self._host.port)
            try:
                await self._keep_dialling(self._host, nursery)
            finally:
                self._nursery = None

    # Connections

    async def _keep_dialling(self, host: Host, nursery: trio.Nursery) -> None:
        limiter = trio.CapacityLimiter(DIALS_MAX)
        while True:
            changed = self._changed
            now = trio.current_time()
            self._book.set_targets([*self._bootstrap, *self._members()])
            for node_id, addresses in self._book.due(now):
                if node_id not in self._sessions and node_id not in self._dialling:
                    self._dialling.add(node_id)
                    nursery.start_soon(self._dial, host, limiter, node_id, addresses)
            with trio.move_on_after(min(self._limits.redial_s_max, self._book.next_due(now))):
                await changed.wait()

    async def _dial(
        self, host: Host, limiter: trio.CapacityLimiter, node_id: NodeId, addresses: tuple[ControlAddress, ...]
    ) -> None:
        reasons = []
        try:
            async with limiter:
                for address in addresses:
                    try:
                        await host.dial(address)
                        return
                    except Refused as error:
                        reasons.append(str(error))
            # Not the named node's doing, even when another key answers there: so a pause, never a ban.
            self._book.failed(node_id, trio.current_time(), " ".join(reasons))
            log.debug("node %s is not reached: %s", node_id, " ".join(reasons))
        finally:
            self._dialling.discard(node_id)
            self._notify()

    def _on_connected(self, node_id: NodeId) -> None:
        if self._nursery is None or node_id in self._sessions:  # it ends, and receives nobody any more
            return
        assert self._host is not None
        banned = self._book.is_banned(node_id, trio.current_time())
        room = PEERS_MAX * (2 if self._book.is_target(node_id) else 1)
        if banned or len(self._sessions) >= room:
            log.info("refused the connection of %s: %s", node_id, "banned" if banned else f"{room} peers already")
            self._nursery.start_soon(self._host.disconnect, node_id)
            return
        self._sessions[node_id] = self._session(self._host, node_id)
        self._nursery.start_soon(self._converse, self._host, self._sessions[node_id])

    def _session(self, host: Host, node_id: NodeId) -> Session:
        async def ask(request: Request, wait_s: float) -> Answer:
            answer_s_max = wait_s + self._limits.answer_s_max
            return decode_answer(await host.request(node_id, encode(request), ANSWER_BYTES_MAX, answer_s_max))

        def is_told() -> bool:
            return self._mesh is not None and self._mesh.reaches(node_id)

        def is_asked() -> bool:
            return not is_told() or node_id in itertools.islice(self._sessions, ASKED_MAX)

        return Session(
            node_id, self._ledger, self._consensus, self._state, ask, self._sync, self._limits, is_told, is_asked
        )

    def _on_disconnected(self, node_id: NodeId) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.scope.cancel()

    async def _converse(self, host: Host, session: Session) -> None:
        """Hold the session until the connection or the peer fails, then judge how it ended."""
        node_id = session.node_id
        reason = "the connection was closed"
        try:
            with session.scope:
                try:
                    await session.greet(self._data_endpoint)
                    self._book.succeeded(node_id)
                    log.info("connected to %s at block %d", node_id, session.head_number)
                    self._notify()
                    await first_failure(session.pull, session.forward, session.deliver)
                except BadPeer as error:
                    reason = str(error)
                    log.warning("dropped %s: %s", node_id, reason)
                    self._book.offended(node_id, trio.current_time(), reason)
                except Refused as error:  # it turned us away, did not answer, or our own ledger failed: no offence
                    reason = str(error)
                    log.log(logging.WARNING if isinstance(error, NotAllowed) else logging.INFO, "%s", reason)
            await host.disconnect(node_id)
        finally:
            self._gone_blocks_received += session.blocks_received
            self._gone_transactions_sent += session.transactions_sent
            del self._sessions[node_id]
        # Two nodes of different networks greet each other at once, and the first to know hangs up on the other's
        # question: what the peer's own greeting showed is then the better reason.
        self._book.failed(node_id, trio.current_time(), session.mismatch or session.offence or reason)
        self._notify()
        if host.is_connected(node_id):  # it came back while we were hanging up
            self._on_connected(node_id)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self._sync.stir()

    # Serving

    async def _serve(self, node_id: NodeId, frame: bytes) -> bytes:
        """Decode, validate, act, answer."""
        request = decode_request(frame)
        if node_id not in self._sessions:  # its first request may arrive before libp2p tells us of the connection
            self._on_connected(node_id)
        session = self._sessions.get(node_id)
        if session is not None and not session.rate.take(trio.current_time()):
            raise BadPeer(f"more than {self._limits.requests_per_s:.0f} requests a second")
        reason = self._unfit(node_id, request)
        if reason:
            self._requests_refused += 1
            log.info("turned %s away: %s", node_id, reason)
            return encode(TurnedAway(shorten(reason)))
        return encode(await self._act(node_id, request))

    def _unfit(self, node_id: NodeId, request: Request) -> str:
        """Why the request gets no answer; empty when it does."""
        session = self._sessions.get(node_id)
        if session is None:
            return "this node stops, has banned it for a while, or has as many peers as it takes"
        ours = self._ledger.genesis_hash
        if request.genesis_hash != ours:
            session.mismatch = f"wrong genesis: {node_id} has 0x{request.genesis_hash.hex()}, ours is 0x{ours.hex()}"
        elif isinstance(request, Hello) and request.chain_id != self._ledger.chain_id:
            session.mismatch = f"wrong chain id: {node_id} has {request.chain_id}, ours is {self._ledger.chain_id}"
        return session.mismatch

    async def _act(self, node_id: NodeId, request: Request) -> Answer:
        session = self._sessions[node_id]
        match request:
            case Hello():
                await session.learn(request)
                return Welcome(self._ledger.head.number, self._data_endpoint, await self._state.marks())
            case GetBlocks():
                blocks = await session.answer_blocks(request)
                self._blocks_served += len(blocks.blocks)
                return blocks
            case GetNodes():
                return await session.answer_nodes(request)
            case SubmitTransactions():
                return Submitted(tuple([await self._submit(session, raw) for raw in request.transactions]))
            case Deliver():
                for message in request.messages:
                    self._consensus.receive(node_id, message)
                return Delivered()

    async def _tell(self, data: bytes) -> None:
        assert self._mesh is not None
        await self._mesh.tell(data)

    async def _submit(self, session: Session, raw: bytes) -> str:
        try:
            await self._ledger.submit(raw, simulate=False)
        except Refused as error:
            return shorten(str(error) or type(error).__name__)
        self._transactions_received += 1
        session.outbox.received(raw, trio.current_time())
        return ""

    def _on_offence(self, node_id: NodeId, reason: str) -> None:
        """A peer's request broke the protocol: end its session and refuse it for a while."""
        log.warning("dropped %s: %s", node_id, reason)
        self._book.offended(node_id, trio.current_time(), reason)
        session = self._sessions.get(node_id)
        if session is not None:
            session.offence = reason
            session.scope.cancel()


async def _first(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
    """Wait, then end the others that wait beside."""
    await wait()
    scope.cancel()
