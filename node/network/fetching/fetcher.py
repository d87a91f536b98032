"""Fetch manifests and shards from other nodes, mirrors and gateways. One for each process.

Every byte is proved before it counts, so a source can waste time but not do harm. Knows no ledger: the caller says who
may have what.
"""

import functools
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import trio

from contracts.errors import BadPeer, Busy, Conflict, Corrupt, NotFound
from contracts.types import PIECE_SIZE, ManifestHash, NodeId, ShardHash
from node.network.fetching import connections
from node.network.fetching.flight import Flight
from node.network.fetching.means import Means
from node.network.fetching.meter import Meter
from node.network.fetching.records import Records
from node.network.fetching.statistics import FetcherStatistics
from node.network.identity import NodeIdentity
from node.network.pace import Pace
from node.network.sources import PeerSource, Source
from node.network.wire import DataLimits
from node.storage.manifest import Manifest, ManifestShard
from node.storage.partial import PartialShard

log = logging.getLogger(__name__)

LANES_MIN: Final = 2
LANES_MAX: Final = 8
"""Connections for one shard at once, unless told otherwise."""
ASKED_AROUND: Final = 4
"""Members picked at random that are asked when nobody who is known gives anything."""

Progress = Callable[[int], None]
"""Called with the bytes of the shard that are proved and here now, first with what lay here already."""


class FetchStorePort(Protocol):
    """The part of `node.storage.store.ShardStore` that fetching needs."""

    def manifest(self, manifest_hash: ManifestHash) -> Manifest: ...

    def put_manifest(self, data: bytes, expected_hash: ManifestHash) -> Manifest: ...

    def open_partial(self, shard_hash: ShardHash, size_bytes: int, piece_hashes: bytes) -> PartialShard: ...


class Fetcher:
    """The same shard asked for twice at once is fetched once."""

    def __init__(
        self,
        store: FetchStorePort,
        identity: NodeIdentity,
        *,
        locate: Callable[[NodeId], Sequence[PeerSource]] = lambda node_id: (),
        members: Callable[[], Sequence[NodeId]] = lambda: (),
        limits: DataLimits | None = None,
        pace: Pace | None = None,
        lanes_max: int = LANES_MAX,
        compression: bool = True,
        plain: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        """`locate` says where a node is that a peer named as one that may have pieces; `members` who else may fetch the
        same. Without `compression` peers are asked for every piece as it is; without `plain` those that serve in clear
        are passed over."""
        rng, pace = rng or random.Random(), pace or Pace(0)
        self._store = store
        self._plain = plain
        self._records = Records(rng)
        self._means = Means(
            identity,
            limits or DataLimits(),
            self._records,
            pace,
            rng,
            locate,
            lanes_within(pace.bytes_per_s, lanes_max),
            connect=functools.partial(connections.connect, compression=compression, plain=plain),
            anybody=lambda: anybody(members(), locate, rng),
        )
        self._locks: dict[bytes, tuple[trio.Lock, int]] = {}
        self._flights: dict[ShardHash, Flight] = {}
        self._listeners: dict[ShardHash, list[Progress]] = {}
        self._meter = Meter()
        self._shards_fetched = 0
        self._manifests_fetched = 0
        self._pieces_fetched = 0
        self._bytes_fetched = 0

    def statistics(self) -> FetcherStatistics:
        now = trio.current_time()
        return FetcherStatistics(
            flights=tuple(flight.statistics() for flight in self._flights.values()),
            shards_fetched=self._shards_fetched,
            manifests_fetched=self._manifests_fetched,
            pieces_fetched=self._pieces_fetched,
            bytes_fetched=self._bytes_fetched,
            bytes_saved=self._records.bytes_saved,
            rate=round(self._meter.rate(now)),
            source_failures=self._records.failures,
            sources=self._records.infos(now),
        )

    async def fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[Source]) -> Manifest:
        """The manifest, from the store or a source; kept in the store. Busy when no source gives it."""
        async with self._alone(manifest_hash):
            try:
                return await trio.to_thread.run_sync(self._store.manifest, manifest_hash)
            except NotFound:
                log.debug("fetching the manifest %s", manifest_hash.hex())
            except Corrupt as error:
                log.warning("%s", error)
            data = await self._fetch_manifest(manifest_hash, sources)
            self._manifests_fetched += 1
            return await trio.to_thread.run_sync(self._store.put_manifest, data, manifest_hash)

    async def _fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[Source]) -> bytes:
        """From one source after the other: it is small."""
        reasons: list[str] = []
        means = self._means
        for source in self._records.in_order(sources):
            if isinstance(source, PeerSource) and source.node_id == means.identity.node_id:
                continue
            if trouble := self._records.dropped(source, trio.current_time()):
                reasons.append(f"{source} is not asked for now: {trouble}")
                continue
            try:
                data = await connections.fetch_manifest(
                    source, manifest_hash, means.identity, means.limits, plain=self._plain
                )
                if sha256(data).digest() != manifest_hash:
                    raise BadPeer(f"its {len(data):,} bytes are not the manifest {manifest_hash.hex()}")
            except (BadPeer, Busy) as error:
                self._records.failed(source, error, trio.current_time())
                log.warning("the source %s failed to give the manifest: %s", source, error)
                reasons.append(f"{source}: {error}")
            else:
                return data
        said = "; ".join(reasons) or "nobody is known to have it"
        raise Busy(f"The manifest {manifest_hash.hex()} came from none of the sources: {said}")

    async def fetch_shard(
        self, shard: ManifestShard, sources: Iterable[Source], progress: Progress = lambda here: None
    ) -> None:
        """Make the shard held; what is on disk already is not fetched again.

        Busy when the sources are exhausted: what arrived is kept, and a later call goes on from there. NoSpace, and
        other trouble of our own disk, ends it at once; BadInput: the pieces are right and the shard is not.
        """
        listeners = self._listeners.setdefault(shard.sha256, [])
        listeners.append(progress)
        try:
            async with self._alone(shard.sha256):
                await self._fetch_shard(shard, sources)
        finally:
            listeners.remove(progress)
            if not listeners:
                self._listeners.pop(shard.sha256, None)

    async def _fetch_shard(self, shard: ManifestShard, sources: Iterable[Source]) -> None:
        try:
            opened = await trio.to_thread.run_sync(self._store.open_partial, shard.sha256, shard.size, shard.pieces)
        except Conflict:  # held already
            self._tell(shard.sha256, shard.size)
            return
        before = opened.missing_bytes

        def on_bytes(here: int) -> None:
            nonlocal before
            if came := before - (shard.size - here):
                before -= came
                self._pieces_fetched += 1
                self._bytes_fetched += came
                self._meter.add(came, trio.current_time())
            self._tell(shard.sha256, here)

        flight = self._flights[shard.sha256] = Flight(shard, opened, self._means, on_bytes)
        try:
            flight.add(sources)
            await flight.run()
            await trio.to_thread.run_sync(opened.commit)
            self._shards_fetched += 1
        finally:
            del self._flights[shard.sha256]
            opened.close()

    async def proves(self, shard: ManifestShard, source: Source) -> bool:
        """Whether a source has a shard, as far as one piece tells, which is drawn at random and proved."""
        sample, means = _Sample(shard, self._means.rng.randrange(shard.piece_count)), self._means
        try:
            async with means.connect(source, shard, means.identity, means.limits) as connection:
                await connection.fetch(range(sample.index, sample.index + 1), sample)
        except (BadPeer, Busy) as error:
            self._records.failed(source, error, trio.current_time())
            log.warning("the source %s does not prove shard %s: %s", source, shard.sha256.hex(), error)
            return False
        return True

    def hear_of(self, shard_hash: ShardHash, node_id: NodeId) -> None:
        """Another node fetches this shard: what it has may be of use here."""
        if flight := self._flights.get(shard_hash):
            flight.hear_of([node_id])

    def coming(self, shard_hash: ShardHash) -> bytes:
        """The pieces of a shard that sources were asked for, as bits. May be called in any thread."""
        flight = self._flights.get(shard_hash)
        return flight.coming if flight else b""

    def _tell(self, shard_hash: ShardHash, bytes_here: int) -> None:
        for listener in self._listeners.get(shard_hash, ()):
            listener(bytes_here)

    @asynccontextmanager
    async def _alone(self, key: bytes) -> AsyncIterator[None]:
        """One task at a time for each shard or manifest."""
        lock, users = self._locks.get(key, (trio.Lock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            _, users = self._locks[key]
            if users == 1:
                del self._locks[key]
            else:
                self._locks[key] = (lock, users - 1)


@dataclass(frozen=True)
class _Sample:
    """Takes one piece, and keeps nothing of it."""

    shard: ManifestShard
    index: int

    def expect(self, size_bytes: int) -> None:
        """It may come at once."""

    def take(self, index: int, piece: memoryview) -> None:
        if sha256(piece).digest() != self.shard.piece_hash(index):
            raise BadPeer(f"piece {index} is not what it should be")

    def wake(self) -> None:
        """Nobody waits."""


def lanes_within(bytes_per_s: int, lanes_max: int) -> int:
    """How many connections to have with a limit on what comes in (0: none): with more than those that bring a piece in
    2 s each would seem silent."""
    return min(lanes_max, max(LANES_MIN, 2 * bytes_per_s // PIECE_SIZE)) if bytes_per_s else lanes_max


def anybody(
    members: Sequence[NodeId], locate: Callable[[NodeId], Sequence[PeerSource]], rng: random.Random
) -> list[PeerSource]:
    """Where some of these nodes are, picked at random."""
    picked = rng.sample(members, min(ASKED_AROUND, len(members)))
    return [source for node_id in picked for source in locate(node_id)]
