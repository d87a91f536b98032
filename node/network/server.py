"""The data plane's server: pieces, manifests and what is here of a shard, to members of the ledger; to strangers, which
are nodes that are no members, what is public.

Owns the listening socket, admission and the bounds on connections. Over TLS; in clear only if it is told to. Each
connection has a worker thread, because blocking sockets move several times the bytes a second that trio's TLS does.
Knows no ledger: who is a member and what is public is asked of functions, at every request, so that a node removed from
the ledger is cut off at once, and a stranger from what is public no longer.
"""

import errno
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from contracts.errors import BadPeer, Busy, Conflict, Corrupt, NotAllowed, NotFound, Refused
from contracts.types import PIECE_SIZE, ManifestHash, NodeId, ShardHash
from node.network import handshake
from node.network.askers import Askers
from node.network.identity import NodeIdentity
from node.network.pace import Pace, Share
from node.network.places import Places
from node.network.planes import Packer
from node.network.ports import StartedPort
from node.network.shelf import Shelf, StorePort
from node.network.wire import (
    Channel,
    DataLimits,
    GetHave,
    GetManifest,
    GetPieces,
    Have,
    Proof,
    Status,
    detach,
    run_blocking,
)

log = logging.getLogger(__name__)

STRANGERS: Final = "strangers"
"""All of them share what goes out as one member does."""


@dataclass(frozen=True, slots=True)
class DataServerStatistics:
    """The server at one moment; totals since it was made. `bytes_served` are those of pieces and manifests;
    `bytes_saved` of them did not go out, because pieces went packed."""

    connections: int
    handshakes: int
    bytes_served: int
    bytes_saved: int
    pieces_served: int
    pieces_packed: int
    manifests_served: int
    connections_refused: int
    pieces_damaged: int


class DataServer:
    """Build it, then `await nursery.start(server.run)`; cancel the nursery to stop it."""

    def __init__(
        self,
        identity: NodeIdentity,
        store: StorePort,
        *,
        is_member: Callable[[NodeId], bool],
        listen_host: str,
        listen_port: int,
        on_damage: Callable[[ShardHash, int], None] | None = None,
        on_asked: Callable[[ShardHash, NodeId], None] = lambda shard_hash, node_id: None,
        coming: Callable[[ShardHash], bytes] = lambda shard_hash: b"",
        public: Callable[[], Set[bytes]] = frozenset,
        limits: DataLimits | None = None,
        pace: Pace | None = None,
        compression: bool = True,
        plain: bool = False,
    ) -> None:
        """Without `compression` every piece goes out as it is; `plain`: in clear instead of over TLS. Called in worker
        threads: `is_member`; `on_damage` (a piece of a held shard is not what it should be; it was not served);
        `on_asked` (a member wants to know what is here of a shard: it fetches it); `coming` (what this node has asked
        others for, as bits); `public` (the hashes of manifests and shards that strangers are served too)."""
        self._identity = identity
        self._shelf = Shelf(store)
        self._is_member = is_member
        self._on_damage = on_damage
        self._on_asked = on_asked
        self._coming = coming
        self._public = public
        self._listen = (listen_host, listen_port)
        self._limits = limits or DataLimits()
        self._pace = pace or Pace(0)
        self._askers = Askers()
        self._compression = compression
        self._packers = threading.Semaphore(self._limits.packers_max)
        self._context = None if plain else identity.server_context()
        self._lock = threading.Lock()  # guards everything below; threads and trio both count
        self._places = Places(self._limits, self._pace.bytes_per_s)
        self._bytes_served = 0
        self._bytes_saved = 0
        self._pieces_served = 0
        self._pieces_packed = 0
        self._manifests_served = 0
        self._connections_refused = 0
        self._pieces_damaged = 0

    def statistics(self) -> DataServerStatistics:
        with self._lock:
            return DataServerStatistics(
                connections=self._places.connections,
                handshakes=self._places.handshakes,
                bytes_served=self._bytes_served,
                bytes_saved=self._bytes_saved,
                pieces_served=self._pieces_served,
                pieces_packed=self._pieces_packed,
                manifests_served=self._manifests_served,
                connections_refused=self._connections_refused,
                pieces_damaged=self._pieces_damaged,
            )

    async def run(self, *, task_status: StartedPort = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until cancelled. Started (with the port) once it listens; Conflict: port in use."""
        host, port = self._listen
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Conflict(f"Port {port} on {host} is in use; choose another for the data plane.") from None
            raise Conflict(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from None
        port = listeners[0].socket.getsockname()[1]
        log.info("data plane listens on %s:%d", host, port)
        if self._context is None:
            log.warning(
                "pieces are served over plain TCP (network.plain_tcp): "
                "who can read or alter the network's packets sees the models' bytes"
            )
        task_status.started(port)
        await trio.serve_listeners(self._accept, listeners)

    async def _accept(self, stream: trio.SocketStream) -> None:
        sock = detach(stream)
        try:
            address: str = sock.getpeername()[0]
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        except OSError as error:  # it is gone already
            log.debug("a connection ended before it began: %s", error)
            sock.close()
            return
        with self._lock:
            has_room = self._places.enter_handshake(address)
            self._connections_refused += not has_room
        if not has_room:
            sock.close()
            return
        share = Share(self._pace)
        try:
            await run_blocking(sock, functools.partial(self._serve, sock, share, address), wake=share.close)
        except Exception:
            # Whatever a stranger's bytes bring about in here must not end the node: this boundary takes it and says so.
            log.exception("a data connection from %s failed", address)

    # Everything below runs in the connection's worker thread.

    def _serve(self, sock: socket.socket, share: Share, address: str) -> None:
        channel = Channel(sock)
        try:
            try:
                node_id, is_member = self._admit(channel)
            finally:
                with self._lock:
                    self._places.leave_handshake(address)
            try:
                self._serve_node(channel, share, node_id)
            finally:
                with self._lock:
                    self._places.leave(node_id, is_member)
        except Busy as error:
            log.debug("a data connection ended: %s", error)
        except Refused as error:
            log.info("ended a data connection: %s", error)

    def _admit(self, channel: Channel) -> tuple[NodeId, bool]:
        """Challenge, proof, membership, room; when this returns, the node has a place: a member's, or a stranger's."""
        channel.within(self._limits.handshake_s)
        nonce = handshake.challenge(channel, self._identity, plain=self._context is None, packs=self._compression)
        with self._told(channel):
            node_id = handshake.check_proof(self._identity, channel.receive_frame(Proof), nonce)
            is_member = self._is_member(node_id)
            if not is_member and not self._public():
                raise NotAllowed(f"{node_id} is no member of this network; it joins with a signed transaction")
        try:
            with self._lock:
                self._places.take(node_id, is_member)
        except Busy as error:
            self._refuse(channel, Status.BUSY, error)
            raise
        return node_id, is_member

    def _check_may_have(self, node_id: NodeId, request: object) -> bool:
        """Whether who asks is a member. Raises NotAllowed for a stranger that asks for what is not public."""
        if self._is_member(node_id):
            return True
        if isinstance(request, GetManifest):
            kind, wanted = "manifest", request.manifest_hash
        else:
            assert isinstance(request, GetPieces | GetHave)
            kind, wanted = "shard", request.shard_hash
        if wanted not in self._public():
            raise NotAllowed(
                f"{node_id} is no member of this network, and the {kind} {wanted.hex()} is of no public model"
            )
        return False

    def _serve_node(self, channel: Channel, share: Share, node_id: NodeId) -> None:
        channel.send_part()
        while True:
            channel.within(self._limits.idle_s)
            with self._told(channel):
                request = channel.receive_frame(GetManifest, GetPieces, GetHave)
                is_member = self._check_may_have(node_id, request)
                share.name = node_id if is_member else STRANGERS
                match request:
                    case GetManifest():
                        self._send_manifest(channel, ManifestHash(request.manifest_hash))
                    case GetPieces():
                        if is_member:
                            self._note_given(request)
                        self._send_pieces(channel, share, request)
                    case GetHave() if is_member:
                        self._send_have(channel, node_id, ShardHash(request.shard_hash))
                    case GetHave():
                        self._tell_stranger(channel, ShardHash(request.shard_hash))

    def _send_manifest(self, channel: Channel, manifest_hash: ManifestHash) -> None:
        data = self._shelf.manifest_bytes(manifest_hash)
        channel.within(self._limits.piece_s + len(data) / (1 << 20) * self._limits.piece_s)
        channel.send_part(data)
        with self._lock:
            self._manifests_served += 1
            self._bytes_served += len(data)

    def _send_have(self, channel: Channel, node_id: NodeId, shard_hash: ShardHash) -> None:
        """What is here of a shard, and who else asked for it lately: so those who fetch it find each other."""
        self._on_asked(shard_hash, node_id)  # also when nothing has come yet: then each knows that it is not alone
        bits = self._shelf.have(shard_hash)
        with self._lock:
            others = self._askers.others(shard_hash, node_id, time.monotonic())
            given = self._askers.given(shard_hash)
        channel.within(self._limits.piece_s)
        coming = self._coming(shard_hash) if bits else b""
        channel.send_part(msgspec.msgpack.encode(Have(bits, coming, others, given)))

    def _tell_stranger(self, channel: Channel, shard_hash: ShardHash) -> None:
        """What is here of a shard. Nobody is sent to a stranger for it, nor it to who fetches the same."""
        bits = self._shelf.have(shard_hash)
        channel.within(self._limits.piece_s)
        channel.send_part(msgspec.msgpack.encode(Have(bits, b"", ())))

    def _note_given(self, request: GetPieces) -> None:
        """What a member has others need not ask of this node; what a stranger has they cannot get from it."""
        shard_hash = ShardHash(request.shard_hash)
        pieces, piece_count = range(request.first, request.first + request.count), self._shelf.piece_count(shard_hash)
        with self._lock:
            self._askers.gave(shard_hash, pieces, piece_count)

    def _send_pieces(self, channel: Channel, share: Share, request: GetPieces) -> None:
        shard_hash, buffer, packer = ShardHash(request.shard_hash), bytearray(PIECE_SIZE), Packer()
        for index in range(request.first, request.first + request.count):
            try:
                piece = self._shelf.piece(shard_hash, index, buffer)
            except Corrupt:
                with self._lock:
                    self._pieces_damaged += 1
                if self._on_damage is not None:
                    self._on_damage(shard_hash, index)
                raise
            packed = self._pack(packer, piece) if request.may_pack(index) else None
            data, status = (piece, Status.DATA) if packed is None else (packed, Status.PACKED)
            share.take(len(data))
            channel.within(self._limits.piece_s)
            channel.send_part(data, status)
            with self._lock:
                self._pieces_served += 1
                self._pieces_packed += status == Status.PACKED
                self._bytes_served += len(piece)
                self._bytes_saved += len(piece) - len(data)

    def _pack(self, packer: Packer, piece: memoryview) -> bytes | None:
        """The piece packed; None when it hardly shrinks, and when others are packing: waiting for them gains nothing,
        and what is not packed counts in full against the limit on what goes out."""
        if not self._compression or not self._packers.acquire(blocking=False):
            return None
        try:
            return packer.pack(piece)
        finally:
            self._packers.release()

    @contextmanager
    def _told(self, channel: Channel) -> Iterator[None]:
        """Tell the client why its request is refused. It may ask for something else after NotFound, nothing else."""
        try:
            yield
        except NotFound as error:
            channel.send_reason(Status.NOT_FOUND, str(error))
        except Corrupt as error:
            # Our own disk: the file's name is nobody's business, and a repair may mend it.
            log.warning("not served: %s", error)
            channel.send_reason(Status.NOT_FOUND, "damaged here, and about to be repaired")
        except NotAllowed as error:
            self._refuse(channel, Status.NOT_ALLOWED, error)
            raise
        except BadPeer as error:
            self._refuse(channel, Status.MALFORMED, error)
            raise

    def _refuse(self, channel: Channel, status: Status, error: Refused) -> None:
        with self._lock:
            self._connections_refused += 1
        channel.within(self._limits.handshake_s)
        channel.send_reason(status, str(error))
