"""What this node should hold, made true again and again: fetch what is missing, announce what is held, repair, scrub.

Two loops, each comparing the ledger's state with the store and acting on the difference: one fetches and repairs, the
other announces and withdraws, so that a ledger which stands still keeps no shard from being repaired. Both run after
every block, whenever `wake` is called, and again after a pause when something failed. Knows no engine and no RPC.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from contracts.calls import AnnounceShards, Call, WithdrawShards
from contracts.errors import BadInput, Conflict, NoSpace, NotFound, Refused
from contracts.types import NodeId, ShardHash
from ledger.answers import Receipt
from ledger.wallet import Wallet
from node.members import REPLICATING_ROLES, Members
from node.network.addresses import parse_endpoints
from node.network.fetching.fetcher import Fetcher
from node.network.fetching.progress import FetchProgress
from node.network.sources import PeerSource, Source, web_source
from node.placement import keepers
from node.registry import Model, Registry
from node.replay import Replay
from node.shard_index import ShardIndex
from node.state import State
from node.storage.manifest import Manifest, ManifestShard, check_registered
from node.storage.scrub import scrub_shard
from node.storage.store import ShardStore

RETRY_S = 5.0
"""The pause before another pass when something could not be fetched or announced."""

SENDS_MAX = 3
"""Attempts at a transaction whose nonce another use of the operator's key took meanwhile."""

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


@dataclass(frozen=True)
class ReplicationStatistics:
    shards_wanted: int
    shards_held: int
    """Of those wanted."""
    failures: tuple[str, ...]
    """What the newest passes could not do, a line each."""
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
    _woken: trio.Event = field(default_factory=trio.Event)
    _announcing: trio.Lock = field(default_factory=trio.Lock)
    _damaged: set[ShardHash] = field(default_factory=set)
    _given_up: frozenset[ShardHash] = frozenset()
    """What the last pass could not get: only such a shard's announcement is withdrawn, not that of one in repair."""
    _proved: dict[ShardHash, FileMark] = field(default_factory=dict)
    """Shards hashed since this node started."""
    _failures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _pieces_damaged: int = 0
    _ours: tuple[tuple[Registry, Members, ShardIndex], list[tuple[Model, int]]] | None = None
    """The last answer of `wanted`, with what it was made of: most blocks change none of that."""

    # What should be here

    def wanted(self, state: State) -> list[tuple[Model, int]]:
        """Every shard this node should hold unasked: its share, and what it has announced."""
        parts = state.registry, state.members, state.shards
        if self._ours is not None and all(map(operator.is_, self._ours[0], parts)):
            return self._ours[1]
        replicates = self.role in REPLICATING_ROLES
        members = tuple(state.members.members.values())
        found = [
            (model, index)
            for model in state.registry.models.values()
            if not model.retired
            for index, shard_hash in enumerate(model.shard_hashes)
            if self.node_id in state.shards.holders_of(model.key, index)
            or (replicates and self.node_id in keepers(shard_hash, members, self.redundancy))
        ]
        self._ours = (parts, found)
        return found

    def sources(self, model: Model, index: int) -> list[Source]:
        """Where else a shard is held: each address of every other member that announced it, and the model's mirrors."""
        state = self.replay.state
        holders = sorted(state.shards.holders_of(model.key, index) - {self.node_id})
        found: list[Source] = [source for node_id in holders for source in peer_sources(state.members, node_id)]
        for mirror in sorted(state.shards.mirrors.get(model.key, frozenset())):
            try:
                found.append(web_source(mirror.backend, mirror.uri))
            except BadInput as error:
                log.debug("a mirror that is none: %s", error)
        return found

    def statistics(self) -> ReplicationStatistics:
        wanted = self.wanted(self.replay.state)
        held = sum(self.store.held(model.shard_hashes[index]) for model, index in wanted)
        failures = tuple(failure for of_loop in self._failures.values() for failure in of_loop)
        return ReplicationStatistics(len(wanted), held, failures, self._pieces_damaged)

    # The loops

    def wake(self) -> None:
        """Something changed that is not on the ledger: look again soon."""
        self._woken.set()
        self._woken = trio.Event()

    async def run(self, on_pass: Callable[[], None] = lambda: None) -> None:
        """Make it true for as long as it runs; `on_pass` is called after every pass."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self.fetch_share, on_pass)
            nursery.start_soon(self._repeat, self.announce_all, on_pass)

    async def _repeat(self, act: Callable[[], Awaitable[tuple[str, ...]]], on_pass: Callable[[], None]) -> None:
        while True:
            # Taken before the pass: what happens during it calls for another one.
            number, woken = self.replay.number, self._woken
            failures = await act()
            on_pass()
            with trio.move_on_after(RETRY_S if failures else float("inf")):
                await self._changed(number, woken)

    async def _changed(self, number: int, woken: trio.Event) -> None:
        """Return once the ledger moved on or somebody woke us."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_then_cancel, lambda: self.replay.wait_change(number), nursery.cancel_scope)
            nursery.start_soon(_then_cancel, woken.wait, nursery.cancel_scope)

    def _note_failures(self, name: str, failures: list[str]) -> tuple[str, ...]:
        """Keep what a pass could not do until the next one; said once, however often it is tried again."""
        for failure in failures:
            if failure not in self._failures.get(name, ()):
                log.warning("%s %s; trying again every %.0f s", name, failure, RETRY_S)
        self._failures[name] = tuple(failures)
        return self._failures[name]

    async def pause(self) -> None:
        """What lies between two attempts at something: a change, or the pause after a failure."""
        with trio.move_on_after(RETRY_S):
            await self._changed(self.replay.number, self._woken)

    # Fetching

    async def fetch_share(self) -> tuple[str, ...]:
        """One pass: repair what is known to be damaged, fetch what is missing of this node's share; the failures."""
        failures = await self._scrub_damaged()
        wanted = self.wanted(self.replay.state)
        for model in {model.key: model for model, _ in wanted}.values():
            indices = [index for other, index in wanted if other.key == model.key]
            try:
                await self.hold(model, indices, FetchProgress())
            except Refused as error:
                failures.append(f"{model.model_id} version {model.version}: {error}")
        hashes = (model.shard_hashes[index] for model, index in wanted)
        given_up = frozenset(shard_hash for shard_hash in hashes if not self.store.held(shard_hash))
        if given_up != self._given_up:
            self._given_up = given_up
            self.wake()
        return self._note_failures("fetching", failures)

    async def manifest(self, model: Model) -> Manifest:
        """The model's manifest, fetched from a holder when it is not here, and held against the ledger."""
        sources = dict.fromkeys(source for i in range(model.shard_count) for source in self.sources(model, i))
        if not sources and not self.store.has_manifest(model.manifest_hash):
            raise NotFound(
                f"nobody has announced a shard of {model.model_id} version {model.version} yet: it comes once the node "
                "that imported it is up, or after `aigen model import` here"
            )
        manifest = await self.fetcher.fetch_manifest(model.manifest_hash, sources)
        check_registered(manifest, model.total_size, model.shard_size, model.shard_hashes)
        return manifest

    async def hold_all(self, model: Model, progress: FetchProgress) -> Manifest:
        """Make sure that every shard of `model` is here. Raises NotFound when nobody has one, Busy, NoSpace."""
        await self.hold(model, list(range(model.shard_count)), progress)
        return await self.manifest(model)

    async def hold(self, model: Model, indices: list[int], progress: FetchProgress) -> None:
        """Make sure that these shards are here; each is fetched once however many ask for it. One that cannot be had
        does not keep the others from coming; then the first failure is raised."""
        progress.bytes_total = sum(map(model.size_of_shard, indices))
        missing = []
        for index in indices:
            if self.store.held(model.shard_hashes[index]):
                progress.report(index, model.size_of_shard(index))
            else:
                missing.append(index)
        if not missing:
            return
        manifest = await self.manifest(model)
        failures: list[Refused] = []
        for index in missing:
            try:
                await self._fetch(model, index, manifest, progress)
            except NoSpace:  # nor is there any for the others
                raise
            except Refused as error:
                failures.append(error)
        if failures:
            more = f" (and {len(failures) - 1} more of its shards)" if len(failures) > 1 else ""
            raise type(failures[0])(f"{failures[0]}{more}")

    async def _fetch(self, model: Model, index: int, manifest: Manifest, progress: FetchProgress) -> None:
        shard = manifest.shards[index]
        report = functools.partial(progress.report, index)
        await self.fetcher.fetch_shard(shard, self.sources(model, index), report)
        self._note_proved(shard.sha256, self._mark(shard.sha256))
        log.info("shard %d of %s is whole", index, model.model_id)
        self.wake()

    # Announcing

    async def announce_all(self) -> tuple[str, ...]:
        """One pass over every model; the failures."""
        failures = []
        for model in self.replay.state.registry.models.values():
            try:
                await self.announce(model)
            except Refused as error:
                failures.append(f"{model.model_id} version {model.version}: {error}")
        return self._note_failures("announcing", failures)

    async def announce(self, model: Model) -> None:
        """Put on the ledger what of `model` is held here and not announced, and take off what is lost for now."""
        async with self._announcing:
            if self.node_id not in self.replay.state.members.members:
                return
            hashes = model.shard_hashes
            announced = self.replay.state.shards.announced_by(self.node_id, model.key)
            held = {i for i in range(model.shard_count) if self.store.held(hashes[i])}
            lost = tuple(i for i in sorted(announced - held) if model.retired or hashes[i] in self._given_up)
            if (new := tuple(sorted(held - announced))) and not model.retired:
                await self.send(AnnounceShards(self.node_id, model.model_id, model.version, new))
                log.info("announced %d shards of %s", len(new), model.model_id)
            if lost:
                await self.send(WithdrawShards(self.node_id, model.model_id, model.version, lost))
                log.warning("withdrew %d shards of %s that are not held any more", len(lost), model.model_id)

    async def send(self, call: Call) -> Receipt:
        """Send a transaction of the operator's and return once `replay` has it. Its key may be in use elsewhere too, by
        an `aigen` command for one: whoever comes second takes the next nonce."""
        for attempt in range(1, SENDS_MAX + 1):
            try:
                receipt = await self.wallet.send(call)
                break
            except Conflict:
                if attempt == SENDS_MAX:
                    raise
        await self.replay.wait_change(receipt.block_number - 1)
        return receipt

    # Scrubbing

    async def scrub(
        self, of_model: Callable[[Model], bool] = lambda model: True, unproved_only: bool = False
    ) -> list[ScrubResult]:
        """Hash the held shards of registered models again; a damaged one is held no more and its pieces are fetched
        anew by the next pass. Everything is looked at before the first failure is raised."""
        results: list[ScrubResult] = []
        failures: list[Refused] = []
        for model in self.replay.state.registry.models.values():
            if not of_model(model) or not self.store.has_manifest(model.manifest_hash):
                continue
            try:
                manifest = await self.manifest(model)
                for index, shard in enumerate(manifest.shards):
                    if not (unproved_only and self._is_proved(shard.sha256)):
                        results += await self._scrub_shard(model, index, shard)
            except Refused as error:
                failures.append(error)
        if failures:
            raise failures[0]
        return results

    async def prove(self, model: Model) -> list[ScrubResult]:
        """Hash those shards of `model` that this node has not hashed since it started."""
        return await self.scrub(lambda other: other.key == model.key, unproved_only=True)

    async def _scrub_shard(self, model: Model, index: int, shard: ManifestShard) -> list[ScrubResult]:
        mark = self._mark(shard.sha256)
        try:
            bad = await trio.to_thread.run_sync(scrub_shard, self.store, shard)
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
            self._pieces_damaged += len(bad)
            self.wake()
        else:
            self._note_proved(shard.sha256, mark)
        return [ScrubResult(model, index, shard.piece_count, bad)]

    def note_damage(self, shard_hash: ShardHash) -> None:
        """A piece of this held shard turned out wrong when it was about to be served: scrub it in the next pass."""
        self._damaged.add(shard_hash)
        self.wake()

    async def _scrub_damaged(self) -> list[str]:
        failures, noted, self._damaged = [], self._damaged, set()
        for shard_hash in noted:
            for model in self.replay.state.registry.models.values():
                if shard_hash not in model.shard_hashes:
                    continue
                try:
                    manifest = await self.manifest(model)
                    index = model.shard_hashes.index(shard_hash)
                    await self._scrub_shard(model, index, manifest.shards[index])
                except Refused as error:
                    failures.append(f"a damaged shard of {model.model_id}: {error}")
                    self._damaged.add(shard_hash)
                break
        return failures

    async def run_scrub(self, interval_s: float) -> None:
        """Scrub everything once an interval, for as long as it runs."""
        while True:
            await trio.sleep(interval_s)
            try:
                await self.scrub()
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


def peer_sources(members: Members, node_id: NodeId) -> list[PeerSource]:
    """Where a member serves pieces, as it says; nowhere when it is none."""
    member = members.members.get(node_id)
    try:
        endpoints = parse_endpoints(node_id, member.endpoints if member else ())
    except BadInput as error:
        log.debug("member %s has an endpoint that is none: %s", node_id, error)
        return []
    return [PeerSource(node_id, address) for address in endpoints.data]


async def _then_cancel(wait: Callable[[], Awaitable[object]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
