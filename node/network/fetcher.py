"""Fetch manifests and shards from other nodes: one source at a time, the next on failure, resuming where it stood.

Owns which source is asked and what is remembered about sources that failed. Every byte is proved by the store before
it counts, so a source can waste time but not do harm. Knows no ledger: the caller says who holds what.
"""

import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

import trio

from contracts.errors import BadPeer, Busy, Conflict, Corrupt, NotFound
from contracts.types import ManifestHash, ShardHash
from node.network.client import PeerConnection, PeerSource, with_connection
from node.network.identity import NodeIdentity
from node.network.wire import PIECES_PER_REQUEST_MAX, DataLimits
from node.storage.manifest import MANIFEST_SIZE_MAX, Manifest, ManifestShard
from node.storage.partial import PartialShard

log = logging.getLogger(__name__)

DROPPED_S: Final = 3600.0
"""How long a source that served something wrong is not asked again."""
SOURCES_REMEMBERED_MAX: Final = 4096
PASSES_MAX: Final = 16
"""Rounds over the sources in one fetch, as long as each round brings something."""

Progress = Callable[[int], None]
"""Called with the bytes that were just proved, first with those that were there already. In a worker thread."""


class FetchStorePort(Protocol):
    """The part of `node.storage.store.ShardStore` that fetching needs."""

    def manifest(self, manifest_hash: ManifestHash) -> Manifest: ...

    def put_manifest(self, data: bytes, expected_hash: ManifestHash) -> Manifest: ...

    def open_partial(self, shard_hash: ShardHash, size_bytes: int, piece_hashes: bytes) -> PartialShard: ...


@dataclass(frozen=True, slots=True)
class FetcherStatistics:
    """The fetcher at one moment; totals since it was made."""

    shards_in_flight: int
    shards_fetched: int
    manifests_fetched: int
    pieces_fetched: int
    bytes_fetched: int
    source_failures: int
    dropped: dict[str, str]
    """Sources that are not asked for now because they served something wrong, with the reason."""


@dataclass
class _Memory:
    """What is remembered of a source that failed."""

    failures: int = 0
    dropped_until: float = 0.0
    reason: str = ""


class Fetcher:
    """One for each process; the same shard asked for twice at once is fetched once."""

    def __init__(
        self,
        store: FetchStorePort,
        identity: NodeIdentity,
        *,
        limits: DataLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._identity = identity
        self._limits = limits or DataLimits()
        self._random = rng or random.Random()
        self._memories: dict[PeerSource, _Memory] = {}
        self._locks: dict[bytes, tuple[trio.Lock, int]] = {}
        self._shards_fetched = 0
        self._manifests_fetched = 0
        self._pieces_fetched = 0
        self._bytes_fetched = 0
        self._source_failures = 0
        self._shards_in_flight = 0

    def statistics(self) -> FetcherStatistics:
        now = trio.current_time()
        return FetcherStatistics(
            shards_in_flight=self._shards_in_flight,
            shards_fetched=self._shards_fetched,
            manifests_fetched=self._manifests_fetched,
            pieces_fetched=self._pieces_fetched,
            bytes_fetched=self._bytes_fetched,
            source_failures=self._source_failures,
            dropped={str(s): m.reason for s, m in self._memories.items() if m.dropped_until > now},
        )

    async def fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[PeerSource]) -> Manifest:
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

    async def _fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[PeerSource]) -> bytes:
        def use(connection: PeerConnection) -> bytes:
            data = connection.manifest(manifest_hash, MANIFEST_SIZE_MAX)
            if sha256(data).digest() != manifest_hash:
                raise BadPeer(f"its {len(data):,} bytes are not the manifest {manifest_hash.hex()}")
            return data

        reasons: list[str] = []
        for source in self._in_order(sources, reasons):
            try:
                data = await with_connection(source, self._identity, self._limits, use)
            except (BadPeer, Busy) as error:
                self._note_failure(source, error, reasons)
                continue
            self._note_success(source)
            return data
        raise Busy(f"The manifest {manifest_hash.hex()} came from none of the sources: {_list(reasons)}")

    async def fetch_shard(
        self, shard: ManifestShard, sources: Iterable[PeerSource], progress: Progress | None = None
    ) -> None:
        """Make the shard held; what is on disk already is not fetched again.

        Busy when the sources are exhausted: what arrived is kept, and a later call goes on from there. NoSpace, and
        other trouble of our own disk, ends it at once; BadInput: the pieces are right and the shard is not.
        """
        sources = list(sources)
        async with self._alone(shard.sha256):
            try:
                opened = await trio.to_thread.run_sync(self._store.open_partial, shard.sha256, shard.size, shard.pieces)
            except Conflict:  # held already
                if progress is not None:
                    progress(shard.size)
                return
            self._shards_in_flight += 1
            try:
                if progress is not None:
                    progress(opened.size_bytes - opened.missing_bytes)
                await self._fill(opened, sources, progress)
                await trio.to_thread.run_sync(opened.commit)
                self._shards_fetched += 1
            finally:
                self._shards_in_flight -= 1
                opened.close()

    async def _fill(self, opened: PartialShard, sources: list[PeerSource], progress: Progress | None) -> None:
        """Ask source after source until nothing is missing; go round again while that brings something."""
        reasons: list[str] = []
        for _ in range(PASSES_MAX):
            before = len(opened.missing())
            for source in self._in_order(sources, reasons):
                if not opened.missing():
                    return
                try:
                    await self._transfer(source, opened, progress)
                except (BadPeer, Busy) as error:
                    self._note_failure(source, error, reasons)
                else:
                    self._note_success(source)
            missing = len(opened.missing())
            if missing == 0:
                return
            if missing == before:
                break
        raise Busy(
            f"Shard {opened.shard_hash.hex()} misses {len(opened.missing()):,} of {opened.piece_count:,} pieces, "
            f"and no source gives more: {_list(reasons)}"
        )

    async def _transfer(self, source: PeerSource, opened: PartialShard, progress: Progress | None) -> None:
        """All that is missing, from one source. BadPeer and Busy are the source's doing; our own disk raises others."""

        def use(connection: PeerConnection) -> None:
            for first, count in _runs(opened.missing()):
                for index, piece in enumerate(
                    connection.pieces(opened.shard_hash, opened.size_bytes, first, count), start=first
                ):
                    opened.write(index, piece)
                    if progress is not None:
                        progress(len(piece))

        missing, missing_bytes = len(opened.missing()), opened.missing_bytes
        try:
            await with_connection(source, self._identity, self._limits, use)
        finally:
            self._pieces_fetched += missing - len(opened.missing())
            self._bytes_fetched += missing_bytes - opened.missing_bytes

    # Sources

    def _in_order(self, sources: Iterable[PeerSource], reasons: list[str]) -> Iterator[PeerSource]:
        """The sources to ask: those that failed least first, in random order so that a crowd spreads over them."""
        now = trio.current_time()
        usable: list[PeerSource] = []
        for source in dict.fromkeys(sources):
            memory = self._memories.get(source, _Memory())
            if source.node_id == self._identity.node_id:
                continue
            if memory.dropped_until > now:
                _add(reasons, f"{source} is not asked for now: {memory.reason}")
            else:
                usable.append(source)
        self._random.shuffle(usable)
        return iter(sorted(usable, key=lambda source: self._memories.get(source, _Memory()).failures))

    def _note_failure(self, source: PeerSource, error: BadPeer | Busy, reasons: list[str]) -> None:
        if source not in self._memories and len(self._memories) >= SOURCES_REMEMBERED_MAX:
            del self._memories[next(iter(self._memories))]
        memory = self._memories.setdefault(source, _Memory())
        memory.failures += 1
        memory.reason = str(error)
        self._source_failures += 1
        _add(reasons, f"{source}: {error}")
        if isinstance(error, BadPeer):
            memory.dropped_until = trio.current_time() + DROPPED_S
            log.warning("dropped the source %s: %s", source, error)
        else:
            log.info("the source %s failed: %s", source, error)

    def _note_success(self, source: PeerSource) -> None:
        self._memories.pop(source, None)

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


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring piece numbers as (first, count), at most a request's worth each."""
    first = count = 0
    for index in indices:
        if count and (index != first + count or count == PIECES_PER_REQUEST_MAX):
            yield first, count
            count = 0
        if not count:
            first = index
        count += 1
    if count:
        yield first, count


def _add(reasons: list[str], reason: str) -> None:
    if reason not in reasons:
        reasons.append(reason)


def _list(reasons: list[str]) -> str:
    return "; ".join(reasons) if reasons else "nobody is known to have it"
