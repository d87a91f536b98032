"""What this node tells the whole network unasked, and what it makes of what peers tell: transactions and blocks.

A short cut only: what is lost here comes from peer to peer, a little later (`session`, `sync`). What a peer tells goes
on to others once this node's ledger has taken it, so nothing wrong gets further than one node.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

import trio

from contracts.errors import BadPeer, Refused
from contracts.types import NodeId
from node.network.mesh import MESSAGE_BYTES_MAX
from node.network.messages import (
    TRANSACTIONS_MAX,
    NewBlock,
    NewHead,
    Transactions,
    decode_told,
    encode,
)
from node.network.ports import LedgerPort
from node.network.session import Session
from node.network.sync import Sync

log = logging.getLogger(__name__)

GATHER_S: Final = 0.02
"""What comes within this time of the last that was told is told together."""
BATCH_BYTES_MAX: Final = MESSAGE_BYTES_MAX // 2
BLOCKS_TOLD_MAX: Final = 4
"""Of blocks that became final at once, the newest; the others are pulled."""


def topic(genesis_hash: bytes) -> str:
    return f"/aigen/{genesis_hash.hex()}/1"


class Gossip:
    """`nursery.start_soon(gossip.run)`; `take` is the mesh's."""

    def __init__(
        self,
        ledger: LedgerPort,
        sync: Sync,
        tell: Callable[[bytes], Awaitable[None]],
        session: Callable[[NodeId], Session | None],
        submit: Callable[[Session, bytes], Awaitable[str]],
    ) -> None:
        """`submit`: a peer's transaction for the pool; why it is refused, or an empty string."""
        self._ledger = ledger
        self._sync = sync
        self._tell = tell
        self._session = session
        self._submit = submit
        self._known: set[bytes] = set()
        """Transactions of the pool that were told, by this node or to it."""
        self._number = ledger.head.number
        """The newest block that was told."""

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_transactions)
            nursery.start_soon(self._tell_blocks)

    # Telling

    async def _tell_transactions(self) -> None:
        sequence = 0
        while True:
            sequence = await self._ledger.wait_pending(sequence)
            pending = self._ledger.pending()
            new = [raw for raw in pending if raw not in self._known]
            self._known.intersection_update(pending)
            self._known.update(new)
            for batch in _batches(new):
                data = encode(Transactions(batch))
                if len(data) <= MESSAGE_BYTES_MAX:
                    await self._tell(data)
            await trio.sleep(GATHER_S)

    async def _tell_blocks(self) -> None:
        while True:
            head = (await self._ledger.wait_head(self._number)).number
            first, self._number = max(self._number + 1, head - BLOCKS_TOLD_MAX + 1), head
            if self._sync.is_any_ahead():  # old news
                continue
            read = self._ledger.history.parcels
            parcels = await trio.to_thread.run_sync(read, first, head - first + 1, MESSAGE_BYTES_MAX, False)
            for number, (sealed, _) in enumerate(parcels, first):
                data = encode(NewBlock(number, sealed))
                await self._tell(data if len(data) <= MESSAGE_BYTES_MAX else encode(NewHead(number)))

    # Being told

    async def take(self, node_id: NodeId, data: bytes) -> bool:
        """Whether a peer's message is new and right. Raises BadPeer when it is wrong or one of too many for nothing."""
        session = self._session(node_id)
        if session is None or not session.is_welcome:
            return False
        match decode_told(data):
            case Transactions() as message:
                is_useful = await self._take_transactions(session, message.transactions)
            case NewBlock() as message:
                is_useful = await self._take_block(session, message)
            case NewHead() as message:
                session.hear_of(message.number)
                is_useful = False
        if not is_useful and not session.rate.take(trio.current_time()):
            raise BadPeer(f"more than {session.rate.per_s:.0f} messages a second that are of no use")
        return is_useful

    async def _take_transactions(self, session: Session, transactions: Sequence[bytes]) -> bool:
        taken = 0
        for raw in transactions:
            if raw in self._known:
                session.outbox.received(raw, trio.current_time())
            elif reason := await self._submit(session, raw):
                log.debug("%s told a transaction that is refused: %s", session.node_id, reason)
            else:
                self._known.add(raw)
                taken += 1
        return taken > 0

    async def _take_block(self, session: Session, told: NewBlock) -> bool:
        """A block is taken in if it is the next one; one further on says that its sender is ahead."""
        head = self._ledger.head.number
        if told.number > head + 1:
            session.hear_of(told.number)
        if told.number != head + 1:
            return False
        try:
            await self._ledger.import_blocks([told.sealed])
        except BadPeer:
            raise
        except Refused as error:  # no offence: our own ledger failed, or is not that far
            log.debug("block %d, told by %s, is not taken in: %s", told.number, session.node_id, error)
        if self._ledger.head.number < told.number:
            return False
        is_ours_to_tell = self._number < told.number
        self._number = max(self._number, told.number)
        session.hear_of(told.number)
        self._sync.stir()
        return is_ours_to_tell


def _batches(transactions: Sequence[bytes]) -> Iterator[tuple[bytes, ...]]:
    """In their order, in messages of at most TRANSACTIONS_MAX and about BATCH_BYTES_MAX."""
    left, size_bytes = iter(transactions), 0
    batch: list[bytes] = []
    for raw in left:
        if batch and (len(batch) == TRANSACTIONS_MAX or size_bytes + len(raw) > BATCH_BYTES_MAX):
            yield tuple(batch)
            batch, size_bytes = [], 0
        batch.append(raw)
        size_bytes += len(raw)
    if batch:
        yield tuple(batch)
