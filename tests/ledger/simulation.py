"""A network of authorities in one process under a virtual clock: real agreement, ledgers and stores; drawn faults.

Everything random comes from one seed. Messages are lost, delayed, doubled and overtake one another; the network is cut
in two and heals; honest nodes are killed at writes (before or after the disk has them) and start again; up to a third
of the authorities are liars (`tests.ledger.liars`). Checked all along: no two honest nodes hold different final blocks
of one number. Checked at the end, once the network is whole: everything that was acknowledged is final everywhere, and
evidence that one honest node has they all have, against liars only.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from contracts.calls import AddAuthority, Call, RemoveAuthority
from contracts.errors import Refused
from contracts.types import Address, TransactionHash
from genesis.block import GenesisBlock, build
from genesis.config import GenesisConfig
from ledger import ledger as ledger_module
from ledger import seal
from ledger.chain import Chain
from ledger.consensus import Consensus, Pace
from ledger.execution import Execution
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.store import Store
from ledger.transactions import Transaction
from ledger.transactions import decode as decode_transaction
from tests.ledger import world
from tests.ledger.toy import ToyExecution

KEYS = [Key.from_secret(bytes([40 + i]) * 32) for i in range(31)]
SENDERS = [Key.from_secret(bytes([80 + i]) * 32) for i in range(3)]
CALM_S = 900.0
"""Virtual seconds in which all must be final once the network is whole."""

PACE = Pace(timeout_s_min=2.0, timeout_s_max=16.0, status_s=0.2)


class Disagreement(AssertionError):
    """Two honest nodes hold different final blocks of one number."""


class Killed(Exception):
    """An honest node loses power."""


@cache
def network_of(authority_count: int) -> tuple[GenesisConfig, GenesisBlock]:
    config = world.make_config(KEYS[:authority_count], SENDERS)
    return config, build(config)


@cache
def decoded(raw: bytes, chain_id: int, gas_limit: int) -> Transaction:
    """Checking a signature once is enough for all nodes of a simulation."""
    return decode_transaction(raw, chain_id, gas_limit)


EVERYWHERE = -1
"""The group of a node that reaches all others, however the network is cut."""


@dataclass
class Weather:
    """How bad the network is, for now."""

    loss: float = 0.0
    double: float = 0.0
    delay_s: float = 0.02
    groups: dict[int, int] = field(default_factory=dict)
    """Nodes in different groups do not reach each other."""

    def reaches(self, one: int, other: int) -> bool:
        groups = {self.groups.get(one, 0), self.groups.get(other, 0)}
        return len(groups) == 1 or EVERYWHERE in groups


Filter = Callable[["Node", int, bytes], list[bytes]]
"""What a liar sends instead of a message: the node, to whom, the message."""


class Node:
    """One authority's node: what survives a crash is its folder."""

    def __init__(self, simulation: Simulation, index: int) -> None:
        self.simulation = simulation
        self.index = index
        self.key = KEYS[index]
        self.path = simulation.path / str(index)
        self.ledger: Ledger | None = None
        self.consensus: Consensus | None = None
        self.lies: Filter | None = None
        self.scope = trio.CancelScope()
        self.writes_until_death = 0
        self.checked = 0

    @property
    def is_honest(self) -> bool:
        return self.lies is None

    def open(self) -> Ledger:
        config, genesis = self.simulation.network
        store = Store(self.path)
        chain = Chain(store, config, genesis, cast(type[Execution], ToyExecution), shortcut=None)
        self._arm(store)
        return Ledger(chain, world.virtual_clock)

    def _arm(self, store: Store) -> None:
        """Let the node die at a write, when its time has come: half of the times the disk has it already."""
        write = store._write

        def watched(*arguments: Any) -> None:
            if not self.writes_until_death:
                return write(*arguments)
            self.writes_until_death -= 1
            if self.writes_until_death == 0:
                if self.simulation.draw.random() < 0.5:
                    write(*arguments)
                raise Killed
            return write(*arguments)

        store._write = watched  # type: ignore[method-assign]

    async def live(self) -> None:
        """Run until killed, again and again."""
        while True:
            self.ledger = self.open()
            try:
                with trio.CancelScope() as self.scope:
                    await self._run(self.ledger)
                self.simulation.deaths += 1
            except* Killed:
                self.simulation.deaths += 1
            finally:
                self.ledger.close()
                self.ledger = self.consensus = None
            await trio.sleep(self.simulation.draw.uniform(0.1, 5.0))

    async def _run(self, ledger: Ledger) -> None:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            self.consensus = self.simulation.make_consensus(ledger, self.key)
            self.consensus.on_offence = self._blame
            for other in self.simulation.nodes:
                if other is not self:
                    nursery.start_soon(self._talk, self.consensus, other)
            nursery.start_soon(self._pull, ledger)
            nursery.start_soon(self._watch, ledger)
            nursery.start_soon(self._forward, ledger)
            nursery.start_soon(self.consensus.run)

    def _blame(self, peer: str, reason: str) -> None:
        other = self.simulation.nodes[int(peer)]
        assert not (self.is_honest and other.is_honest), f"an honest node is blamed: {reason}"

    async def _talk(self, consensus: Consensus, other: Node) -> None:
        """Send another node what its outbox holds, for as long as both live: a connection."""
        while True:
            while other.consensus is None:  # noqa: ASYNC110 - a machine that is off sends no event
                await trio.sleep(0.1)
            theirs = other.consensus
            outbox = consensus.attach(str(other.index))
            made = self.simulation.connections
            while other.consensus is theirs and self.simulation.connections == made:
                with trio.move_on_after(0.5):
                    for data in await outbox.take(1 << 20, 16):
                        sent = [data] if self.lies is None else self.lies(self, other.index, data)
                        for message in sent:
                            self.simulation.post(self, other, message)
            consensus.detach(str(other.index))

    async def _pull(self, ledger: Ledger) -> None:
        """Final blocks from some other node, now and then: what the control plane's pull sync does."""
        draw = self.simulation.draw
        while True:
            await trio.sleep(draw.uniform(0.2, 0.6))
            other = draw.choice(self.simulation.nodes)
            if other.ledger is None or other is self or not self.simulation.weather.reaches(self.index, other.index):
                continue
            for data in other.ledger.history.sealed_blocks(ledger.head.number + 1, 16, 1 << 20):
                try:
                    await ledger.import_blocks([data])
                except Refused as error:
                    self.simulation.refusals.append(str(error))
                    break

    async def _forward(self, ledger: Ledger) -> None:
        """Waiting transactions to all others, again and again."""
        while True:
            await trio.sleep(self.simulation.draw.uniform(0.1, 0.3))
            for other in self.simulation.nodes:
                if other.ledger is not None and self.simulation.weather.reaches(self.index, other.index):
                    for raw in ledger.pending():
                        await self.simulation.offer(other, raw)

    async def _watch(self, ledger: Ledger) -> None:
        if not self.is_honest:
            return
        while True:
            while self.checked < ledger.head.number:
                self.checked += 1
                self.simulation.check(self, self.checked, ledger.record(self.checked).hash)
            await ledger.wait_head(self.checked)


@dataclass
class Simulation:
    path: Path
    seed: int
    size: int
    make_consensus: Callable[[Ledger, Key], Consensus]
    draw: random.Random = field(init=False)
    weather: Weather = field(default_factory=Weather)
    nodes: list[Node] = field(default_factory=list)
    final: dict[int, bytes] = field(default_factory=dict)
    acknowledged: set[TransactionHash] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    deaths: int = 0
    connections: int = 0
    """How often all were made anew: one that lost a message does not last."""
    proved: frozenset[Address] = frozenset()
    """Against whom all honest nodes have evidence in the end."""
    nursery: trio.Nursery | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.network = network_of(self.size)
        self.nodes = [Node(self, index) for index in range(self.size)]

    @property
    def honest(self) -> list[Node]:
        return [node for node in self.nodes if node.is_honest]

    def post(self, sender: Node, receiver: Node, data: bytes) -> None:
        """A message on its way: lost, doubled or late, as the weather has it."""
        weather, draw = self.weather, self.draw
        if draw.random() < weather.loss:
            return
        assert self.nursery is not None
        for _ in range(1 + (draw.random() < weather.double)):
            self.nursery.start_soon(self._arrive, sender, receiver, data, draw.expovariate(1 / weather.delay_s))

    async def _arrive(self, sender: Node, receiver: Node, data: bytes, delay_s: float) -> None:
        await trio.sleep(delay_s)
        if receiver.consensus is not None and self.weather.reaches(sender.index, receiver.index):
            try:
                receiver.consensus.receive(str(sender.index), data)
            except Refused as error:
                receiver._blame(str(sender.index), str(error))

    def check(self, node: Node, number: int, block_hash: bytes) -> None:
        if self.final.setdefault(number, block_hash) != block_hash:
            raise Disagreement(f"two final blocks {number}: at node {node.index} it is 0x{block_hash.hex()}")

    async def offer(self, node: Node, raw: bytes) -> bool:
        """Hand a transaction in; whether the node acknowledged it."""
        ledger = node.ledger
        if ledger is None:
            return False
        try:
            await ledger.submit(raw, simulate=False)
        except Refused:
            return False
        except Killed:
            node.scope.cancel()
        except RuntimeError:
            assert node.ledger is not ledger, "only a dead node's store is closed"
        return node.ledger is ledger and not node.scope.cancel_called

    async def submit(self, node: Node, sender: Key, call: Call) -> None:
        """What a client does: signs with the next nonce that a node tells it, and hands it in there."""
        if node.ledger is None:
            return
        raw = world.raw_call(sender, node.ledger.account(sender.address).next_nonce, call)
        if await self.offer(node, raw) and node.is_honest:
            transaction = decoded(raw, self.network[0].network.chain_id, 1 << 40)
            self.acknowledged.add(transaction.hash)

    async def run(self, play: Callable[[Simulation], Any]) -> None:
        """Play a script of faults, then make the network whole and hold it to its promises."""
        async with trio.open_nursery() as self.nursery:
            for node in self.nodes:
                self.nursery.start_soon(node.live)
            await play(self)
            self.weather = Weather()
            self.connections += 1
            for node in self.nodes:
                node.writes_until_death = 0
            with trio.move_on_after(CALM_S) as scope:
                while not self.is_settled():  # noqa: ASYNC110 - it hangs on many nodes
                    await trio.sleep(0.5)
            assert not scope.cancelled_caught, self.report()
            assert self.proved <= self.liars, f"seed {self.seed}: evidence against an honest authority"
            self.nursery.cancel_scope.cancel()

    @property
    def liars(self) -> set[Address]:
        return {node.key.address for node in self.nodes if not node.is_honest}

    def is_settled(self) -> bool:
        """Whether every honest node has every acknowledged transaction in a final block, the same head, and evidence
        against the same liars."""
        ledgers = [node.ledger for node in self.honest]
        if any(ledger is None for ledger in ledgers):
            return False
        alive = [ledger for ledger in ledgers if ledger is not None]
        proved = {frozenset(ledger.evidence) for ledger in alive}
        self.proved = frozenset.union(*proved)
        return len({ledger.head.hash for ledger in alive}) == len(proved) == 1 and all(
            ledger.receipt(transaction_hash) for ledger in alive for transaction_hash in self.acknowledged
        )

    def report(self) -> str:
        lines = [f"seed {self.seed}: not settled, {len(self.acknowledged)} acknowledged"]
        for node in self.nodes:
            if node.ledger is None or node.consensus is None:
                lines.append(f"node {node.index}: down")
                continue
            missing = sum(node.ledger.receipt(each) is None for each in self.acknowledged)
            state = node.consensus.statistics()
            kind = "node" if node.is_honest else "liar"
            head, proved = node.ledger.head.number, len(node.ledger.evidence)
            lines.append(f"{kind} {node.index}: block {head}, {missing} missing, {proved} proved to lie, {state}")
        return "\n".join(lines)


async def storm(simulation: Simulation) -> None:
    """A drawn script: some transactions, some weather, some deaths, perhaps another set of authorities."""
    draw = simulation.draw
    for _ in range(draw.randint(3, 7)):
        weather = Weather(
            loss=draw.choice((0.0, 0.0, 0.1, 0.4)),
            double=draw.choice((0.0, 0.3)),
            delay_s=draw.choice((0.005, 0.05, 0.5, 3.0)),
        )
        if draw.random() < 0.3:
            weather.groups = {index: draw.randint(0, 1) for index in range(simulation.size)}
        simulation.weather = weather
        for _ in range(draw.randint(0, 3)):
            await simulation.submit(draw.choice(simulation.honest), draw.choice(SENDERS), world.enrol(world.address(1)))
        if draw.random() < 0.4:
            draw.choice(simulation.honest).writes_until_death = draw.randint(1, 6)
        await trio.sleep(draw.choice((0.05, 0.5, 3.0, 10.0)))


async def blackout(simulation: Simulation) -> None:
    """Again and again, as soon as a first node has a new final block, it is cut off and all others lose power: the
    worst moment for who forgets what it said."""
    draw = simulation.draw
    for _ in range(6):
        simulation.weather = Weather(delay_s=draw.choice((0.05, 0.3)))
        before = {node.index: node.checked for node in simulation.nodes}
        await simulation.submit(draw.choice(simulation.honest), draw.choice(SENDERS), world.enrol(world.address(1)))
        first: list[Node] = []
        with trio.move_on_after(20):
            while not first:
                await trio.sleep(0.002)
                first = [
                    node for node in simulation.honest if node.ledger and node.ledger.head.number > before[node.index]
                ]
        cut_off = first[0] if first else draw.choice(simulation.honest)
        simulation.weather.groups = {cut_off.index: 1}
        for node in simulation.honest:
            if node is not cut_off:
                node.scope.cancel()
        await trio.sleep(draw.choice((4.0, 12.0)))


async def conspiracy(simulation: Simulation) -> None:
    """The honest are cut in two, again and again, and see slow messages; the liars reach both sides."""
    draw = simulation.draw
    for _ in range(10):
        simulation.weather = Weather(delay_s=draw.choice((0.05, 0.3, 1.5)))
        sides = {node.index: draw.randint(0, 1) if node.is_honest else EVERYWHERE for node in simulation.nodes}
        simulation.weather.groups = sides
        for sender in SENDERS[:2]:
            await simulation.submit(draw.choice(simulation.honest), sender, world.enrol(world.address(1)))
        await trio.sleep(draw.choice((3.0, 6.0, 12.0)))


async def reform(simulation: Simulation) -> None:
    """As a storm, and in its midst the authorities change. Fewer than a third lie afterwards as well; one that is added
    has no node, so the honest have to be a quorum without it."""
    await storm(simulation)
    draw, liars, size = simulation.draw, simulation.liars, simulation.size
    removable = [key.address for key in KEYS[:size] if 3 * len(liars - {key.address}) < size - 1]
    changes: list[Call] = [RemoveAuthority(draw.choice(removable))]
    if size - len(liars) >= seal.quorum(size + 1):
        changes.append(AddAuthority(SENDERS[0].address))
    await simulation.submit(draw.choice(simulation.honest), world.ADMIN, draw.choice(changes))
    await storm(simulation)


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Let what belongs into worker threads run in turn: the virtual clock does not wait for threads."""

    async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "in_thread", inline)
        patch.setattr("ledger.chain.decode", decoded)
        yield


def simulate(
    path: Path,
    seed: int,
    size: int,
    play: Callable[[Simulation], Any] = storm,
    prepare: Callable[[Simulation], None] = lambda simulation: None,
    make_consensus: Callable[[Ledger, Key], Consensus] = lambda ledger, key: Consensus(ledger, key, PACE),
) -> Simulation:
    """One run from one seed."""
    from trio._core import _run as trio_run

    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    simulation = Simulation(path, seed, size, make_consensus)
    prepare(simulation)
    deterministic = trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        with in_one_thread():
            trio.run(simulation.run, play, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = deterministic
    return simulation
