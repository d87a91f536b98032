"""A swarm of thousands in one process and no sockets: the real flights, queues, askers, places and limits, on links
that are made up, in virtual time.

What is simulated is what lies between nodes: a message takes the latency of both ends, a piece the time that the
slower of both links takes for it besides, once both limits let it go; an answer is what was so when it was asked for.
A shard is bits that say which pieces are there. Everything that decides anything is the product's own. The clock is
trio's MockClock, and tasks that are due at once come in an order made from the seed: the same seed is the same run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, cast

import trio
import trio.testing

from contracts.errors import Busy
from contracts.types import PIECE_SIZE, NodeId, ShardHash
from node.network.addresses import DataAddress
from node.network.askers import Askers
from node.network.fetching.connections import Connection, Holding, Lacks, Receiver
from node.network.fetching.fetcher import LANES_MAX, anybody, lanes_within
from node.network.fetching.flight import Flight
from node.network.fetching.means import Means
from node.network.fetching.records import Records
from node.network.identity import NodeIdentity
from node.network.pace import Pace, Shares, Ticket
from node.network.places import Places
from node.network.sources import PeerSource, Source
from node.network.wire import DataLimits, NotThere
from node.storage.manifest import ManifestShard
from node.storage.partial import PartialShard

TICKS_PER_S: Final = 1024
"""All times are whole ticks, and a power of two keeps them exact: thousands of nodes share a turn of the clock."""
LATENCY_TICKS: Final = (2, 25)
"""Of one node's link, one way; two links lie between two nodes."""
HANDSHAKE_LATENCIES: Final = 6
"""TCP, TLS, and the proof with its answer: three times there and back."""
HANDSHAKE_MESSAGES: Final = 3
"""The challenge, the proof, the answer."""
RETRY_S: Final = 5.0
"""After which `node.replication` tries again what could not be had."""


class VirtualPace:
    """What `node.network.pace.Pace` is for threads, for tasks in virtual time: the same Shares decide."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._shares = Shares(bytes_per_s)
        self._waiting: dict[Ticket, trio.Event] = {}
        self._watched = False
        """One of those who wait looks at the clock for all."""

    async def take(self, name: str, size_bytes: int) -> None:
        """Wait for leave to move so many bytes, as one of those of this name."""
        ticket = self._shares.ask(name, size_bytes)
        self._waiting[ticket] = woken = trio.Event()
        self._grant()
        try:
            while not ticket.granted:
                if self._watched:
                    await woken.wait()
                    woken = self._waiting[ticket] = trio.Event()
                    continue
                self._watched = True
                try:
                    await trio.sleep_until(self._shares.due())
                finally:
                    self._watched = False
                self._grant()
        finally:
            del self._waiting[ticket]
            if not ticket.granted:
                self._shares.withdraw(ticket)
            if not self._watched and self._waiting:
                next(iter(self._waiting.values())).set()

    def _grant(self) -> None:
        while self._shares.grant(trio.current_time()):
            for ticket, woken in self._waiting.items():
                if ticket.granted:
                    woken.set()


class _Pieces:
    """The part of `node.storage.partial.PartialShard` that a flight needs, without bytes."""

    def __init__(self, piece_count: int) -> None:
        self.bits = 0
        self._count = piece_count

    @property
    def missing_bytes(self) -> int:
        return (self._count - self.bits.bit_count()) * PIECE_SIZE

    def missing(self) -> list[int]:
        return [index for index in range(self._count) if not self.bits >> index & 1]

    def write(self, index: int, data: memoryview) -> bool:
        new = not self.bits >> index & 1
        self.bits |= 1 << index
        return new


class _Flight(Flight):
    async def _hash_behind(self, scope: trio.CancelScope) -> None:
        """There are no bytes to hash."""


class _AtOnce:
    """Takes the place of trio's token: there are no threads here to hear from."""

    def run_sync_soon(self, function: Callable[..., None], *arguments: object) -> None:
        function(*arguments)


_AT_ONCE: Final = _AtOnce()


class Node:
    """One node's data plane: what it has, its flight while it fetches, and what its server decides by."""

    def __init__(self, swarm: Swarm, rng: random.Random) -> None:
        self.identity = NodeIdentity.generate()
        self.source = PeerSource(self.identity.node_id, DataAddress("127.0.0.1", 1))
        self.latency_s = rng.randint(*LATENCY_TICKS) / TICKS_PER_S
        self.up, self.down = VirtualPace(swarm.bytes_per_s), VirtualPace(swarm.bytes_per_s)
        self.askers = Askers()
        self.places = Places(swarm.limits, swarm.bytes_per_s)
        self.pieces = _Pieces(swarm.shard.piece_count)
        self.flight: Flight | None = None
        self.attempts = 0
        self.served = 0
        self.done_at: float | None = None
        self._swarm = swarm
        self._means = Means(
            self.identity,
            swarm.limits,
            Records(rng),
            Pace(0),  # the pace of threads; connections here keep to the virtual one
            rng,
            swarm.locate,
            lanes_within(swarm.bytes_per_s, LANES_MAX),
            self._connect,
            lambda: anybody(swarm.members, swarm.locate, rng),
        )

    async def fetch(self) -> None:
        """From whoever has announced the shard, again and again, until it is whole; then announce it."""
        swarm = self._swarm
        while self.done_at is None:
            self.attempts += 1
            self.flight = _Flight(swarm.shard, cast(PartialShard, self.pieces), self._means, lambda here: None)
            self.flight.add(swarm.announced)
            try:
                await self.flight.run()
                self.done_at = trio.current_time()
            except Busy:
                await trio.sleep(RETRY_S)
            finally:
                self.flight = None
        swarm.announced.append(self.source)

    @asynccontextmanager
    async def _connect(
        self, source: Source, shard: ManifestShard, identity: NodeIdentity, limits: DataLimits
    ) -> AsyncIterator[Connection]:
        assert isinstance(source, PeerSource)
        other, messages = self._swarm.nodes[source.node_id], self._swarm.messages
        one_way_s, me = self.latency_s + other.latency_s, self.identity.node_id
        messages["handshakes"] += HANDSHAKE_MESSAGES
        if not other.places.enter_handshake(me):
            await trio.sleep(2 * one_way_s)
            raise Busy("the connection was closed")
        try:
            await trio.sleep(one_way_s * HANDSHAKE_LATENCIES)
        finally:
            other.places.leave_handshake(me)
        other.places.take(me)
        try:
            yield _Connection(self, other, one_way_s, self._swarm)
        finally:
            other.places.leave(me)


class _Connection:
    """What node.network.client and node.network.server say to one another."""

    def __init__(self, asking: Node, asked: Node, one_way_s: float, swarm: Swarm) -> None:
        self._asking = asking
        self._asked = asked
        self._one_way_s = one_way_s
        self._swarm = swarm

    async def holding(self) -> Holding:
        self._swarm.messages["haves"] += 2
        asked, shard_hash, me = self._asked, self._swarm.shard.sha256, self._asking.identity.node_id
        if asked.flight is not None:
            asked.flight.hear_of([me])
        if not asked.pieces.bits:
            await trio.sleep(2 * self._one_way_s)
            raise NotThere("nothing of it is here")
        coming = 0
        if asked.flight is not None:
            coming = int.from_bytes(asked.flight.coming, "little")
        others = asked.askers.others(shard_hash, me, trio.current_time())
        given = int.from_bytes(asked.askers.given(shard_hash), "little")
        holding = Holding(asked.pieces.bits, coming, others, given)
        await trio.sleep(2 * self._one_way_s)
        return holding

    async def fetch(self, pieces: range, receiver: Receiver) -> None:
        asking, asked, size = self._asking, self._asked, PIECE_SIZE
        cast(Any, receiver)._token = _AT_ONCE
        piece_s = size / min(asked.up.bytes_per_s, asking.down.bytes_per_s)
        for index in pieces:
            await asking.down.take(str(asked.source), size)
            if index == pieces.start:
                self._swarm.messages["requests"] += 1
                asked.askers.gave(self._swarm.shard.sha256, pieces, self._swarm.shard.piece_count)
            if not asked.pieces.bits >> index & 1:
                await trio.sleep(2 * self._one_way_s)
                raise Lacks(index, "it is not here")
            await asked.up.take(asking.identity.node_id, size)
            self._swarm.messages["pieces"] += 1
            asked.served += 1
            await trio.sleep(piece_s + self._one_way_s * (2 if index == pieces.start else 0))
            receiver.take(index, memoryview(b""))


@dataclass(frozen=True)
class Outcome:
    """One run; times in virtual seconds from the beginning."""

    done_s: tuple[float, ...]
    """When each node had everything, the first one first."""
    messages: Counter[str]
    """Of all nodes, by kind: those of handshakes, `Have` and its request, requests for pieces, and pieces."""
    pieces_served: int
    seeder_pieces: int
    attempts: int
    """Flights, of all nodes: one for each that never ran out of sources."""


class Swarm:
    """One seeder, and nodes that all begin at once with what the ledger tells: where the seeder is."""

    def __init__(
        self, nodes: int, piece_count: int, bytes_per_s: int, seed: int, limits: DataLimits | None = None
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.limits = limits or DataLimits()
        self.shard = ManifestShard(ShardHash(bytes(32)), piece_count * PIECE_SIZE, bytes(32 * piece_count))
        self.messages: Counter[str] = Counter()
        self._seed = seed
        rng = random.Random(seed)
        self.seeder = Node(self, random.Random(rng.random()))
        self.seeder.pieces.bits = (1 << piece_count) - 1
        self.wanting = [Node(self, random.Random(rng.random())) for _ in range(nodes)]
        self.nodes: dict[NodeId, Node] = {node.identity.node_id: node for node in (self.seeder, *self.wanting)}
        self.members = tuple(self.nodes)
        self.announced: list[PeerSource] = [self.seeder.source]

    def locate(self, node_id: NodeId) -> Sequence[PeerSource]:
        return [self.nodes[node_id].source]

    def run(self) -> Outcome:
        """Until all have it."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for node in self.wanting:
                    nursery.start_soon(node.fetch)

        trio_run: Any = trio._core._run
        deterministic = trio_run._ALLOW_DETERMINISTIC_SCHEDULING
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
        trio_run._r.seed(self._seed)
        try:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        finally:
            trio_run._ALLOW_DETERMINISTIC_SCHEDULING = deterministic
        done = sorted(node.done_at for node in self.wanting if node.done_at is not None)
        assert len(done) == len(self.wanting)
        served = sum(node.served for node in self.nodes.values())
        attempts = sum(node.attempts for node in self.wanting)
        return Outcome(tuple(done), self.messages, served, self.seeder.served, attempts)
