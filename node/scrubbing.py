"""Hashing held shards again: which pieces are bad, and which shards this process has proved already.

A damaged shard is taken out of service at once; fetching its bad pieces anew is replication's next pass. Knows no peers
and no ledger rules: manifests are asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from contracts.errors import NotFound, Refused
from contracts.types import ShardHash
from node.registry import Model
from node.replay import Replay
from node.storage.manifest import Manifest, ManifestShard
from node.storage.proving import Prover
from node.storage.scrub import scrub_shard
from node.storage.store import ShardStore

CANCELLED_WITHIN_S = 0.5
"""How long a thread that keeps to a rate sleeps at most before it looks whether it is wanted still."""

FileMark = tuple[int, int, int]
"""Inode, size and time of change: what a file has to keep to count as the one that was hashed."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScrubResult:
    """What hashing one held shard again found."""

    model: Model
    shard_index: int
    pieces_checked: int
    bad_pieces: tuple[int, ...]


@dataclass
class Scrubbing:
    """`manifest` gives a model's, which may have to come from elsewhere; `on_damage` is called when a shard was taken
    out of service, or is thought to be damaged."""

    replay: Replay
    store: ShardStore
    manifest: Callable[[Model], Awaitable[Manifest]]
    on_damage: Callable[[], None]
    pieces_damaged: int = 0
    _damaged: set[ShardHash] = field(default_factory=set)
    _proved: dict[ShardHash, FileMark] = field(default_factory=dict)
    """Shards hashed since this node started."""

    async def scrub(
        self,
        of_model: Callable[[Model], bool] = lambda model: True,
        *,
        unproved_only: bool = False,
        bytes_per_s: float = 0,
    ) -> list[ScrubResult]:
        """Hash the held shards of registered models again; a damaged one is held no more. All are looked at before the
        first failure is raised. `bytes_per_s`: how fast at most; 0: as fast as it goes."""
        results: list[ScrubResult] = []
        failures: list[Refused] = []
        async with _prover() as prover:
            for model in self.replay.state.registry.models.values():
                if not of_model(model) or not self.store.has_manifest(model.manifest_hash):
                    continue
                try:
                    manifest = await self.manifest(model)
                    for index, shard in enumerate(manifest.shards):
                        if not (unproved_only and self._is_proved(shard.sha256)):
                            results += await self._scrub_shard(prover, model, index, shard, bytes_per_s)
                except Refused as error:
                    failures.append(error)
        if failures:
            raise failures[0]
        return results

    async def prove(self, model: Model) -> list[ScrubResult]:
        """Hash those shards of `model` that this node has not hashed since it started."""
        return await self.scrub(lambda other: other.key == model.key, unproved_only=True)

    async def _scrub_shard(
        self, prover: Prover, model: Model, index: int, shard: ManifestShard, bytes_per_s: float = 0
    ) -> list[ScrubResult]:
        mark = self._mark(shard.sha256)
        try:
            paced = _paced(bytes_per_s)
            bad = await trio.to_thread.run_sync(scrub_shard, self.store, shard, paced, prover.damaged_pieces)
        except NotFound:  # not held, or another scrub was faster in taking it out of service
            return []
        if bad:
            log.warning(
                "shard %d of %s is damaged in %d pieces: not served any more, fetching them again",
                index,
                model.model_id,
                len(bad),
            )
            self._proved.pop(shard.sha256, None)
            self.pieces_damaged += len(bad)
            self.on_damage()
        else:
            self._note_proved(shard.sha256, mark)
        return [ScrubResult(model, index, shard.piece_count, bad)]

    def note_whole(self, shard_hash: ShardHash) -> None:
        """It was hashed on its way here."""
        self._note_proved(shard_hash, self._mark(shard_hash))

    def note_damage(self, shard_hash: ShardHash) -> None:
        """A piece of this held shard turned out wrong when it was about to be served: look at it in the next pass."""
        self._damaged.add(shard_hash)
        self.on_damage()

    async def scrub_damaged(self) -> list[str]:
        """Look at those, and say what stood in the way."""
        failures, noted, self._damaged = [], self._damaged, set()
        for shard_hash in noted:
            for model in self.replay.state.registry.models.values():
                if shard_hash not in model.shard_hashes:
                    continue
                try:
                    manifest = await self.manifest(model)
                    index = model.shard_hashes.index(shard_hash)
                    async with _prover() as prover:
                        await self._scrub_shard(prover, model, index, manifest.shards[index])
                except Refused as error:
                    failures.append(f"a damaged shard of {model.model_id}: {error}")
                    self._damaged.add(shard_hash)
                break
        return failures

    async def run(self, interval_s: float, bytes_per_s: float) -> None:
        """Scrub everything once an interval, for as long as it runs."""
        while True:
            await trio.sleep(interval_s)
            try:
                await self.scrub(bytes_per_s=bytes_per_s)
            except Refused as error:
                log.warning("scrubbing the shards: %s", error)

    def _mark(self, shard_hash: ShardHash) -> FileMark | None:
        try:
            found = self.store.path(shard_hash).stat()
        except (NotFound, FileNotFoundError):
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _note_proved(self, shard_hash: ShardHash, mark: FileMark | None) -> None:
        if mark is not None:
            self._proved[shard_hash] = mark

    def _is_proved(self, shard_hash: ShardHash) -> bool:
        return self._proved.get(shard_hash) == self._mark(shard_hash)


@asynccontextmanager
async def _prover() -> AsyncIterator[Prover]:
    prover = Prover()
    try:
        yield prover
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(prover.close)


def _paced(bytes_per_s: float) -> Callable[[int], None]:
    """For a thread that reads: waits after each portion, and ends it when the task that started it is cancelled."""
    began, done = time.monotonic(), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        trio.from_thread.check_cancelled()
        done += count
        while bytes_per_s and (left_s := began + done / bytes_per_s - time.monotonic()) > 0:
            time.sleep(min(left_s, CANCELLED_WITHIN_S))
            trio.from_thread.check_cancelled()

    return on_bytes
