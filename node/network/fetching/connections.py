"""One connection to one source of a shard, whatever its kind: what it has, and pieces of it.

Knows the three kinds of sources and how each is asked; not which pieces, nor what becomes of them.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from contracts.errors import BadPeer, Busy
from contracts.types import PIECE_SIZE, ManifestHash, NodeId
from node.network.client import PeerConnection, connected
from node.network.fetching.chooser import Chooser
from node.network.identity import NodeIdentity
from node.network.sources import GatewaySource, MirrorSource, PeerSource, Source
from node.network.web import Answer, WebClient
from node.network.wire import DataLimits, NotThere, piece_bytes
from node.storage.manifest import MANIFEST_SIZE_MAX, ManifestShard


class Lacks(Busy):
    """The source does not give one of the pieces it was taken to have. The connection goes on."""

    def __init__(self, piece: int, reason: str) -> None:
        super().__init__(f"piece {piece}: {reason}")
        self.piece = piece


@dataclass(frozen=True, slots=True)
class Holding:
    """What a source has of a shard, what it has asked others for, and what others asked it for: bit i is piece i.
    `others` may have pieces too."""

    have: int
    coming: int = 0
    others: tuple[NodeId, ...] = ()
    given: int = 0


class Receiver(Protocol):
    """Where a connection's pieces go. Called in its worker thread, but for `wake`."""

    def expect(self, size_bytes: int) -> None:
        """Wait until so many bytes may come in, which are the next piece, packed or not."""

    def take(self, index: int, piece: memoryview) -> None:
        """A piece, valid during the call. Raises BadPeer when it is not what it should be."""

    def wake(self) -> None:
        """End a wait in `expect`: the connection is to be given up."""


class Connection(Protocol):
    async def holding(self) -> Holding:
        """What the source has by now. Raises Busy when it has nothing of the shard."""

    async def fetch(self, pieces: range, receiver: Receiver) -> None:
        """Neighbouring pieces, in order. Raises Lacks; or Busy or BadPeer: then the connection is of no more use."""


@asynccontextmanager
async def connect(
    source: Source,
    shard: ManifestShard,
    identity: NodeIdentity,
    limits: DataLimits,
    *,
    compression: bool = False,
    plain: bool = False,
) -> AsyncIterator[Connection]:
    """A connection to a source, closed at the end. With `compression` a peer's pieces may come packed, with `plain` in
    clear. Raises Busy or BadPeer."""
    match source:
        case PeerSource():
            async with connected(source, identity, limits, plain=plain) as peer:
                yield _Peer(peer, shard, compression)
        case MirrorSource():
            with WebClient(limits) as web:
                yield _Mirror(web, source, shard)
        case GatewaySource():
            with WebClient(limits) as web:
                yield _Gateway(web, source, shard)


async def fetch_manifest(
    source: Source, manifest_hash: ManifestHash, identity: NodeIdentity, limits: DataLimits, *, plain: bool = False
) -> bytes:
    """What a source gives for a manifest; the caller checks its hash. Raises Busy or BadPeer."""
    match source:
        case PeerSource():
            async with connected(source, identity, limits, plain=plain) as peer:
                return await peer.run(lambda: peer.manifest(manifest_hash, MANIFEST_SIZE_MAX))
        case MirrorSource():
            url = source.manifest_url(manifest_hash)
        case GatewaySource():
            url = source.block_url(manifest_hash)
    with WebClient(limits) as web:
        return await web.get(url, _manifest)


def _manifest(answer: Answer) -> bytes:
    if answer.status == 200 and (answer.size is None or answer.size > MANIFEST_SIZE_MAX):
        said = "an unknown number of" if answer.size is None else f"{answer.size:,}"
        raise BadPeer(f"offers a manifest of {said} bytes, the limit is {MANIFEST_SIZE_MAX:,}")
    size = answer.size or 0
    answer.check(200, size)
    data = bytearray()
    for first in range(0, size, PIECE_SIZE):  # grown as it arrives: a mere claim of size takes no memory
        chunk = bytearray(min(PIECE_SIZE, size - first))
        answer.read_into(memoryview(chunk))
        data += chunk
    return bytes(data)


class _Peer:
    def __init__(self, connection: PeerConnection, shard: ManifestShard, compression: bool) -> None:
        self._connection = connection
        self._shard = shard
        self._chooser = Chooser() if compression and connection.packs else None

    async def holding(self) -> Holding:
        shard = self._shard
        have = await self._connection.run(lambda: self._connection.have(shard.sha256, shard.piece_count))
        bits = int.from_bytes(have.bits, "little") if have.bits else (1 << shard.piece_count) - 1
        coming = int.from_bytes(have.coming, "little")
        given = int.from_bytes(have.given, "little")
        if (bits | coming | given) >> shard.piece_count:
            raise BadPeer(f"claims pieces beyond the {shard.piece_count:,} of the shard")
        return Holding(bits, coming, tuple(map(NodeId, have.others)), given)

    async def fetch(self, pieces: range, receiver: Receiver) -> None:
        shard, chooser = self._shard, self._chooser

        def receive() -> None:
            packed = [chooser.next() for _ in pieces] if chooser else [False] * len(pieces)
            began = time.monotonic()
            arriving = self._connection.pieces(
                shard.sha256, shard.size, pieces.start, len(pieces), packed, receiver.expect
            )
            for index, may_pack in zip(pieces, packed, strict=True):
                try:
                    piece = next(arriving)
                except NotThere as error:
                    raise Lacks(index, str(error)) from None
                receiver.take(index, piece)
                if chooser:
                    chooser.took(may_pack, len(piece), time.monotonic() - began)
                    began = time.monotonic()

        await self._connection.run(receive, receiver.wake)


class _Web:
    """What mirrors and gateways have in common: they are taken to have everything until they are asked."""

    def __init__(self, web: WebClient, shard: ManifestShard) -> None:
        self._web = web
        self._shard = shard
        self._buffer = memoryview(bytearray(PIECE_SIZE))

    async def holding(self) -> Holding:
        return Holding((1 << self._shard.piece_count) - 1)

    def _receive(self, answer: Answer, pieces: range, receiver: Receiver) -> None:
        for index in pieces:
            piece = self._buffer[: piece_bytes(self._shard.size, index)]
            receiver.expect(len(piece))
            answer.read_into(piece)
            receiver.take(index, piece)


class _Mirror(_Web):
    def __init__(self, web: WebClient, source: MirrorSource, shard: ManifestShard) -> None:
        super().__init__(web, shard)
        self._url = source.shard_url(shard.sha256)

    async def fetch(self, pieces: range, receiver: Receiver) -> None:
        size = self._shard.size
        first, end = pieces.start * PIECE_SIZE, min(size, pieces.stop * PIECE_SIZE)

        def receive(answer: Answer) -> None:
            answer.check(206, end - first)
            asked, told = f"bytes {first}-{end - 1}/", answer.header("Content-Range").lower()
            if told not in {f"{asked}{size}", f"{asked}*"}:
                raise BadPeer(f"answers with {told[:80] or 'no range'} where {asked}{size} is due")
            self._receive(answer, pieces, receiver)

        await self._web.get(self._url, receive, {"Range": f"bytes={first}-{end - 1}"}, receiver.wake)


class _Gateway(_Web):
    def __init__(self, web: WebClient, source: GatewaySource, shard: ManifestShard) -> None:
        super().__init__(web, shard)
        self._source = source

    async def fetch(self, pieces: range, receiver: Receiver) -> None:
        for index in pieces:
            await self._web.get(
                self._source.block_url(self._shard.piece_hash(index)),
                self._take(index, receiver),
                {"Accept": "application/vnd.ipld.raw"},
                receiver.wake,
            )

    def _take(self, index: int, receiver: Receiver) -> Callable[[Answer], None]:
        def receive(answer: Answer) -> None:
            try:
                answer.check(200, piece_bytes(self._shard.size, index))
            except NotThere as error:
                raise Lacks(index, str(error)) from None
            self._receive(answer, range(index, index + 1), receiver)

        return receive
