"""Stand-ins for the rooms around node.network: a ledger of numbered byte strings."""

from collections.abc import Callable
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
        self.refuse_with: Exception | None = None
        self._pool: list[bytes] = []
        self._sequence = 0
        self._moved = trio.Event()

    @property
    def head(self) -> FakeHead:
        return FakeHead(len(self.blocks))

    async def wait_head(self, after: int) -> FakeHead:
        while len(self.blocks) <= after:
            await self._moved.wait()
        return self.head

    def sealed_blocks(self, start: int, count_max: int, bytes_max: int) -> list[bytes]:
        found: list[bytes] = []
        for data in self.blocks[start - 1 : start - 1 + count_max]:
            if found and sum(map(len, found)) + len(data) > bytes_max:
                break
            found.append(data)
        return found

    async def import_sealed(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuse_with is not None:
            raise self.refuse_with
        if data in self.blocks:
            return
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
