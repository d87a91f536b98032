"""What this node should hold, made true again and again: fetch what is missing, repair, announce what is held.

Two loops, each comparing the ledger's state with the store and acting on the difference: one fetches and repairs, the
other announces, withdraws and renews the lease, so that a ledger which stands still keeps no shard from being repaired.
Both run after every block, whenever `wake` is called, when a member's lease is over, and again after a pause when
something failed. Knows no engine and no RPC.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from contracts.calls import AnnounceShards, Call, RenewLease, WithdrawShards
from contracts.errors import BadInput, Conflict, NoSpace, NotFound, Refused
from contracts.types import NodeId, ShardHash
from ledger.answers import Receipt
from ledger.wallet import Wallet
from node.members import REPLICATING_ROLES, Members
from node.network.addresses import parse_endpoints
from node.network.fetching.fetcher import Fetcher
from node.network.fetching.progress import FetchProgress
from node.network.sources import PeerSource, Source, web_source
from node.registry import Model
from node.replay import Replay
from node.scrubbing import Scrubbing
from node.share import Share
from node.storage.manifest import Manifest, check_registered
from node.storage.store import ShardStore

RETRY_S = 5.0
"""The pause before another pass when something could not be fetched or announced."""

SENDS_MAX = 3
"""Attempts at a transaction whose nonce another use of the operator's key took meanwhile."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicationStatistics:
    shards_wanted: int
    shards_held: int
    """Of those wanted."""
    failures: tuple[str, ...]
    """What the newest passes could not do, a line each."""
    pieces_damaged: int
    shards_short: int


@dataclass(repr=False)
class Replication:
    role: str
    share: Share
    replay: Replay
    store: ShardStore
    fetcher: Fetcher
    wallet: Wallet
    clock: Callable[[], float] = time.time
    _woken: trio.Event = field(default_factory=trio.Event)
    _announcing: trio.Lock = field(default_factory=trio.Lock)
    _given_up: frozenset[ShardHash] = frozenset()
    """What the last pass could not get: only such a shard's announcement is withdrawn, not that of one in repair."""
    _failures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _leaving: set[ShardHash] = field(default_factory=set)
    """What is being given up: held, and not to be announced."""
    _short: int = 0
    _renewed_at: float = -math.inf

    def __post_init__(self) -> None:
        self.scrubbing = Scrubbing(self.replay, self.store, self.manifest, self.wake)

    @property
    def node_id(self) -> NodeId:
        return self.share.node_id

    # What should be here

    def wanted(self) -> list[tuple[Model, int]]:
        """Every shard this node should hold unasked: its share, and what it has announced."""
        return self.share.wanted(self.replay.state, trio.current_time())

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
        wanted = self.wanted()
        held = sum(self.store.held(model.shard_hashes[index]) for model, index in wanted)
        failures = tuple(failure for of_loop in self._failures.values() for failure in of_loop)
        return ReplicationStatistics(len(wanted), held, failures, self.scrubbing.pieces_damaged, self.shards_short())

    def shards_short(self) -> int:
        """Of the whole network: those with fewer copies on nodes that are there than there should be."""
        return len(self.share.short(self.replay.state, trio.current_time()))

    def live(self) -> frozenset[NodeId]:
        """The members that are there."""
        return self.share.live(self.replay.state, trio.current_time())

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
            with trio.move_on_after(min(RETRY_S if failures else math.inf, self._next_s())):
                await self._changed(number, woken)

    def _next_s(self) -> float:
        """Seconds until there is something to do though nothing changed: somebody's lease is over, or ours is due."""
        moment = trio.current_time()
        return min(self.share.leases.next_change(moment) - moment, self._renewal_due_s())

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

    def _warn(self) -> None:
        """Say in the log when the network comes to have too few copies, and when it has enough again."""
        short = self.shards_short()
        if short != self._short:
            level = logging.WARNING if short > self._short else logging.INFO
            log.log(level, "%d shards have fewer than %d copies on nodes that are there", short, self.share.redundancy)
            self._short = short

    # Fetching

    async def fetch_share(self) -> tuple[str, ...]:
        """One pass: repair what is known to be damaged, fetch what is missing of this node's share; the failures."""
        self._warn()
        failures = await self.scrubbing.scrub_damaged()
        wanted = self.wanted()
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
        self.scrubbing.note_whole(shard.sha256)
        log.info("shard %d of %s is whole", index, model.model_id)
        self.wake()

    # Announcing

    async def announce_all(self) -> tuple[str, ...]:
        """One pass over the lease and every model; the failures."""
        failures = []
        try:
            await self._renew()
        except Refused as error:
            failures.append(f"that this node is there: {error}")
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
            held = {i for i, h in enumerate(hashes) if self.store.held(h) and h not in self._leaving}
            lost = tuple(i for i in sorted(announced - held) if model.retired or hashes[i] in self._given_up)
            if (new := tuple(sorted(held - announced))) and not model.retired:
                await self.send(AnnounceShards(self.node_id, model.model_id, model.version, new))
                log.info("announced %d shards of %s", len(new), model.model_id)
            if lost:
                await self.send(WithdrawShards(self.node_id, model.model_id, model.version, lost))
                log.warning("withdrew %d shards of %s that are not held any more", len(lost), model.model_id)

    def _renewal_due_s(self) -> float:
        """Seconds until this node's lease is to be renewed; infinity when nothing depends on it."""
        state = self.replay.state
        own = state.members.members.get(self.node_id)
        if own is None or not (self.role in REPLICATING_ROLES or state.shards.announces(self.node_id)):
            return math.inf
        leases = self.share.leases
        # Whatever the clocks say: not again before this.
        pause_s = max(0.0, self._renewed_at + leases.grace_s - trio.current_time())
        if own.room is None or self.share.has_room(own.room) != self.share.has_room(self.store.room_bytes()):
            return pause_s
        return max(pause_s, leases.renewal_due(own.seen_at, max(self.clock(), state.time)))

    async def _renew(self) -> None:
        if self._renewal_due_s() == 0:
            await self.send(RenewLease(self.node_id, self.store.room_bytes()))
            self._renewed_at = trio.current_time()

    # Freeing

    async def free(self, size_bytes: int, keeps: Callable[[Model], bool]) -> list[tuple[Model, int]]:
        """Give up held shards that others should hold and do, each on as many nodes as there should be copies, until so
        many bytes are free; those given up, which may be fewer. None of a model that `keeps` names, and none before as
        many others have proved by a piece that they have it."""
        dropped: list[tuple[Model, int]] = []
        held = set(self.store.held_shards())
        spare = self.share.spare(self.replay.state, held, trio.current_time(), keeps)
        for model in self.replay.state.registry.models.values():
            chosen = []
            for index, shard_hash in enumerate(model.shard_hashes):
                if size_bytes > 0 and shard_hash in spare and await self._is_proved_elsewhere(model, index):
                    chosen.append(index)
                    spare.discard(shard_hash)  # another model may have it too
                    size_bytes -= model.size_of_shard(index)
            if chosen:
                dropped += await self._drop(model, chosen)
        return dropped

    async def _is_proved_elsewhere(self, model: Model, index: int) -> bool:
        """Whether enough other nodes have a shard, and not only say so; of a retired model nobody need have it."""
        if model.retired:
            return True
        shard = (await self.manifest(model)).shards[index]
        proved: set[NodeId] = set()
        for source in self.sources(model, index):
            if not isinstance(source, PeerSource) or source.node_id not in self.live() - proved:
                continue
            if await self.fetcher.proves(shard, source):
                proved.add(source.node_id)
            if len(proved) == self.share.redundancy:
                return True
        return False

    async def _drop(self, model: Model, indices: list[int]) -> list[tuple[Model, int]]:
        """Withdraw shards, then look again: of two nodes that give one up, the ledger has one first; the other finds a
        copy too few and announces its own again."""
        hashes = {model.shard_hashes[index] for index in indices}
        dropped = []
        async with self._announcing:
            self._leaving |= hashes
            try:
                announced = self.replay.state.shards.announced_by(self.node_id, model.key)
                if withdrawn := tuple(index for index in indices if index in announced):
                    await self.send(WithdrawShards(self.node_id, model.model_id, model.version, withdrawn))
                spare = self.share.spare(self.replay.state, hashes, trio.current_time())
                for index in indices:
                    if model.shard_hashes[index] in spare:
                        await trio.to_thread.run_sync(self.store.remove, model.shard_hashes[index])
                        log.info("gave up shard %d of %s: enough others have it", index, model.model_id)
                        dropped.append((model, index))
                if dropped:
                    await trio.to_thread.run_sync(self.store.remove_quantised, model.manifest_hash)
            finally:
                self._leaving -= hashes
                self.wake()
        return dropped

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
