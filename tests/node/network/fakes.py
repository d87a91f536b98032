"""Stand-ins for the rooms around node.network: a ledger of numbered byte strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import trio

from contracts.errors import BadInput, BadPeer, Conflict
from contracts.types import NodeId, TransactionHash
from node.agreement import StateMark

GENESIS = sha256(b"the genesis of the tests").digest()


@dataclass(frozen=True)
class FakeHead:
    number: int


class FakeLedger:
    """A chain whose block n is valid if it is `block(n)`; everything else about blocks is the real ledger's to test."""

    def __init__(self, blocks: int = 0, genesis_hash: bytes = GENESIS, chain_id: int = 7) -> None:
        self.genesis_hash = genesis_hash
        self.chain_id = chain_id
        self.blocks = [block(number) for number in range(1, blocks + 1)]
        self.imported = 0
        self.import_s = 0.0
        """How long executing a block takes."""
        self.refuse_with: Exception | None = None
        self._pool: list[bytes] = []
        self._sequence = 0
        self._moved = trio.Event()
        self.history = FakeHistory(self)
        self.fast_sync = FakeFastSync(self)

    @property
    def head(self) -> FakeHead:
        return FakeHead(len(self.blocks))

    async def wait_head(self, after: int) -> FakeHead:
        while len(self.blocks) <= after:
            await self._moved.wait()
        return self.head

    async def import_blocks(self, sealed: Sequence[bytes]) -> None:
        for data in sealed:
            await trio.sleep(self.import_s)
            if self.refuse_with is not None:
                raise self.refuse_with
            if data in self.blocks:
                continue
            if not data.startswith(b"block "):
                raise BadPeer("not a sealed block")
            if data != block(len(self.blocks) + 1):
                raise Conflict("the blocks before it are missing")
            self.imported += 1
            self.grow(1)

    def grow(self, count: int) -> None:
        """Blocks out of nowhere, as from a sealer."""
        for _ in range(count):
            self.blocks.append(block(len(self.blocks) + 1))
        self._notify()

    async def submit(self, raw: bytes, simulate: bool = True) -> TransactionHash:
        await trio.lowlevel.checkpoint()
        if not raw.startswith(b"tx "):
            raise BadInput("not a signed Ethereum transaction")
        if raw not in self._pool:
            self._pool.append(raw)
            self._sequence += 1
            self._notify()
        return TransactionHash(sha256(raw).digest())

    def pending(self) -> list[bytes]:
        return list(self._pool)

    async def wait_pending(self, after: int) -> int:
        while self._sequence <= after:
            await self._moved.wait()
        return self._sequence

    async def wait_in_pool(self, raw: bytes) -> None:
        while raw not in self._pool:
            await self._moved.wait()

    def clear_pool(self) -> None:
        self._pool.clear()

    def _notify(self) -> None:
        self._moved.set()
        self._moved = trio.Event()


class FakeHistory:
    """What peers are served: receipts and state nodes are numbered byte strings as well."""

    def __init__(self, ledger: FakeLedger) -> None:
        self._ledger = ledger
        self.state_start = 1
        """The first block after which the state is here."""

    def sealed_blocks(self, start: int, count_max: int, bytes_max: int) -> list[bytes]:
        found: list[bytes] = []
        for data in self._ledger.blocks[start - 1 : start - 1 + count_max]:
            if found and sum(map(len, found)) + len(data) > bytes_max:
                break
            found.append(data)
        return found

    def parcels(
        self, start: int, count_max: int, bytes_max: int, with_receipts: bool = True
    ) -> list[tuple[bytes, bytes]]:
        found = self.sealed_blocks(start, count_max, bytes_max)
        return [(data, receipts(start + i) if with_receipts else b"") for i, data in enumerate(found)]

    def state_nodes(self, keys: Sequence[bytes], bytes_max: int) -> list[bytes]:
        known = {sha256(node).digest(): node for node in nodes(len(self._ledger.blocks))}
        if self.state_start > len(self._ledger.blocks):
            known = {}
        found = [known.get(key) for key in keys]
        return [node for node in found[: found.index(None) if None in found else len(found)] if node is not None]


NODES = 5_000
"""Of the state after each block."""


def receipts(number: int) -> bytes:
    return b"receipts %d" % number


def nodes(number: int) -> list[bytes]:
    """The state after a block."""
    return [b"node %d of block %d" % (place, number) for place in range(NODES)]


class FakeFastSync:
    """Wants `nodes` after the newest block it staged."""

    def __init__(self, ledger: FakeLedger) -> None:
        self._ledger = ledger
        self.staged: list[bytes] = []
        self.given: set[bytes] = set()
        self._left: list[bytes] | None = None
        self._asked: set[bytes] = set()

    @property
    def is_possible(self) -> bool:
        return not self._ledger.blocks

    @property
    def number(self) -> int:
        return len(self.staged) if self.is_possible else len(self._ledger.blocks)

    @property
    def nodes_seen(self) -> int:
        return len(self.given)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def stage(self, parcels: Sequence[tuple[bytes, bytes]]) -> None:
        await trio.lowlevel.checkpoint()
        for data, proof in parcels:
            if data in self.staged:
                continue
            number = len(self.staged) + 1
            if (data, proof) != (block(number), receipts(number)):
                raise BadPeer(f"not block {number} with its receipts")
            self.staged.append(data)
            self._left = None
            self.given.clear()
            self._asked.clear()

    async def wanted(self, count_max: int) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        if not self.is_possible:
            return []
        if self._left is None:
            self._left = [sha256(node).digest() for node in nodes(len(self.staged))]
        asked, self._left = self._left[:count_max], self._left[count_max:]
        self._asked |= set(asked)
        if not asked and not self._asked:
            self._ledger.grow(len(self.staged))
        return asked

    async def give(self, asked: Sequence[bytes], nodes: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        found = [sha256(node).digest() for node in nodes]
        if found != list(asked[: len(found)]):
            raise BadPeer("not the nodes asked for")
        self._asked -= set(found)
        self.given |= set(found)

    async def put_back(self, asked: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        back = [key for key in asked if key in self._asked]
        self._asked -= set(back)
        if self._left is not None:
            self._left += back


def block(number: int) -> bytes:
    return b"block %d " % number + bytes(100)


async def until(condition: Callable[[], object]) -> None:
    """Wait for a condition that nothing signals; the test's deadline bounds it."""
    while not condition():
        await trio.lowlevel.checkpoint()


class FakeOutbox:
    def __init__(self) -> None:
        self.sender, self.receiver = trio.open_memory_channel[bytes](100)

    async def take(self, bytes_max: int, count_max: int) -> list[bytes]:
        return [await self.receiver.receive()]


class FakeState:
    """Says which state it has, and takes down what others say."""

    def __init__(self) -> None:
        self.own: tuple[StateMark, ...] = ()
        self.compared: list[tuple[NodeId, tuple[StateMark, ...]]] = []

    async def marks(self) -> tuple[StateMark, ...]:
        return self.own

    async def compare(self, node_id: NodeId, theirs: tuple[StateMark, ...]) -> None:
        self.compared.append((node_id, theirs))


class FakeConsensus:
    """Takes down what peers say, and says to each what it is told to; what it means is the ledger's to test."""

    def __init__(self) -> None:
        self.on_offence: Callable[[str, str], None] = lambda peer, reason: None
        self.outboxes: dict[str, FakeOutbox] = {}
        self.received: list[tuple[str, bytes]] = []

    def attach(self, peer: str) -> FakeOutbox:
        self.outboxes[peer] = FakeOutbox()
        return self.outboxes[peer]

    def detach(self, peer: str) -> None:
        del self.outboxes[peer]

    def receive(self, peer: str, data: bytes) -> None:
        if not data.startswith(b"word "):
            raise BadPeer("no word of consensus")
        self.received.append((peer, data))
