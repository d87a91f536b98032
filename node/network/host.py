"""The libp2p host: dial, accept, and streams with frames each way. Owns everything that is particular to py-libp2p.

Knows peers, addresses and bytes; not what the bytes mean. py-libp2p 0.8.1 is used as bare transport (tcp, noise,
yamux) and everything it does by itself is switched off, because each of these was seen to lose connections or nodes:

- its resource manager (`new_swarm` makes one unasked) refuses connections by its own rates;
- its auto-connector dials whatever is in the peer store, past our back-off and bans;
- an inbound slot is given back only when the host ends, so a long-lived node would stop accepting (`_inbound_handler`);
- identify fills the peer store with addresses peers claim, and of several addresses only the first is dialled;
- a peer that was down is refused for 60 s (`unblock_peer`);
- an exception in a stream handler, even from its own protocol negotiation, ends the whole host;
- a peer can make the muxer hold any amount of bytes (`muxer`);
- listeners are opened with SO_REUSEPORT: a second node on the same port would share its connections silently.
"""

import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import libp2p
import trio
from libp2p.abc import INotifee
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from multiaddr import Multiaddr

from contracts.errors import BadPeer, Busy, Conflict
from contracts.types import NodeId
from node.network import muxer
from node.network.addresses import ControlAddress
from node.network.identity import NodeIdentity
from node.network.mesh import Mesh, Take
from node.network.streams import (
    CLOSE_S_MAX,
    STREAM_ERRORS,
    IdleStreams,
    cause,
    chain,
    finish,
    next_frame,
    read_frame,
    write_frame,
)

log = logging.getLogger(__name__)

PROTOCOL: Final = "/aigen/sync/1"
CONNECTIONS_MAX: Final = 256
CONNECTIONS_PER_PEER_MAX: Final = 2  # two nodes may dial each other at the same moment
STREAMS_PER_PEER_MAX: Final = 16
DIAL_S_MAX: Final = 10.0
FRAME_S_MAX: Final = 20.0
RESOLVED_ADDRESSES_MAX: Final = 4

Serve = Callable[[NodeId, bytes], Awaitable[bytes]]
"""Answers one request frame of a peer, or raises BadPeer when it is none."""


class Host:
    """A running libp2p host; made by `open_host`."""

    def __init__(self, host: Any, serve: Serve, request_bytes_max: int, frame_s_max: float) -> None:
        self._host = host
        self._network = host.get_network()
        self._serve = serve
        self._request_bytes_max = request_bytes_max
        self._frame_s_max = frame_s_max
        self._streams: dict[NodeId, int] = {}
        self.idle = IdleStreams()
        self.node_id = NodeId(str(host.get_id()))
        self.on_connected: Callable[[NodeId], None] = _ignore
        self.on_disconnected: Callable[[NodeId], None] = _ignore
        """Called when the last connection to a peer is gone."""
        self.on_offence: Callable[[NodeId, str], None] = _ignore
        """Called with the reason when a peer's request broke the protocol."""

    @property
    def port(self) -> int:
        """The port the host listens on."""
        return int(self._host.get_transport_addrs()[0].value_for_protocol("tcp"))

    def mesh(self, topic: str, take: Take) -> Mesh:
        """Gossip over this host's connections; made once, after `on_offence` is set."""
        return Mesh(self._host, topic, take, self.on_offence)

    def is_connected(self, node_id: NodeId) -> bool:
        return bool(self._network.get_connections(ID.from_base58(node_id)))

    async def dial(self, address: ControlAddress) -> None:
        """Connect; Busy with the reason when the node is not reached there, BadPeer when another key answers."""
        peer = ID.from_base58(address.node_id)
        store = self._network.peerstore
        reason = "its name has no address"
        try:
            with trio.fail_after(DIAL_S_MAX):
                for multiaddr in await _resolve(address):
                    store.clear_addrs(peer)
                    self._network.unblock_peer(peer)
                    try:
                        await self._host.connect(PeerInfo(peer, [multiaddr]))
                        return
                    except STREAM_ERRORS as error:
                        reason = cause(error)
                        if any(isinstance(inner, PeerIDMismatchesPubkey) for inner in chain(error)):
                            raise BadPeer(
                                f"Another node than {address.node_id} answers at {address.host}:{address.port}."
                            ) from None
        except trio.TooSlowError:
            raise Busy(f"{address} did not answer within {DIAL_S_MAX:.0f} s.") from None
        raise Busy(f"{address} cannot be reached: {reason}.")

    async def disconnect(self, node_id: NodeId) -> None:
        """Close every connection to a peer."""
        with trio.move_on_after(CLOSE_S_MAX):
            await self._network.close_peer(ID.from_base58(node_id))

    async def request(self, node_id: NodeId, frame: bytes, answer_bytes_max: int, answer_s_max: float) -> bytes:
        """Send one frame and return the one that answers it; until then no other request is on its stream.

        Busy when the connection breaks or the deadline passes, BadPeer when what comes back is no frame.
        """
        stream = self.idle.take(node_id)
        done = False
        try:
            with trio.fail_after(answer_s_max):
                if stream is None:
                    stream = await self._host.new_stream(ID.from_base58(node_id), [PROTOCOL])
                await write_frame(stream, frame)
                answer = await read_frame(stream, answer_bytes_max)
                done = True
                return answer
        except trio.TooSlowError:
            raise Busy(f"{node_id} did not answer within {answer_s_max:.0f} s.") from None
        except STREAM_ERRORS as error:
            raise Busy(f"The connection to {node_id} broke: {cause(error)}.") from None
        finally:
            if stream is not None and not (done and self.idle.keep(node_id, stream)):
                await finish(stream, done)

    async def handle(self, stream: Any) -> None:
        """Serve one inbound stream: a frame in, a frame out, until the peer ends it."""
        node_id = NodeId(str(stream.muxed_conn.peer_id))
        done = False
        try:
            while (frame := await next_frame(stream, self._request_bytes_max, self._frame_s_max)) is not None:
                answer = await self._serve(node_id, frame)
                with trio.fail_after(self._frame_s_max):
                    await write_frame(stream, answer)
            done = True
        except BadPeer as error:
            self.on_offence(node_id, str(error))
        except trio.TooSlowError:
            log.info("a request of %s took over %.0f s", node_id, self._frame_s_max)
        except STREAM_ERRORS as error:
            log.debug("a request of %s broke off: %s", node_id, cause(error))
        finally:
            await finish(stream, done)

    async def accept(self, stream: Any) -> None:
        """The entry for every inbound stream: bounds them per peer and keeps libp2p's own exceptions from its host."""
        node_id = NodeId(str(stream.muxed_conn.peer_id))
        if self._streams.get(node_id, 0) >= STREAMS_PER_PEER_MAX:
            log.info("refused a stream of %s: %d are open already", node_id, STREAMS_PER_PEER_MAX)
            await finish(stream, done=False)
            return
        self._streams[node_id] = self._streams.get(node_id, 0) + 1
        try:
            await self._host._swarm_stream_handler(stream)
        except STREAM_ERRORS as error:  # the peer left in the middle of a negotiation
            log.debug("an inbound stream of %s broke off: %s", node_id, cause(error))
            await finish(stream, done=False)
        except Exception:
            # Garbage where a protocol name belongs raises UnicodeDecodeError in libp2p 0.8.1, among others: a peer's
            # bytes must not end the host, so this boundary takes everything and says so.
            log.warning("an inbound stream of %s failed", node_id, exc_info=True)
            await finish(stream, done=False)
        finally:
            self._streams[node_id] -= 1
            if not self._streams[node_id]:
                del self._streams[node_id]


class _Notifee(INotifee):
    """Tells the Host who came and went."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def connected(self, network: Any, conn: Any) -> None:
        self._host.on_connected(NodeId(str(conn.muxed_conn.peer_id)))

    async def disconnected(self, network: Any, conn: Any) -> None:
        node_id = NodeId(str(conn.muxed_conn.peer_id))
        if not self._host.is_connected(node_id):
            self._host.idle.forget(node_id)
            self._host.on_disconnected(node_id)

    async def opened_stream(self, network: Any, stream: Any) -> None:
        """Nothing to do."""

    async def closed_stream(self, network: Any, stream: Any) -> None:
        """Nothing to do."""

    async def listen(self, network: Any, multiaddr: Any) -> None:
        """Nothing to do."""

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        """Nothing to do."""


@asynccontextmanager
async def open_host(
    identity: NodeIdentity,
    listen_host: str,
    listen_port: int,
    *,
    serve: Serve,
    request_bytes_max: int,
    frame_s_max: float = FRAME_S_MAX,
) -> AsyncIterator[Host]:
    """Listen and run a host until the block ends; Conflict when the port is taken."""
    listen_port = _check_port(listen_host, listen_port)
    # libp2p logs every broken connection as an error; ours are logged here, once, with the peer's name.
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)
    private = Ed25519PrivateKey.new(identity.seed())
    network: Any = libp2p.new_swarm(
        key_pair=KeyPair(private, private.get_public_key()),
        muxer_opt=muxer.MUXERS,
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            max_connections=CONNECTIONS_MAX,
            high_watermark=CONNECTIONS_MAX,
            min_connections=0,
            low_watermark=0,
            max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
            dial_timeout=DIAL_S_MAX,
        ),
    )
    muxer.install(network)
    network.set_resource_manager(None)
    network.auto_connector.maybe_connect = _nothing
    network._do_handle_inbound_connection = _inbound_handler(network)
    basic: Any = BasicHost(network=network, disable_identify_address_discovery=True)
    basic._schedule_identify = _ignore_identify
    host = Host(basic, serve, request_bytes_max, frame_s_max)
    basic.set_stream_handler(PROTOCOL, host.handle)
    network.set_stream_handler(host.accept)
    network.register_notifee(_Notifee(host))
    kind = "ip6" if ":" in listen_host else "ip4"
    multiaddr = Multiaddr(f"/{kind}/{listen_host}/tcp/{listen_port}")
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_run_until, basic, network, multiaddr, stop)
        listens = bool(basic.get_transport_addrs())
        try:
            if listens:
                yield host
        finally:
            host.on_connected = host.on_disconnected = host.on_offence = _ignore
            stop.set()
    if not listens:
        raise Conflict(f"Cannot listen on {listen_host}:{listen_port}; choose another port for the control plane.")


async def _run_until(
    basic: Any, network: Any, multiaddr: Multiaddr, stop: trio.Event, *, task_status: Any = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the host until `stop` is set, then end it in order.

    Shielded, because cancellation must not reach libp2p's tasks: they would drop their sockets unclosed.
    """
    with trio.CancelScope(shield=True):
        async with basic.run([multiaddr]):
            task_status.started()
            await stop.wait()
            await _close(basic, network)


async def _close(basic: Any, network: Any) -> None:
    """End all connections at once, then the host: libp2p's own close takes 0.2 s a peer, one after the other."""
    with trio.move_on_after(CLOSE_S_MAX):
        async with trio.open_nursery() as nursery:
            for peer in list(network.connections):
                nursery.start_soon(network.close_peer, peer)
        await basic.close()


def _inbound_handler(network: Any) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """Swarm._do_handle_inbound_connection, except that it ends with its connection instead of with the host."""

    async def handle(read_write_closer: Any, multiaddr: Any, failure_event: Any) -> None:
        raw = RawConnection(read_write_closer, False)
        try:
            muxed = await network.upgrade_inbound_raw_conn(raw, multiaddr)
            await muxed.event_closed.wait()
        except STREAM_ERRORS as error:
            log.debug("an inbound connection failed: %s", cause(error))
            await read_write_closer.close()

    return handle


def _check_port(host: str, port: int) -> int:
    """The port to listen on, chosen when it is 0. Conflict when somebody listens there: libp2p would not notice."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(f"Port {port} on {host} is in use; choose another for the control plane.") from None
            raise Conflict(f"Cannot listen on {host}:{port}: {error.strerror}.") from None
        return int(probe.getsockname()[1])


async def _resolve(address: ControlAddress) -> list[Multiaddr]:
    """The addresses to dial. Names go through the system's resolver: libp2p's own does not know /etc/hosts."""
    if address.kind in ("ip4", "ip6"):
        return [Multiaddr(f"/{address.kind}/{address.host}/tcp/{address.port}")]
    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6, "dns": socket.AF_UNSPEC}
    try:
        found = await trio.socket.getaddrinfo(
            address.host, address.port, family=families[address.kind], type=socket.SOCK_STREAM
        )
    except OSError as error:
        raise Busy(f"{address}: the name {address.host} does not resolve: {error.strerror}.") from None
    return [
        Multiaddr(f"/{'ip6' if family == socket.AF_INET6 else 'ip4'}/{where[0]}/tcp/{address.port}")
        for family, _, _, _, where in found[:RESOLVED_ADDRESSES_MAX]
    ]


def _ignore(_node_id: NodeId, _reason: str = "") -> None:
    """No listener is set."""


def _ignore_identify(_peer: Any, *, reason: str) -> None:
    """Identify stays off; see the module's docstring."""


async def _nothing() -> None:
    """The auto-connector stays off; see the module's docstring."""
