"""The data plane's wire format and its blocking channel: TLS, frames, parts, deadlines.

One connection, seen from the client: TLS 1.3 (the server's key is pinned), or in clear its own Greeting and one part
(see `handshake`); the server's Challenge, the client's Proof, one part that admits or refuses; then any number of
requests, each answered by parts. A request is a frame: 4 bytes length, MessagePack. A part is 1 byte status, 4 bytes
length, that many raw bytes: a piece, a manifest, a packed piece when the status is PACKED, or the reason when it is
another, which also ends the answer.

Packing (see `planes`) is agreed on for each connection: the server says in its Challenge that it can, the client says
with each request which pieces may come packed, and the server packs those of them that shrink. Who does not know of it
says nothing and passes over what the other says: then pieces come as they are.

Knows no store and no ledger. (`web` speaks HTTP over the same channel.)
"""

import contextlib
import enum
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator
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
"""Requests name one hash, two numbers and a bit for each piece."""
REASON_BYTES_MAX: Final = 512
PIECES_PER_REQUEST_MAX: Final = 1024
NONCE_BYTES: Final = 32
OTHERS_MAX: Final = 16

_FRAME: Final = struct.Struct(">I")
_PART: Final = struct.Struct(">BI")
_PROOF_DOMAIN: Final = b"aigen data plane 1"
_SERVER_PROOF_DOMAIN: Final = b"aigen data plane 1, server in clear"
_NO_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "TLSV1_ALERT_PROTOCOL_VERSION"})
"""What OpenSSL calls it when something else is spoken."""


class Status(enum.IntEnum):
    """What a part holds: data, a packed piece, or a reason."""

    DATA = 0
    NOT_FOUND = 1
    NOT_ALLOWED = 2
    BUSY = 3
    MALFORMED = 4
    PACKED = 5


Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Index = Annotated[int, Meta(ge=0, lt=2**32)]


class NotThere(Busy):
    """The other side does not have what it was asked for. The connection goes on."""


class Greeting(Struct, frozen=True, tag=True):
    """The client's first frame in clear; answered by an empty part."""

    nonce: Nonce


class Challenge(Struct, frozen=True, tag=True):
    """The server's first frame."""

    nonce: Nonce
    packs: bool = False
    """It sends pieces packed to whoever takes them so."""
    signature: Annotated[bytes, Meta(max_length=64)] = b""
    """In clear: the server's own, over `server_proof_bytes`."""


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
    packed: Annotated[bytes, Meta(max_length=PIECES_PER_REQUEST_MAX // 8)] = b""
    """Bit i % 8 of byte i // 8: piece `first` + i may come packed."""

    def may_pack(self, index: int) -> bool:
        """Whether piece `index` of the shard may come packed."""
        return bool(int.from_bytes(self.packed, "little") >> (index - self.first) & 1)


class GetHave(Struct, frozen=True, tag=True):
    """Which pieces of a shard are there; answered by one part: a `Have`."""

    shard_hash: Hash


class Have(Struct, frozen=True):
    """What a node has of a shard. MessagePack in a part."""

    bits: bytes
    """Bit i % 8 of byte i // 8 is piece i; empty: all of them."""
    coming: bytes
    """The same of pieces it has asked others for; empty: none."""
    others: Annotated[tuple[Annotated[str, Meta(max_length=NODE_ID_CHARS_MAX)], ...], Meta(max_length=OTHERS_MAX)]
    """Some nodes that asked for this shard lately: they have, or will have, pieces of it too."""
    given: bytes = b""
    """The same of pieces that it was asked for lately, by whomever; empty: none. Who asks for others spares it from
    giving the same twice while there is something that nobody else has."""


Frame = Greeting | Challenge | Proof | GetManifest | GetPieces | GetHave
_frames = msgspec.msgpack.Decoder(Frame)
_have = msgspec.msgpack.Decoder(Have)


def packed_bits(packed: Iterable[bool]) -> bytes:
    """What `GetPieces.packed` is, from one truth for each piece."""
    bits = sum(1 << at for at, may in enumerate(packed) if may)
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def decode_have(data: bytes) -> Have:
    try:
        return _have.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadPeer(f"{len(data):,} bytes that do not say what it has: {error}") from None


def have_bytes_max(piece_count: int) -> int:
    """The longest encoding of a `Have` about a shard of so many pieces."""
    return 3 * (piece_count // 8) + OTHERS_MAX * (NODE_ID_CHARS_MAX + 8) + 64


def proof_bytes(server: NodeId, client: NodeId, nonce: bytes) -> bytes:
    """What a client signs. The server's name is in it, so no server can pass the proof on to another."""
    return b"\0".join((_PROOF_DOMAIN, server.encode(), client.encode(), nonce))


def server_proof_bytes(server: NodeId, greeting: bytes, challenge: bytes) -> bytes:
    """What a server signs in clear: the nonce of the client's that shows it is there now, and its own, so that nobody
    between can have the client sign another."""
    return b"\0".join((_SERVER_PROOF_DOMAIN, server.encode(), greeting, challenge))


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
    """The longest that a piece may be waited for, and then take: the slowest acceptable source makes about 35 kB/s."""
    packers_max: int = max(1, (os.cpu_count() or 1) // 2)
    """Pieces packed at once, for all connections together: beyond that they go out as they are, so that nobody's
    requests can take all cores."""


class Channel:
    """Bytes, frames and parts over a socket in blocking mode. One thread uses it; another may shut the socket down.

    `within` sets the deadline of what follows. Everything that ends a connection is Busy with the reason: lost,
    closed, too slow. What a correct peer would not send is BadPeer.
    """

    def __init__(self, sock: socket.socket) -> None:
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
        assert isinstance(self._socket, ssl.SSLSocket)
        with self._lost_is_busy("the TLS handshake"):
            try:
                self._socket.do_handshake()
            except ssl.SSLError as error:
                if error.reason in _NO_TLS:
                    raise Busy("no TLS is spoken there, perhaps plain TCP") from None
                raise
            return self._socket.getpeercert(binary_form=True)

    # Before TLS, where it is to come: on the plain socket beneath.

    def first_byte(self) -> int:
        """What the other side begins with, left where it is."""
        with self._lost_is_busy("receiving"):
            data = socket.socket.recv(self._socket, 1, socket.MSG_PEEK)
        if not data:
            raise Busy("the connection was closed before anything was said")
        return data[0]

    def refuse_in_clear(self, reason: str) -> None:
        """Tell somebody who began in clear. What it sent is taken first: with that unread, closing would destroy what
        was said."""
        with self._lost_is_busy("refusing"):
            socket.socket.recv(self._socket, FRAME_BYTES_MAX)
            socket.socket.sendall(self._socket, _reason_part(Status.MALFORMED, reason))

    def send(self, data: bytes | memoryview) -> None:
        view, size, done = memoryview(data), len(data), 0
        with self._lost_is_busy("sending"):
            while done < size:
                done += self._socket.send(view[done:])
                self._check_deadline(size - done)

    def receive_some(self, view: memoryview) -> int:
        """As much as is there, at least a byte; 0 at the end of the connection."""
        with self._lost_is_busy("receiving"):
            count = self._socket.recv_into(view)
        self._check_deadline(len(view) - count)
        return count

    def receive_into(self, view: memoryview) -> None:
        size, done = len(view), 0
        with self._lost_is_busy("receiving"):
            while done < size:
                # TLS hands out 16 kB at a time: what is done here is done 64 times for each piece.
                count = self._socket.recv_into(view[done:])
                if not count:
                    raise Busy(f"the connection was closed after {done:,} of {size:,} bytes")
                done += count
                self._check_deadline(size - done)

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

    def send_part(self, data: bytes | memoryview = b"", status: Status = Status.DATA) -> None:
        self.send(_PART.pack(status, len(data)))
        self.send(data)

    def send_reason(self, status: Status, reason: str) -> None:
        self.send(_reason_part(status, reason))

    def receive_part(self) -> int:
        """The size of the data that follows; Busy, or NotThere, with the peer's reason when it sends one instead."""
        is_packed, size = self.receive_piece_part()
        if is_packed:
            raise BadPeer(f"a packed piece of {size:,} bytes where none is due")
        return size

    def receive_piece_part(self) -> tuple[bool, int]:
        """As `receive_part`, where a piece may come packed: whether it does, and the size of what follows."""
        status, size = _PART.unpack(self._receive(_PART.size))
        if status in {Status.DATA, Status.PACKED}:
            return status == Status.PACKED, int(size)
        if status not in Status.__members__.values() or size > REASON_BYTES_MAX:
            raise BadPeer(f"a part of status {status} and {size:,} bytes, which nothing here sends")
        reason = f"it refuses: {self._receive(size).decode(errors='replace')}"
        raise NotThere(reason) if status == Status.NOT_FOUND else Busy(reason)

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


def _reason_part(status: Status, reason: str) -> bytes:
    data = reason.encode()[:REASON_BYTES_MAX]
    return _PART.pack(status, len(data)) + data


async def run_blocking(sock: socket.socket, function: Callable[[], T], wake: Callable[[], None] = lambda: None) -> T:
    """Run a function that uses `sock` in a worker thread, then close `sock`. See `run_on`."""
    try:
        return await run_on(sock, function, wake)
    finally:
        sock.close()


async def run_on(sock: socket.socket, function: Callable[[], T], wake: Callable[[], None] = lambda: None) -> T:
    """Run a function that uses `sock` in a worker thread.

    A blocked thread cannot be cancelled, but its socket can be shut down, and then it ends by itself. So when this
    is cancelled it leaves no thread behind, and a socket of no more use. `wake` is called then too: it ends whatever
    else the thread may be waiting for.
    """
    at_work = True

    async def shut_down_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if at_work:
                # Not SSLSocket.shutdown: that drops the TLS layer first, and the other thread's next bytes would go in
                # clear.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
                wake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shut_down_when_cancelled)
        with trio.CancelScope(shield=True):
            # Its own limiter: the callers bound how many there are, and waiting for a token could not be cancelled.
            result = await trio.to_thread.run_sync(outcome.capture, function, limiter=trio.CapacityLimiter(1))
        at_work = False
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint_if_cancelled()  # what it failed with then is our doing
    return result.unwrap()


async def dial(host: str, port: int, limits: DataLimits) -> socket.socket:
    """A TCP connection as a plain socket. Raises Busy."""
    try:
        with trio.fail_after(limits.connect_s):
            return detach(await trio.open_tcp_stream(host, port))
    except trio.TooSlowError:
        raise Busy(f"no connection within {limits.connect_s:.0f} s") from None
    except OSError as error:
        raise Busy(f"no connection: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    """trio raises one OSError for all addresses it tried; the first of theirs says why."""
    nested = error.__cause__
    if isinstance(nested, BaseExceptionGroup):
        nested = nested.exceptions[0]
    inner = nested if isinstance(nested, OSError) else error
    return inner.strerror or str(inner)


def detach(stream: trio.SocketStream) -> socket.socket:
    """The plain socket under a trio stream, which is of no use afterwards."""
    family, kind, protocol = stream.socket.family, stream.socket.type, stream.socket.proto
    return socket.socket(family, kind, protocol, fileno=stream.socket.detach())


def piece_bytes(size_bytes: int, index: int) -> int:
    """The size of piece `index` of a shard of `size_bytes`."""
    return min(PIECE_SIZE, size_bytes - index * PIECE_SIZE)
