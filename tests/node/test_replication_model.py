"""Replication as a whole: nodes come, die, return, lie, fill up, lose bytes and give shards up, in any order. Nobody
ever holds a wrong byte, no shard's last honest copy goes, and once it is quiet each is there three times again.

Each node is the real Replication over a real store. The ledger that they share takes their calls at once, and a shard
travels from store to store, each piece proved where it arrives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import trio
import trio.testing
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from contracts import events
from contracts.errors import BadPeer, Busy, NotFound
from contracts.types import PIECE_SIZE, Address, ManifestHash, NodeId
from node.leases import Leases
from node.network.sources import PeerSource, Source
from node.registry import Model
from node.replication import Replication
from node.share import Share
from node.storage.artifact import FileSource, cut
from node.storage.manifest import Manifest, ManifestShard
from node.storage.store import ShardStore
from tests.node.cluster import flip
from tests.node.fakes import FakeReplay, FakeWallet

LEASE_S = 80
STEP_S = LEASE_S // 4
NAMES = "abcdefgh"
AT_FIRST = 5
SHARDS = 2
COPIES = 3
ROOM = 1 << 40
MEMORY = Path("/dev/shm")


@dataclass
class Machine:
    """A node's disk, and its process while it is up."""

    world: World
    node_id: NodeId
    store: ShardStore
    is_up: bool = False
    lies: bool = False
    """It says that it holds everything, and gives out other bytes."""
    damaged: set[int] = field(default_factory=set)
    """Shards that bytes of were changed; it need not know that yet."""
    replication: Replication = field(init=False)

    def start(self) -> None:
        """A process that remembers nothing."""
        world, share = self.world, Share(self.node_id, COPIES, Leases(LEASE_S), PIECE_SIZE)
        fetcher, wallet = Between(self), FakeWallet(world.replay)
        self.replication = Replication(
            "storage",
            share,
            world.replay,  # type: ignore[arg-type]
            self.store,
            fetcher,  # type: ignore[arg-type]
            wallet,  # type: ignore[arg-type]
            clock=lambda: float(world.time),
        )
        self.is_up = True

    async def act(self) -> None:
        """A pass of both loops; a liar renews and announces whatever there is."""
        if self.lies:
            model = self.world.model
            self.world.replay.add(
                events.LeaseRenewed(self.node_id, ROOM),
                events.ShardsAnnounced(self.node_id, model.model_id, model.version, tuple(range(SHARDS))),
            )
        else:
            await self.replication.fetch_share()
            await self.replication.announce_all()

    def held(self) -> set[int]:
        return {i for i, shard_hash in enumerate(self.world.model.shard_hashes) if self.store.held(shard_hash)}

    def is_whole(self, index: int) -> bool:
        shard = self.world.manifest.shards[index]
        return index in self.held() and (index not in self.damaged or not self.store.verify(shard.sha256, shard.pieces))

    def give(self, shard: ManifestShard, piece: int) -> bytes:
        if self.lies:
            return bytes(min(PIECE_SIZE, shard.size))
        return bytes(self.store.read_piece(shard.sha256, piece))


@dataclass
class Between:
    """Fetches out of the stores of those that are up."""

    machine: Machine

    def _others(self, sources: Iterable[Source]) -> list[Machine]:
        named = [source.node_id for source in sources if isinstance(source, PeerSource)]
        return [other for other in self.machine.world.machines.values() if other.node_id in named and other.is_up]

    async def fetch_manifest(self, manifest_hash: ManifestHash, sources: Iterable[Source]) -> Manifest:
        await trio.lowlevel.checkpoint()
        return self.machine.world.manifest

    async def fetch_shard(
        self, shard: ManifestShard, sources: Iterable[Source], progress: Callable[[int], None]
    ) -> None:
        await trio.lowlevel.checkpoint()
        with self.machine.store.open_partial(shard.sha256, shard.size, shard.pieces) as partial:
            for other in self._others(sources):
                for piece in partial.missing():
                    try:
                        partial.write(piece, other.give(shard, piece))
                    except (BadPeer, NotFound):
                        break
            if partial.missing():
                raise Busy("nobody gives it")
            partial.commit()

    async def proves(self, shard: ManifestShard, source: Source) -> bool:
        await trio.lowlevel.checkpoint()
        return any(
            not other.lies and self.machine.world.index(shard) in other.held() for other in self._others([source])
        )


class World:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.replay = FakeReplay()
        self.machines: dict[str, Machine] = {}
        self.time = 1000
        source = path / "model.safetensors"
        source.write_bytes(Random(5).randbytes((SHARDS - 1) * PIECE_SIZE + 100))
        first = ShardStore(path / NAMES[0])
        self.manifest = cut([FileSource(source.name, source)], first, PIECE_SIZE)
        self.replay.add(
            events.TierDefined("basic", 1, 8),
            events.ModelRegistered(
                model_id="m", version="1", total_size=self.manifest.total_size, shard_size=PIECE_SIZE,
                shard_count=SHARDS, shard_hashes=self.manifest.shard_hashes,
                manifest_hash=self.manifest.manifest_hash(), minimum_tier="basic", core=False, architecture="",
                metadata="", admin=Address(bytes(20)),
            ),
            time=self.time,
        )  # fmt: skip
        for name in NAMES:
            node_id = NodeId(f"12D3KooW{name}")
            store = first if name == NAMES[0] else ShardStore(path / name)
            store.put_manifest(self.manifest.encode(), self.manifest.manifest_hash())
            self.machines[name] = Machine(self, node_id, store)
        for name in NAMES[:AT_FIRST]:
            self.join(self.machines[name])

    @property
    def model(self) -> Model:
        return next(iter(self.replay.state.registry.models.values()))

    def index(self, shard: ManifestShard) -> int:
        return self.model.shard_hashes.index(shard.sha256)

    def is_member(self, machine: Machine) -> bool:
        return machine.node_id in self.replay.state.members.members

    def join(self, machine: Machine) -> None:
        name = machine.node_id[-1]
        endpoint = f"aigen+tls://10.0.0.{ord(name)}:9946"
        self.replay.add(events.NodeJoined(machine.node_id, Address(name.encode() * 20), "storage", (endpoint,)))
        machine.start()

    def up(self) -> list[Machine]:
        return [machine for machine in self.machines.values() if machine.is_up and self.is_member(machine)]

    def honest(self, index: int) -> list[Machine]:
        """Those that are up and have all of a shard."""
        return [machine for machine in self.up() if not machine.lies and machine.is_whole(index)]

    def is_needed(self, machine: Machine) -> bool:
        """Whether some shard is nowhere else. What all lose at once, nothing brings back."""
        return any(self.honest(index) == [machine] for index in range(SHARDS))

    async def pass_time(self, seconds: int = STEP_S) -> None:
        self.time += seconds
        self.replay.add(time=self.time)
        await trio.sleep(seconds)
        for machine in self.up():
            await machine.act()

    async def do(self, kind: str, name: str, index: int) -> None:
        """One thing that happens, if it can."""
        machine = self.machines[name]
        match kind:
            case "come" if not machine.is_up and not self.is_member(machine):
                self.join(machine)
            case "return" if not machine.is_up and self.is_member(machine):
                machine.start()
            case "die" if machine.is_up and not self.is_needed(machine):
                machine.is_up = False
            case "leave" if self.is_member(machine) and not self.is_needed(machine):
                self.replay.add(events.NodeLeft(machine.node_id))
                machine.is_up = False
            case "lie" if machine.is_up and not machine.lies and not self.is_needed(machine):
                machine.lies = sum(other.lies for other in self.machines.values()) < 3
            case "damage" if index in machine.held() and machine.is_up and not self.is_needed(machine):
                flip(machine.store.path(self.model.shard_hashes[index]), 7)
                machine.damaged.add(index)
                machine.replication.scrubbing.note_damage(self.model.shard_hashes[index])
            case "free" if machine.is_up and self.is_member(machine) and not machine.lies:
                await machine.replication.free(ROOM, lambda model: False)
            case "wait":
                await self.pass_time((1 + index) * STEP_S)
            case _:
                event("nothing to do")

    def check_always(self) -> None:
        """Every shard is had by somebody honest, and what an honest node holds is what it should be."""
        for index in range(SHARDS):
            assert self.honest(index), f"shard {index} is lost"

    def check_settled(self) -> None:
        now = {machine.node_id for machine in self.up()}
        for index in range(SHARDS):
            holders = self.replay.state.shards.holders_of(self.model.key, index)
            assert len(holders & now) >= min(COPIES, len(now)), f"shard {index} is short"
        for machine in self.up():
            if not machine.lies:
                announced = self.replay.state.shards.announced_by(machine.node_id, self.model.key)
                assert machine.held() == announced, "it says what it has"
                for index in machine.held():
                    shard = self.manifest.shards[index]
                    assert machine.store.verify(shard.sha256, shard.pieces) == []


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(("wait", "wait", "die", "come", "return", "leave", "lie", "damage", "free")),
        st.sampled_from(NAMES),
        st.integers(0, SHARDS - 1),
    ),
    min_size=5,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=ACTIONS)
def test_copies_return_to_three_whatever_happens(actions: list[tuple[str, str, int]]) -> None:
    async def live() -> None:
        with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
            world = World(Path(folder))
            await world.pass_time()
            await world.pass_time()
            for action in actions:
                await world.do(*action)
                world.check_always()
            for _ in range(3 * LEASE_S // STEP_S):
                await world.pass_time()
                world.check_always()
            world.check_settled()

    trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0))
