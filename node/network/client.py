"""The data plane's client: one blocking connection to one node, its key pinned, this node proved to it.

Knows the wire; not where pieces go nor whom to ask next (`fetcher` does).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, ManifestHash, NodeId, ShardHash
from node.network.addresses import DataAddress
from node.network.identity import NodeIdentity, client_context, node_id_of_certificate
from node.network.wire import (
    Challenge,
    Channel,
    DataLimits,
    GetManifest,
    GetPieces,
    Proof,
    detach,
    piece_bytes,
    proof_bytes,
    run_blocking,
)

T = TypeVar("T")

_context: Final = client_context()


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A node that serves pieces, and where."""

    node_id: NodeId
    address: DataAddress

    def __str__(self) -> str:
        return f"{self.node_id} at {self.address}"


class PeerConnection:
    """An admitted connection. All methods block; what they raise is the peer's doing: Busy, or BadPeer."""

    def __init__(self, channel: Channel, source: PeerSource, limits: DataLimits) -> None:
        self._channel = channel
        self._source = source
        self._limits = limits

    def open(self, identity: NodeIdentity) -> None:
        """TLS, check who answers, prove who asks."""
        channel = self._channel
        channel.within(self._limits.handshake_s)
        certificate = channel.handshake()
        answering = node_id_of_certificate(certificate) if certificate else None
        if answering != self._source.node_id:
            raise BadPeer(f"another node answers there: {answering}")
        challenge = channel.receive_frame(Challenge)
        signature = identity.sign(proof_bytes(self._source.node_id, identity.node_id, challenge.nonce))
        channel.send_frame(Proof(identity.node_id, signature))
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

    def pieces(self, shard_hash: ShardHash, size_bytes: int, first: int, count: int) -> Iterator[memoryview]:
        """Pieces in order; each is valid until the next is taken."""
        self._channel.within(self._limits.piece_s)
        self._channel.send_frame(GetPieces(shard_hash, first, count))
        buffer = memoryview(bytearray(PIECE_SIZE))
        for index in range(first, first + count):
            piece = buffer[: piece_bytes(size_bytes, index)]
            self._channel.within(self._limits.piece_s)
            size = self._channel.receive_part()
            if size != len(piece):
                raise BadPeer(f"offers {size:,} bytes for piece {index}, which has {len(piece):,}")
            self._channel.receive_into(piece)
            yield piece


async def with_connection(
    source: PeerSource, identity: NodeIdentity, limits: DataLimits, use: Callable[[PeerConnection], T]
) -> T:
    """Connect, run `use` in a worker thread, and close, whatever happens. Cancellation ends the transfer at once."""
    try:
        with trio.fail_after(limits.connect_s):
            stream = await trio.open_tcp_stream(source.address.host, source.address.port)
    except trio.TooSlowError:
        raise Busy(f"no connection within {limits.connect_s:.0f} s") from None
    except OSError as error:
        raise Busy(f"no connection: {_reason(error)}") from None
    sock = detach(stream)
    try:
        tls = _context.wrap_socket(sock, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise Busy(f"no connection: {_reason(error)}") from None
    connection = PeerConnection(Channel(tls), source, limits)

    def run() -> T:
        connection.open(identity)
        return use(connection)

    return await run_blocking(tls, run)


def _reason(error: OSError) -> str:
    """trio raises one OSError for all addresses it tried; the first of theirs says why."""
    nested = error.__cause__
    if isinstance(nested, BaseExceptionGroup):
        nested = nested.exceptions[0]
    inner = nested if isinstance(nested, OSError) else error
    return inner.strerror or str(inner)
