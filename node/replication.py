"""What this node should hold, made true again and again: fetch what is missing, announce what is held, repair, scrub.

One pass compares the ledger's state with the store and acts on the difference; it runs after every block, after every
fetch that is asked for, and again after a pause when something failed. Knows no engine and no RPC.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import trio

from contracts.calls import AnnounceShards, WithdrawShards
from contracts.errors import BadInput, NotFound, Refused
from contracts.types import NodeId, ShardHash
from ledger.wallet import Wallet
from node.members import REPLICATING_ROLES
from node.network.addresses import parse_endpoints
from node.network.client import PeerSource
from node.network.fetcher import Fetcher
from node.placement import keepers
from node.registry import Model
from node.replay import Replay
from node.state import State
from node.storage.manifest import Manifest, ManifestShard, check_registered
from node.storage.scrub import scrub_shard
from node.storage.store import ShardStore

RETRY_S = 5.0
"""The pause before another pass when something could not be fetched or announced."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScrubResult:
    """What hashing one held shard again found."""

    model: Model
    shard_index: int
    pieces_checked: int
    bad_pieces: tuple[int, ...]


@dataclass
class FetchProgress:
    """Bytes of a model's shards that this node holds, as they come in."""

    bytes_done: int = 0
    bytes_total: int = 0


@dataclass(frozen=True)
class ReplicationStatistics:
    shards_wanted: int
    shards_held: int
    last_failure: str
    pieces_damaged: int


@dataclass
class Replication:
    node_id: NodeId
    role: str
    redundancy: int
    replay: Replay
    store: ShardStore
    fetcher: Fetcher
    wallet: Wallet
    _wake: trio.Event = field(default_factory=trio.Event)
    _damaged: set[ShardHash] = field(default_factory=set)
    _last_failure: str = ""
    _pieces_damaged: int = 0

    # What should be here

    def wanted(self, state: State) -> Iterator[tuple[Model, int]]:
        """Every shard this node should hold unasked."""
        if self.role not in REPLICATING_ROLES:
            return
        members = tuple(state.members.members.values())
        for model in state.registry.models.values():
            if model.retired:
                continue
            for index, shard_hash in enumerate(model.shard_hashes):
                if self.node_id in keepers(shard_hash, members, self.redundancy):
                    yield model, index

    def sources(self, model: Model, index: int) -> list[PeerSource]:
        """Where else a shard is held: each address of every other member that announced it."""
        state = self.replay.state
        found: list[PeerSource] = []
        for node_id in sorted(state.shards.holders_of(model.key, index) - {self.node_id}):
            member = state.members.members.get(node_id)
            try:
                endpoints = parse_endpoints(node_id, member.endpoints if member else ())
            except BadInput as error:
                log.warning("member %s has an endpoint that is none: %s", node_id, error)
                continue
            found += [PeerSource(node_id, address) for address in endpoints.data]
        return found

    def statistics(self) -> ReplicationStatistics:
        wanted = [(model, index) for model, index in self.wanted(self.replay.state)]
        held = sum(self.store.held(model.shard_hashes[index]) for model, index in wanted)
        return ReplicationStatistics(len(wanted), held, self._last_failure, self._pieces_damaged)

    def wake(self) -> None:
        """Something may have changed that is not on the ledger: look again soon."""
        self._wake.set()

    # The passes

    async def run(self) -> None:
        """Make it true for as long as it runs."""
        while True:
            number, self._wake = self.replay.number, trio.Event()
            settled = await self.settle()
            await self._wait(number, settled)

    async def _wait(self, number: int, settled: bool) -> None:
        """Until the ledger moved on, somebody woke us, or the pause after a failure is over."""
        with trio.move_on_after(float("inf") if settled else RETRY_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_then_cancel, lambda: self.replay.wait_change(number), nursery.cancel_scope)
                nursery.start_soon(_then_cancel, self._wake.wait, nursery.cancel_scope)

    async def settle(self) -> bool:
        """One pass over everything; False when something failed and is to be tried again."""
        failures: list[str] = []
        await self._scrub_damaged()
        wanted = list(self.wanted(self.replay.state))
        for model in {model.key: model for model, _ in wanted}.values():
            indices = [index for other, index in wanted if other.key == model.key]
            try:
                await self.hold(model, indices, FetchProgress())
            except Refused as error:
                failures.append(f"{model.model_id}: {error}")
        for model in self.replay.state.registry.models.values():
            try:
                await self.announce(model)
            except Refused as error:
                failures.append(f"announcing {model.model_id}: {error}")
        for failure in failures:
            if failure != self._last_failure:
                log.warning("%s; trying again in %.0f s", failure, RETRY_S)
        self._last_failure = failures[-1] if failures else ""
        return not failures

    async def announce(self, model: Model) -> None:
        """Put on the ledger what of `model` is held here and not announced, and take off what is not held any more."""
        if self.node_id not in self.replay.state.members.members:
            return
        shards = self.replay.state.shards
        announced = {i for i in range(model.shard_count) if self.node_id in shards.holders_of(model.key, i)}
        held = {i for i in range(model.shard_count) if self.store.held(model.shard_hashes[i])}
        if (new := tuple(sorted(held - announced))) and not model.retired:
            await self.wallet.send(AnnounceShards(self.node_id, model.model_id, model.version, new))
            log.info("announced %d shards of %s", len(new), model.model_id)
        if lost := tuple(sorted(announced - held)):
            await self.wallet.send(WithdrawShards(self.node_id, model.model_id, model.version, lost))
            log.warning("withdrew %d shards of %s that are not held any more", len(lost), model.model_id)
        if new or lost:
            await self.replay.wait_until(
                lambda state: all(
                    (self.node_id in state.shards.holders_of(model.key, i)) == (i in held) for i in new + lost
                )
            )

    # Fetching

    async def manifest(self, model: Model) -> Manifest:
        """The model's manifest, fetched from a holder when it is not here, and held against the ledger."""
        sources = dict.fromkeys(source for i in range(model.shard_count) for source in self.sources(model, i))
        if not sources and not self.store.has_manifest(model.manifest_hash):
            raise NotFound(f"nobody has announced a shard of {model.model_id} version {model.version} yet")
        manifest = await self.fetcher.fetch_manifest(model.manifest_hash, sources)
        check_registered(manifest, model.total_size, model.shard_size, model.shard_hashes)
        return manifest

    async def hold_all(self, model: Model, progress: FetchProgress) -> Manifest:
        """Make sure that every shard of `model` is here. Raises NotFound when nobody has one, Busy, NoSpace."""
        await self.hold(model, list(range(model.shard_count)), progress)
        return await self.manifest(model)

    async def hold(self, model: Model, indices: list[int], progress: FetchProgress) -> None:
        """Make sure that these shards are here; each is fetched once however many ask for it."""
        progress.bytes_total = sum(map(model.size_of_shard, indices))
        missing = [index for index in indices if not self.store.held(model.shard_hashes[index])]
        progress.bytes_done = progress.bytes_total - sum(map(model.size_of_shard, missing))
        if not missing:
            return
        manifest = await self.manifest(model)
        for index in missing:
            await self._fetch(model, index, manifest, progress)

    async def _fetch(self, model: Model, index: int, manifest: Manifest, progress: FetchProgress) -> None:
        sources = self.sources(model, index)
        if not sources:
            raise NotFound(f"nobody else has announced shard {index} of {model.model_id} version {model.version}")
        after = progress.bytes_done + model.size_of_shard(index)
        before_pieces = self.fetcher.statistics().pieces_fetched

        def report(size: int) -> None:
            progress.bytes_done += size

        await self.fetcher.fetch_shard(manifest.shards[index], sources, report)
        progress.bytes_done = after
        pieces = self.fetcher.statistics().pieces_fetched - before_pieces
        log.info("shard %d of %s is whole, %d pieces were fetched", index, model.model_id, pieces)

    # Scrubbing

    async def scrub(self, wanted: Callable[[Model], bool] = lambda model: True) -> list[ScrubResult]:
        """Hash the held shards of registered models again; a damaged one is held no more and its pieces are fetched
        anew by the next pass."""
        results: list[ScrubResult] = []
        for model in [model for model in self.replay.state.registry.models.values() if wanted(model)]:
            if not self.store.has_manifest(model.manifest_hash):
                continue
            manifest = await trio.to_thread.run_sync(self.store.manifest, model.manifest_hash)
            for index, shard in enumerate(manifest.shards):
                if self.store.held(shard.sha256):
                    results.append(await self._scrub_shard(model, index, shard))
        return results

    async def _scrub_shard(self, model: Model, index: int, shard: ManifestShard) -> ScrubResult:
        bad = await trio.to_thread.run_sync(scrub_shard, self.store, shard)
        if bad:
            log.warning(
                "shard %d of %s is damaged in %d pieces: not served any more, fetching them again",
                index,
                model.model_id,
                len(bad),
            )
            self._pieces_damaged += len(bad)
            self.wake()
        return ScrubResult(model, index, shard.piece_count, bad)

    def note_damage(self, shard_hash: ShardHash) -> None:
        """A piece of this held shard turned out wrong when it was about to be served: scrub it in the next pass."""
        self._damaged.add(shard_hash)
        self.wake()

    async def _scrub_damaged(self) -> None:
        while self._damaged:
            shard_hash = self._damaged.pop()
            await self.scrub(lambda model, shard_hash=shard_hash: shard_hash in model.shard_hashes)  # type: ignore[misc]

    async def run_scrub(self, interval_s: float) -> None:
        """Scrub everything once an interval, for as long as it runs."""
        while True:
            await trio.sleep(interval_s)
            await self.scrub()


async def _then_cancel(wait: Callable[[], object], scope: trio.CancelScope) -> None:
    await wait()  # type: ignore[misc]
    scope.cancel()
