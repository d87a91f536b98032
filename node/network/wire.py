"""The data plane's wire format and its blocking channel: TLS, frames, parts, deadlines.

One connection, seen from the client: TLS 1.3 (the server's key is pinned), the server's Challenge, the client's Proof,
one part that admits or refuses; then any number of requests, each answered by parts. A request is a frame: 4 bytes
length, MessagePack. A part is 1 byte status, 4 bytes length, that many raw bytes: a piece, a manifest, or the reason
when the status is not DATA, which also ends the answer. Knows no store and no ledger.
"""

import contextlib
import enum
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final, TypeVar

import msgspec
import outcome
import trio
from msgspec import Meta, Struct

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, NodeId
from node.network.identity import NODE_ID_CHARS_MAX

T = TypeVar("T")

FRAME_BYTES_MAX: Final = 1024
"""Requests name one hash and two numbers."""
REASON_BYTES_MAX: Final = 512
PIECES_PER_REQUEST_MAX: Final = 1024
NONCE_BYTES: Final = 32

_FRAME: Final = struct.Struct(">I")
_PART: Final = struct.Struct(">BI")
_PROOF_DOMAIN: Final = b"aigen data plane 1"


class Status(enum.IntEnum):
    """What a part holds: data, or a reason."""

    DATA = 0
    NOT_FOUND = 1
    NOT_ALLOWED = 2
    BUSY = 3
    MALFORMED = 4


Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Index = Annotated[int, Meta(ge=0, lt=2**32)]


class Challenge(Struct, frozen=True, tag=True):
    """The server's first frame."""

    nonce: Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class Proof(Struct, frozen=True, tag=True):
    """The client's answer: who it is, and its signature over `proof_bytes`."""

    node_id: Annotated[str, Meta(max_length=NODE_ID_CHARS_MAX)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class GetManifest(Struct, frozen=True, tag=True):
    """Answered by one part."""

    manifest_hash: Hash


class GetPieces(Struct, frozen=True, tag=True):
    """Pieces `first` to `first + count - 1` of a shard; answered by one part for each, in order."""

    shard_hash: Hash
    first: Index
    count: Annotated[int, Meta(ge=1, le=PIECES_PER_REQUEST_MAX)]


Frame = Challenge | Proof | GetManifest | GetPieces
_frames = msgspec.msgpack.Decoder(Frame)


def proof_bytes(server: NodeId, client: NodeId, nonce: bytes) -> bytes:
    """What a client signs. The server's name is in it, so no server can pass the proof on to another."""
    return b"\0".join((_PROOF_DOMAIN, server.encode(), client.encode(), nonce))


@dataclass(frozen=True, slots=True)
class DataLimits:
    """Bounds of the data plane; tests lower them."""

    connections_max: int = 64
    handshakes_max: int = 64
    """Connections not yet admitted: anybody may open one."""
    handshakes_per_address_max: int = 16
    """Of these from one address, so that no single stranger shuts the others out."""
    connections_per_peer_max: int = 8
    connect_s: float = 10.0
    handshake_s: float = 10.0
    idle_s: float = 60.0
    piece_s: float = 30.0
    """The longest a piece may take, which makes the slowest acceptable source about 35 kB/s."""


class Channel:
    """Frames and parts over a TLS socket in blocking mode. One thread uses it; another may shut the socket down.

    `within` sets the deadline of what follows. Everything that ends a connection is Busy with the reason: lost,
    closed, too slow. What a correct peer would not send is BadPeer.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock
        self._deadline = 0.0
        self._seconds = 0.0

    def within(self, seconds: float) -> None:
        """From now on `seconds` are left, until this is called again."""
        # A socket's timeout covers one call; the deadline, checked after each, stops a peer that drips.
        self._socket.settimeout(seconds)
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def handshake(self) -> bytes | None:
        """TLS; returns the other side's certificate (DER) if it showed one."""
        with self._lost_is_busy("the TLS handshake"):
            self._socket.do_handshake()
            return self._socket.getpeercert(binary_form=True)

    def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with self._lost_is_busy("sending"):
            while view:
                view = view[self._socket.send(view) :]
                self._check_deadline(len(view))

    def receive_into(self, view: memoryview) -> None:
        size = len(view)
        with self._lost_is_busy("receiving"):
            while view:
                count = self._socket.recv_into(view)
                if not count:
                    raise Busy(f"the connection was closed after {size - len(view):,} of {size:,} bytes")
                view = view[count:]
                self._check_deadline(len(view))

    def send_frame(self, frame: Frame) -> None:
        data = msgspec.msgpack.encode(frame)
        assert len(data) <= FRAME_BYTES_MAX
        self.send(_FRAME.pack(len(data)) + data)

    def receive_frame(self, *kinds: type[T]) -> T:
        """A frame of one of these kinds."""
        (size,) = _FRAME.unpack(self._receive(_FRAME.size))
        if size > FRAME_BYTES_MAX:
            raise BadPeer(f"a frame of {size:,} bytes, over the limit of {FRAME_BYTES_MAX:,}")
        try:
            frame = _frames.decode(self._receive(size))
        except (msgspec.MsgspecError, RecursionError) as error:
            raise BadPeer(f"a frame of {size:,} bytes that is none: {error}") from None
        if not isinstance(frame, kinds):
            raise BadPeer(f"a {type(frame).__name__} out of turn")
        return frame

    def send_part(self, data: bytes | memoryview = b"") -> None:
        self.send(_PART.pack(Status.DATA, len(data)))
        self.send(data)

    def send_reason(self, status: Status, reason: str) -> None:
        data = reason.encode()[:REASON_BYTES_MAX]
        self.send(_PART.pack(status, len(data)) + data)

    def receive_part(self) -> int:
        """The size of the data that follows; Busy with the peer's reason when it sends one instead."""
        status, size = _PART.unpack(self._receive(_PART.size))
        if status == Status.DATA:
            return int(size)
        if status not in Status.__members__.values() or size > REASON_BYTES_MAX:
            raise BadPeer(f"a part of status {status} and {size:,} bytes, which nothing here sends")
        raise Busy(f"it refuses: {self._receive(size).decode(errors='replace')}")

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        self.receive_into(memoryview(data))
        return bytes(data)

    def _check_deadline(self, left_bytes: int) -> None:
        if left_bytes and time.monotonic() > self._deadline:
            raise Busy(f"too slow: {left_bytes:,} bytes were still to come after {self._seconds:.1f} s")

    @contextlib.contextmanager
    def _lost_is_busy(self, doing: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise Busy(f"{doing} stalled for {self._seconds:.1f} s") from None
        except OSError as error:
            raise Busy(f"{doing} failed: {error.strerror or error}") from None


async def run_blocking(sock: socket.socket, function: Callable[[], T]) -> T:
    """Run a function that uses `sock` in a worker thread, then close `sock`.

    A blocked thread cannot be cancelled, but its socket can be shut down, and then it ends by itself. So when this
    is cancelled it leaves neither a thread nor a socket behind.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_shut_down_at_end, sock)
            with trio.CancelScope(shield=True):
                # Its own limiter: the callers bound how many there are, and waiting for a token could not be cancelled.
                result = await trio.to_thread.run_sync(outcome.capture, function, limiter=trio.CapacityLimiter(1))
            nursery.cancel_scope.cancel()
    finally:
        sock.close()
    return result.unwrap()


async def _shut_down_at_end(sock: socket.socket) -> None:
    try:
        await trio.sleep_forever()
    finally:
        # Not SSLSocket.shutdown: that drops the TLS layer first, and the other thread's next bytes would go in clear.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def detach(stream: trio.SocketStream) -> socket.socket:
    """The plain socket under a trio stream, which is of no use afterwards."""
    family, kind, protocol = stream.socket.family, stream.socket.type, stream.socket.proto
    return socket.socket(family, kind, protocol, fileno=stream.socket.detach())


def piece_bytes(size_bytes: int, index: int) -> int:
    """The size of piece `index` of a shard of `size_bytes`."""
    return min(PIECE_SIZE, size_bytes - index * PIECE_SIZE)
