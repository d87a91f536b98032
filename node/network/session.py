"""One connected peer: greet it, pull blocks from it, forward transactions and the words of consensus to it.

Knows the messages and the ledger; not how connections are made (`control` does) nor what happens to a peer that
misbehaves: that is raised as BadPeer and judged by the caller.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from contracts.errors import BadInput, BadPeer, NotAllowed
from contracts.types import NodeId
from ledger.rate import Rate
from node.network.addresses import DataAddress, parse_data
from node.network.messages import (
    BLOCKS_BYTES_MAX,
    CONSENSUS_BYTES_MAX,
    CONSENSUS_MAX,
    LONG_POLL_S_MAX,
    NODES_BYTES_MAX,
    Answer,
    Blocks,
    Deliver,
    Delivered,
    GetBlocks,
    GetNodes,
    Hello,
    Nodes,
    Request,
    Submitted,
    SubmitTransactions,
    TurnedAway,
    Welcome,
)
from node.network.outbox import Outbox
from node.network.ports import ConsensusPort, LedgerPort, StatePort
from node.network.sync import Sync

log = logging.getLogger(__name__)

LAG_S_MAX: Final = 60.0
"""A peer whose head stays below ours for longer than this is told of: it is stuck, or serves an old chain."""

TOLD_S: Final = 2.0
"""How long a transaction that everybody is told has to arrive, before it is sent to a peer of its own."""

LATER_BLOCKS: Final = 64
"""How far a peer has to be ahead before it says so, if it is not asked for every block."""

EMPTY_ANSWER_PAUSE_S: Final = 1.0
"""An answer without blocks normally takes the whole long poll; a peer that answers sooner is not asked more often."""

Ask = Callable[[Request, float], Awaitable[Answer]]
"""Sends a request to the peer and returns its answer; the number is how long the peer may wait before answering."""


@dataclass(frozen=True, slots=True)
class SyncLimits:
    """Waits of the control plane; tests shorten them."""

    long_poll_s: float = 20.0
    answer_s_max: float = 30.0
    redial_s_max: float = 5.0
    """How soon a changed list of members is noticed."""
    requests_per_s: float = 200.0
    """Of one peer, on average. An honest one waits for each answer, and asks less often than this over any link."""
    requests_burst: float = 2_000.0
    fast_blocks_min: int | None = None
    """How far behind a new node takes the chain in without executing it; None: it always executes."""


class Session:
    """The conversation with one connected peer. `sync` is shared by all sessions of a node."""

    def __init__(
        self,
        node_id: NodeId,
        ledger: LedgerPort,
        consensus: ConsensusPort,
        state: StatePort,
        ask: Ask,
        sync: Sync,
        limits: SyncLimits,
        is_told: Callable[[], bool],
        is_asked: Callable[[], bool],
    ) -> None:
        """`is_told`: whether the peer hears what this node tells everybody. `is_asked`: whether to ask it for every
        block all the same."""
        assert 0 < limits.long_poll_s <= LONG_POLL_S_MAX
        self.node_id = node_id
        self.head_number = 0
        self.data_address: DataAddress | None = None
        self.is_welcome = False
        self.offence = ""
        """How one of the peer's requests broke the protocol, once one did."""
        self.mismatch = ""
        """Why the peer is of another network, once one of its requests showed it."""
        self.behind_since: float | None = None
        """When it first answered with a head below ours, while it still does."""
        self.blocks_received = 0
        self.transactions_sent = 0
        self.outbox = Outbox()
        self.rate = Rate(limits.requests_per_s, limits.requests_burst)
        self.scope = trio.CancelScope()
        self._ledger = ledger
        self._consensus = consensus
        self._state = state
        self._ask = ask
        self._sync = sync
        self._long_poll_s = limits.long_poll_s
        self._is_told = is_told
        self._is_asked = is_asked
        self._poll = trio.CancelScope()

    async def greet(self, data_endpoint: str | None) -> None:
        """Say hello. NotAllowed with the peer's reason when it turns us away."""
        ledger = self._ledger
        marks = await self._state.marks()
        hello = Hello(ledger.genesis_hash, ledger.chain_id, ledger.head.number, data_endpoint, marks)
        answer = await self._request(hello, 0)
        if not isinstance(answer, Welcome):
            raise BadPeer(f"answered Hello with {type(answer).__name__}")
        await self.learn(answer)
        self.is_welcome = True

    async def learn(self, about: Hello | Welcome) -> None:
        """Take in what the peer says about itself."""
        self.head_number = about.head_number
        if about.data_endpoint is not None:
            try:
                self.data_address = parse_data(about.data_endpoint)
            except BadInput as error:
                raise BadPeer(f"its data endpoint: {error}") from None
        await self._state.compare(self.node_id, about.marks)

    async def pull(self) -> None:
        """Take in what the peer has and we lack, for as long as it runs.

        At the head every session holds a long poll for the peer's head; some of them for the next block, so that it is
        heard of at once though nobody be told of it. While peers are ahead, `sync` says who fetches what: no block is
        sent here twice.
        """
        while True:
            if self.head_number > self._ledger.head.number:
                await self._sync.follow(self)
            else:
                await self.wait_for_more(self._ledger.head.number, 1 if self._is_asked() else LATER_BLOCKS)

    async def wait_for_more(self, number: int, blocks: int = 1) -> None:
        """Learn the peer's head once it is `blocks` above `number`, or what it is after a while."""
        asked = trio.current_time()
        with trio.CancelScope() as self._poll:
            answer = await self._ask_blocks(number + blocks, 0, self._long_poll_s, with_receipts=False)
            await self._state.compare(self.node_id, answer.marks)
            if answer.head_number <= number:
                await trio.sleep_until(asked + EMPTY_ANSWER_PAUSE_S)

    def hear_of(self, number: int) -> None:
        """The peer told that it has block `number`."""
        if number > self.head_number:
            self._note_head(number)
            if number > self._ledger.head.number:
                self._poll.cancel()

    async def _ask_blocks(self, start: int, count: int, wait_s: float, *, with_receipts: bool) -> Blocks:
        request = GetBlocks(self._ledger.genesis_hash, start, count, wait_s, with_receipts)
        answer = await self._request(request, wait_s)
        if not isinstance(answer, Blocks):
            raise BadPeer(f"answered GetBlocks with {type(answer).__name__}")
        if len(answer.blocks) > count or (with_receipts and len(answer.receipts) != len(answer.blocks)):
            raise BadPeer(f"sent {len(answer.blocks)} blocks and {len(answer.receipts)} receipts for {count} blocks")
        self._note_head(answer.head_number)
        self.blocks_received += len(answer.blocks)
        return answer

    # As a source of what we lack; see node.network.sync

    async def fetch_blocks(self, start: int, count: int, with_receipts: bool) -> list[tuple[bytes, bytes]]:
        answer = await self._ask_blocks(start, count, 0, with_receipts=with_receipts)
        if not answer.blocks:
            raise BadPeer(f"says its head is {answer.head_number}, but has no block {start}")
        if not with_receipts:
            return [(block, b"") for block in answer.blocks]
        return list(zip(answer.blocks, answer.receipts, strict=True))

    async def fetch_nodes(self, keys: Sequence[bytes]) -> tuple[bytes, ...]:
        answer = await self._request(GetNodes(self._ledger.genesis_hash, tuple(keys)), 0)
        if not isinstance(answer, Nodes):
            raise BadPeer(f"answered GetNodes with {type(answer).__name__}")
        return answer.nodes

    def _note_head(self, head_number: int) -> None:
        """A peer that stays behind is slow, or keeps blocks from us: what the others have tells."""
        self.head_number = head_number
        if head_number >= self._ledger.head.number:
            self.behind_since = None
        elif self.behind_since is None:
            self.behind_since = trio.current_time()

    def is_lagging(self) -> bool:
        """Whether it has been behind for longer than catching up takes."""
        return self.behind_since is not None and trio.current_time() - self.behind_since > LAG_S_MAX

    async def forward(self) -> None:
        """Send the peer what is in the pool, now and as it comes, for as long as it runs."""
        ledger = self._ledger
        sequence = 0
        while True:
            with trio.move_on_at(self.outbox.next_due()):
                sequence = await ledger.wait_pending(sequence)
            while batch := self.outbox.take(ledger.pending(), trio.current_time(), TOLD_S if self._is_told() else 0):
                answer = await self._request(SubmitTransactions(ledger.genesis_hash, tuple(batch)), 0)
                if not isinstance(answer, Submitted) or len(answer.refusals) != len(batch):
                    raise BadPeer(f"answered {len(batch)} transactions with {type(answer).__name__}")
                self.transactions_sent += len(batch)
                for reason in filter(None, answer.refusals):
                    log.debug("%s refused a transaction: %s", self.node_id, reason)

    async def deliver(self) -> None:
        """Send the peer what consensus has for it, for as long as it runs."""
        outbox = self._consensus.attach(self.node_id)
        try:
            while True:
                messages = await outbox.take(CONSENSUS_BYTES_MAX, CONSENSUS_MAX)
                answer = await self._request(Deliver(self._ledger.genesis_hash, tuple(messages)), 0)
                if not isinstance(answer, Delivered):
                    raise BadPeer(f"answered Deliver with {type(answer).__name__}")
        finally:
            self._consensus.detach(self.node_id)

    async def answer_blocks(self, request: GetBlocks) -> Blocks:
        """Serve the peer's own pull."""
        ledger = self._ledger
        if ledger.head.number < request.start:
            with trio.move_on_after(request.wait_s):
                await ledger.wait_head(request.start - 1)
        read, extent = ledger.history.parcels, (request.start, request.count, BLOCKS_BYTES_MAX)
        parcels = await trio.to_thread.run_sync(read, *extent, request.with_receipts)
        receipts = tuple(found for _, found in parcels) if request.with_receipts else ()
        # The head is read after the blocks: it may have moved meanwhile, and is never below them.
        blocks = tuple(block for block, _ in parcels)
        return Blocks(ledger.head.number, blocks, await self._state.marks(), receipts)

    async def answer_nodes(self, request: GetNodes) -> Nodes:
        """Serve the peer's fast sync."""
        read = self._ledger.history.state_nodes
        return Nodes(tuple(await trio.to_thread.run_sync(read, request.keys, NODES_BYTES_MAX)))

    async def _request(self, request: Request, wait_s: float) -> Answer:
        answer = await self._ask(request, wait_s)
        if isinstance(answer, TurnedAway):
            raise NotAllowed(f"{self.node_id} turned us away: {answer.reason}")
        return answer
