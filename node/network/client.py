"""The data plane's client: one blocking connection to one node, its key pinned, this node proved to it.

Over TLS; in clear only to where the ledger says so, and only if the caller takes that. Knows the wire; not where pieces
go nor whom to ask next (`fetcher` does).
"""

import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.network import handshake
from node.network.identity import NodeIdentity, client_context
from node.network.planes import Unpacker
from node.network.sources import PeerSource
from node.network.wire import (
    Channel,
    DataLimits,
    GetHave,
    GetManifest,
    GetPieces,
    Have,
    decode_have,
    dial,
    have_bytes_max,
    packed_bits,
    piece_bytes,
    run_on,
)

T = TypeVar("T")

_context: Final = client_context()


class PeerConnection:
    """An admitted connection. All methods but `run` block, and are for it; what they raise is the peer's doing: Busy,
    or BadPeer."""

    def __init__(self, sock: socket.socket, source: PeerSource, limits: DataLimits) -> None:
        self._socket = sock
        self._channel = Channel(sock)
        self._source = source
        self._limits = limits
        self._unpacker = Unpacker()
        self.packs = False
        """Whether the peer packs pieces where it may."""

    async def run(self, function: Callable[[], T], wake: Callable[[], None] = lambda: None) -> T:
        """Use the connection in a worker thread. Cancellation ends the transfer at once, and the connection."""
        return await run_on(self._socket, function, wake)

    def open(self, identity: NodeIdentity) -> None:
        """Check who answers, prove who asks."""
        channel, source = self._channel, self._source
        channel.within(self._limits.handshake_s)
        self.packs = handshake.prove(channel, identity, source.node_id, plain=source.address.plain).packs
        if channel.receive_part():
            raise BadPeer("sent data where it only admits")

    def manifest(self, manifest_hash: ManifestHash, bytes_max: int) -> bytes:
        """The bytes the peer gives for a manifest; the caller checks their hash."""
        self._channel.within(self._limits.piece_s)
        self._channel.send_frame(GetManifest(manifest_hash))
        size = self._channel.receive_part()
        if size > bytes_max:
            raise BadPeer(f"offers a manifest of {size:,} bytes, over the limit of {bytes_max:,}")
        data = bytearray()
        for first in range(0, size, PIECE_SIZE):  # grown as it arrives: a mere claim of size takes no memory
            chunk = bytearray(min(PIECE_SIZE, size - first))
            self._channel.within(self._limits.piece_s)
            self._channel.receive_into(memoryview(chunk))
            data += chunk
        return bytes(data)

    def have(self, shard_hash: ShardHash, piece_count: int) -> Have:
        """What the peer has of a shard by now."""
        self._channel.within(self._limits.piece_s)
        self._channel.send_frame(GetHave(shard_hash))
        size = self._channel.receive_part()
        if size > have_bytes_max(piece_count):
            raise BadPeer(f"takes {size:,} bytes to say which of {piece_count:,} pieces it has")
        data = bytearray(size)
        self._channel.receive_into(memoryview(data))
        return decode_have(bytes(data))

    def pieces(
        self,
        shard_hash: ShardHash,
        size_bytes: int,
        first: int,
        count: int,
        packed: Sequence[bool] = (),
        expect: Callable[[int], None] = lambda size_bytes: None,
    ) -> Iterator[memoryview]:
        """Pieces in order; each is valid until the next is taken. Those may come packed for which `packed` says so.
        `expect` is called before each, with the bytes that it takes on the wire, and may wait."""
        self._channel.within(self._limits.piece_s)
        self._channel.send_frame(GetPieces(shard_hash, first, count, packed_bits(packed)))
        buffer = memoryview(bytearray(PIECE_SIZE))
        packed_buffer = memoryview(bytearray(PIECE_SIZE if any(packed) else 0))
        for at in range(count):
            piece = buffer[: piece_bytes(size_bytes, first + at)]
            self._channel.within(self._limits.piece_s)
            is_packed, size = self._channel.receive_piece_part()
            if is_packed:
                if not any(packed[at : at + 1]):
                    raise BadPeer(f"packs piece {first + at}, which was to come as it is")
                if not 0 < size < len(piece):
                    raise BadPeer(f"packs the {len(piece):,} bytes of piece {first + at} in {size:,}")
            elif size != len(piece):
                raise BadPeer(f"offers {size:,} bytes for piece {first + at}, which has {len(piece):,}")
            expect(size)
            self._channel.within(self._limits.piece_s)
            came = packed_buffer[:size] if is_packed else piece
            self._channel.receive_into(came)
            if is_packed:
                self._unpack(first + at, came, piece)
            yield piece

    def _unpack(self, index: int, packed: memoryview, piece: memoryview) -> None:
        try:
            self._unpacker.unpack(packed, piece)
        except BadPeer as error:
            raise BadPeer(f"piece {index} {error}") from None


@asynccontextmanager
async def connected(
    source: PeerSource, identity: NodeIdentity, limits: DataLimits, *, plain: bool = False
) -> AsyncIterator[PeerConnection]:
    """An admitted connection to a peer, closed at the end whatever happens. Without `plain` none is made in clear.
    Raises Busy, or BadPeer."""
    if source.address.plain and not plain:
        raise BadPeer("it serves over plain TCP, where this node goes only with network.plain_tcp = true")
    sock = await dial(source.address.host, source.address.port, limits)
    try:
        if not source.address.plain:
            sock = _context.wrap_socket(sock, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise Busy(f"no connection: {error.strerror or error}") from None
    try:
        connection = PeerConnection(sock, source, limits)
        await connection.run(lambda: connection.open(identity))
        yield connection
    finally:
        sock.close()
