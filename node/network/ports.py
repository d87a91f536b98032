"""What this room needs from its neighbours, said as Protocols so that it can be tested without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from contracts.types import NodeId, TransactionHash
from node.agreement import StateMark


class HeadPort(Protocol):
    """The newest final block."""

    @property
    def number(self) -> int: ...


class HistoryPort(Protocol):
    """The part of `ledger.history.History` that peers are served from."""

    def parcels(self, start: int, count_max: int, bytes_max: int, with_receipts: bool) -> list[tuple[bytes, bytes]]: ...

    def state_nodes(self, keys: Sequence[bytes], bytes_max: int) -> list[bytes]: ...


class FastSyncPort(Protocol):
    """`ledger.fastsync.FastSync`."""

    @property
    def is_possible(self) -> bool: ...

    @property
    def number(self) -> int: ...

    @property
    def nodes_seen(self) -> int: ...

    async def open(self) -> None: ...

    async def stage(self, parcels: Sequence[tuple[bytes, bytes]]) -> None: ...

    async def wanted(self, count_max: int) -> list[bytes]: ...

    async def give(self, asked: Sequence[bytes], nodes: Sequence[bytes]) -> None: ...

    async def put_back(self, asked: Sequence[bytes]) -> None: ...


class LedgerPort(Protocol):
    """The part of `ledger.ledger.Ledger` that moving blocks and transactions needs."""

    @property
    def genesis_hash(self) -> bytes: ...

    @property
    def chain_id(self) -> int: ...

    @property
    def head(self) -> HeadPort: ...

    async def wait_head(self, after: int) -> HeadPort: ...

    @property
    def history(self) -> HistoryPort: ...

    @property
    def fast_sync(self) -> FastSyncPort: ...

    async def import_blocks(self, sealed: Sequence[bytes]) -> None: ...

    async def submit(self, raw: bytes, simulate: bool = True) -> TransactionHash: ...

    def pending(self) -> list[bytes]: ...

    async def wait_pending(self, after: int) -> int: ...


class OutboxPort(Protocol):
    """What one peer is to be sent."""

    async def take(self, bytes_max: int, count_max: int) -> list[bytes]: ...


class ConsensusPort(Protocol):
    """The part of `ledger.consensus.Consensus` that moving its messages needs."""

    on_offence: Callable[[str, str], None]

    def attach(self, peer: str) -> OutboxPort: ...

    def detach(self, peer: str) -> None: ...

    def receive(self, peer: str, data: bytes) -> None: ...


class StatePort(Protocol):
    """The state folded from the ledger, as far as nodes compare it."""

    async def marks(self) -> tuple[StateMark, ...]: ...

    async def compare(self, node_id: NodeId, theirs: tuple[StateMark, ...]) -> None: ...


class StartedPort(Protocol):
    """trio's TaskStatus, for a task that reports the port it listens on."""

    def started(self, value: int, /) -> None: ...
