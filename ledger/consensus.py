"""An authority at work: proposes, checks what others propose, votes, and writes what becomes final.

Around the pure `ledger.simplex` this has the clock, the executions, the vote journal and who was told what. One task
does all of it in turn, so that nothing moves under it but the head, which an import may push on at any await. Nothing
runs while nothing is pending. Knows no sockets: `attach` gives a peer's outbox, `receive` takes what it sent.

A node whose key is no authority's runs it too, and only passes on evidence until the key becomes one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import rlp
import trio

from contracts.errors import BadInput, BadPeer
from ledger import seal
from ledger.chain import Tip
from ledger.evidence import EvidenceSharing
from ledger.exchange import Envelope, Message, Proposed, Status, decode, encode, lacking, status_of
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.peers import Outbox, Peer
from ledger.resync import wait_past_lost_votes
from ledger.simplex import Proposal, Root, Simplex
from ledger.stopwatch import OwnBlocks, Stopwatch
from ledger.undecided import Undecided
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes

log = logging.getLogger(__name__)

CLOCK_LOOK_S = 1.0
"""How often the wall clock is looked at again while a block waits for its second: the clock may be set."""


@dataclass(frozen=True)
class Pace:
    """Times of consensus, in seconds."""

    timeout_s_min: float = 2.0
    """How long an iteration may take at first; twice as long with each that ends without a block."""
    timeout_s_max: float = 60.0
    fill_s: float = 0.5
    """A leader stops filling its block after this much execution, so that all others execute it in time."""
    resend_s_min: float = 0.5
    resend_s_max: float = 8.0
    status_s: float = 0.2
    """A peer is told our status at most this often, and its own are looked at no more often."""


class ConsensusStatistics(msgspec.Struct, frozen=True):
    """Agreement at one moment."""

    is_voting: bool
    iteration: int
    iterations_timed_out: int
    undecided_blocks: int
    timeout_s: float
    messages_received: int
    messages_dropped: int
    own_blocks: OwnBlocks = OwnBlocks()


class Consensus:
    """Build it, start `run`, attach peers."""

    def __init__(
        self,
        ledger: Ledger,
        key: Key | None,
        pace: Pace | None = None,
        on_offence: Callable[[str, str], None] = lambda peer, reason: None,
    ) -> None:
        """`on_offence` is told of a peer that sent what no honest one does."""
        self._ledger = ledger
        self._key = key
        self._pace = pace or Pace()
        self.on_offence = on_offence
        self._peers: dict[str, Peer] = {}
        self._sharing = EvidenceSharing(ledger, self._peers, self._blame)
        self._stopwatch = Stopwatch(ledger)
        self._stirred = trio.Event()
        self._timeout_s = self._pace.timeout_s_min
        self._iterations_timed_out = 0
        self._messages_received = 0
        self._begin_epoch()

    # Peers

    def attach(self, peer: str) -> Outbox:
        """A peer is connected: what it is to be sent comes out of the outbox."""
        found = self._peers[peer] = Peer()
        if self._simplex.is_voting:
            self._tell_status(found)
        self._sharing.stir()
        return found.outbox

    def detach(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def receive(self, peer: str, data: bytes) -> None:
        """Take in what an attached peer sent. Raises BadPeer for what is no message; what is wrong with a message's
        content is told to `on_offence` later."""
        envelope = decode(data)
        found = self._peers.get(peer)
        is_evidence = isinstance(envelope.message, Evidence)
        if found is None or not (self._simplex.is_voting or is_evidence):
            return
        self._messages_received += 1
        found.put(envelope)
        (self._sharing if is_evidence else self).stir()

    def stir(self) -> None:
        """Have everything looked at again."""
        self._stirred.set()

    def statistics(self) -> ConsensusStatistics:
        return ConsensusStatistics(
            is_voting=self._simplex.is_voting,
            iteration=self._simplex.iteration,
            iterations_timed_out=self._iterations_timed_out,
            undecided_blocks=len(self._undecided),
            timeout_s=self._timeout_s,
            messages_received=self._messages_received,
            messages_dropped=sum(peer.dropped + peer.outbox.dropped for peer in self._peers.values()),
            own_blocks=self._stopwatch.own_blocks,
        )

    def _send(self, peer: Peer, message: Message) -> None:
        peer.outbox.put(encode(self._simplex.root.epoch, message))

    def _broadcast(self, message: Message) -> None:
        data = encode(self._simplex.root.epoch, message)
        for peer in self._peers.values():
            if peer.takes_part:
                peer.outbox.put(data)

    def _tell_status(self, peer: Peer) -> None:
        now = trio.current_time()
        if now >= peer.told_at + self._pace.status_s:
            peer.told_at = now
            self._send(peer, status_of(self._simplex))

    # The loop

    async def run(self) -> None:
        """Take part for as long as it runs. Raises what the disk refused."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sharing.run)
            nursery.start_soon(self._stir_when_head_moves)
            await wait_past_lost_votes(self._ledger)
            nursery.start_soon(self._stir_when_pool_grows)
            while True:
                self._stirred = trio.Event()
                await self._work()
                with trio.move_on_at(self._next_look()):
                    await self._stirred.wait()

    async def _stir_when_head_moves(self) -> None:
        while True:
            await self._ledger.wait_head(self._ledger.head.number)
            self.stir()
            self._sharing.stir()

    async def _stir_when_pool_grows(self) -> None:
        sequence = 0
        while True:
            sequence = await self._ledger.wait_pending(sequence)
            self.stir()

    async def _work(self) -> None:
        """Look at everything that came, then do what it is time for."""
        self._follow_head()
        if not self._simplex.is_voting:
            return
        await self._read_inboxes()
        while await self._undecided.execute_next():
            self._follow_head()
        proposed = await self._propose()
        is_late = self._mind_timers() and trio.current_time() >= self._deadline
        await self._decide(proposed, is_late)
        self._resend()

    def _next_look(self) -> float:
        if not self._simplex.is_voting or not self._mind_timers():
            return float("inf")
        wait_s = min(self._seconds_to_propose(), CLOCK_LOOK_S)
        return min(self._deadline, self._resend_at, trio.current_time() + max(wait_s, 0.01))

    def _is_active(self) -> bool:
        """Whether something is pending: transactions, an undecided block, or an authority that says so by timing out.

        A block that nobody voted for when its iteration ended is no reason to go on.
        """
        simplex = self._simplex
        return (
            self._ledger.has_waiting(self._ledger.tip)
            or any(p.iteration == simplex.iteration or simplex.is_notarised(p) for p in simplex.proposals())
            or self._undecided.newest_unchecked() >= simplex.iteration
            or any(True for _ in simplex.lacks())
            or simplex.round(simplex.iteration).count(Kind.DUMMY, NO_BLOCK) > 0
        )

    def _mind_timers(self) -> bool:
        """Start an iteration's timers when something is pending, stop them when nothing is; whether they run."""
        is_active = self._is_active()
        if not is_active:
            self._deadline = self._resend_at = float("inf")
        elif self._deadline == float("inf"):
            self._start_timers()
        return is_active

    def _start_timers(self) -> None:
        now = trio.current_time()
        self._entered_at = now
        waits_s = max(0.0, self._ledger.seconds_until_child(self._parent_tip() or self._ledger.tip))
        self._deadline = now + waits_s + self._timeout_s
        self._resend_s = self._pace.resend_s_min
        self._resend_at = now + self._resend_s

    # The newest final block

    def _root(self) -> Root:
        tip = self._ledger.tip
        return Root(tip.hash, seal.iteration_of(tip.header), tip.epoch, tuple(sorted(tip.accounts.authorities)))

    def _begin_epoch(self) -> None:
        self._simplex = Simplex(self._root(), self._key, self._ledger.ballots)
        self._undecided = Undecided(self._ledger, self._simplex, self._blame)
        self._deadline = self._resend_at = self._entered_at = float("inf")
        self._resend_s = self._pace.resend_s_min
        for peer in self._peers.values():
            if self._simplex.is_voting:
                peer.told_at = float("-inf")
                self._tell_status(peer)

    def _follow_head(self) -> None:
        """Build on the newest final block, by whatever path it came."""
        root = self._root()
        if root.hash == self._simplex.root.hash:
            return
        self._stopwatch.look()
        if root.epoch != self._simplex.root.epoch:
            self._begin_epoch()
        else:
            self._simplex.advance(root)
            self._undecided.advance()
            self._deadline = float("inf")
        self._timeout_s = max(self._pace.timeout_s_min, self._timeout_s / 2)

    # What comes in

    async def _read_inboxes(self) -> None:
        """One message of each peer in turn, so that none crowds out the rest."""
        is_empty = False
        while not is_empty:
            is_empty = True
            for name, peer in list(self._peers.items()):
                if (envelope := peer.next()) is not None:
                    is_empty = False
                    await self._read(name, peer, envelope)
            await trio.lowlevel.checkpoint()

    async def _read(self, name: str, peer: Peer, envelope: Envelope) -> None:
        is_first, peer.takes_part = not peer.takes_part, True
        if envelope.epoch != self._simplex.root.epoch:
            return  # one of us is behind, and learns from its peers what is final
        if is_first:
            peer.told_at = float("-inf")
            self._tell_status(peer)
        try:
            match envelope.message:
                case Votes() as votes:
                    self._simplex.add_votes(votes)
                case Proposed() as message:
                    evidence = self._undecided.read(name, message)
                    if evidence is not None:
                        await self._sharing.keep(evidence)
                case Status() as status:
                    self._answer_status(peer, status)
        except (BadPeer, BadInput) as error:
            self._blame(name, str(error))

    def _blame(self, peer: str, reason: str) -> None:
        self.on_offence(peer, reason)

    def _answer_status(self, peer: Peer, status: Status) -> None:
        now = trio.current_time()
        if now < peer.heard_at + self._pace.status_s:
            return
        peer.heard_at = now
        for message in lacking(self._simplex, status):
            self._send(peer, message)
        theirs = {(r.iteration, s.kind, s.block_hash): s.voters for r in status.rounds for s in r.statements}
        ours = {
            (r.iteration, s.kind, s.block_hash): s.voters for r in status_of(self._simplex).rounds for s in r.statements
        }
        root = self._simplex.root.iteration
        has_more = any(voters & ~ours.get(said, 0) for said, voters in theirs.items() if said[0] > root)
        if has_more or any(True for _ in self._simplex.lacks()):
            self._tell_status(peer)

    # Proposing

    def _parent_tip(self) -> Tip | None:
        parent = self._simplex.parent()
        return None if parent is None else self._undecided.tip_of(parent.hash)

    def _seconds_to_propose(self) -> float:
        """How long until we may propose as things stand; infinite when it is not our turn or there is no need."""
        parent = self._parent_tip() if self._simplex.is_leader else None
        if parent is None:
            return float("inf")
        wait_s = self._ledger.seconds_until_child(parent)
        if self._fills(parent):
            return wait_s
        if not parent.unwritten:
            return float("inf")
        # An empty block only helps undecided ones to become final: usually the votes for them are on their way.
        return max(wait_s, self._entered_at + self._timeout_s / 2 - trio.current_time())

    def _fills(self, parent: Tip) -> bool:
        """Whether there is something to put into a child of this block, and it may have something in it."""
        return parent.epoch == self._simplex.root.epoch and self._ledger.has_waiting(parent)

    async def _propose(self) -> Proposed | None:
        """Make the block of an iteration that we lead, when it is time and there is something to put into it."""
        if not self._mind_timers() or self._seconds_to_propose() > 0:
            return None
        parent, key, iteration = self._parent_tip(), self._key, self._simplex.iteration
        assert parent is not None
        assert key is not None
        clock, began = trio.lowlevel.current_clock(), trio.current_time()
        until = began + self._pace.fill_s
        executed = await self._ledger.propose(
            key, iteration, parent, is_full=lambda: clock.current_time() > until, is_empty=not self._fills(parent)
        )
        if executed is None:
            return None
        self._stopwatch.start(executed.header, began)
        message = Proposed(rlp.encode(executed.header), tuple(t.raw for t in executed.transactions))
        self._follow_head()
        return message if self._undecided.take_in(executed, message) else None

    # Deciding

    async def _decide(self, proposed: Proposed | None, is_late: bool) -> None:
        """Vote, go on to the next iteration, and write what is final; the journal first."""
        simplex, before = self._simplex, self._simplex.iteration
        outcome = simplex.step(is_late)
        if outcome.ballots and not await self._ledger.cast(outcome.ballots, simplex.root.epoch):
            self.stir()
            return
        if proposed is not None and any(
            b.proposal == msgspec.msgpack.encode(proposed) for b in outcome.ballots.values()
        ):
            self._broadcast(proposed)  # never one that the journal does not hold: a restart would make another
        for votes in outcome.votes:
            self._broadcast(votes)
        for evidence in simplex.evidence.values():
            await self._sharing.keep(evidence)
        if is_late:
            self._iterations_timed_out += before in outcome.ballots and outcome.ballots[before].timed_out
            self._deadline = trio.current_time() + self._timeout_s
        if simplex.iteration > before:
            if any(simplex.has_dummy(iteration) for iteration in range(before, simplex.iteration)):
                self._timeout_s = min(self._pace.timeout_s_max, self._timeout_s * 2)
            self._deadline = float("inf")
            self.stir()
        if outcome.final is not None:
            await self._write(outcome.final)
            self.stir()

    async def _write(self, final: Proposal) -> None:
        """Write a block that became final after its ancestors. On a block that changes the authorities the epoch ends:
        what was built on it served to decide it."""
        simplex = self._simplex
        epoch = simplex.root.epoch
        votes = simplex.votes_for(final.iteration, Kind.FINALISE, final.hash).signatures[: simplex.quorum]
        tips = self._undecided.path(final)
        headers = [rlp.encode(tip.header) for tip in tips]
        decided = next((tip for tip in tips if tip.epoch != epoch), tips[-1])
        certificates = [
            seal.Certificate(epoch, final.hash, final.iteration, votes, tuple(headers[place + 1 :]))
            for place in range(len(decided.unwritten))
        ]
        await self._ledger.finalise(decided, certificates)
        self._follow_head()

    def _resend(self) -> None:
        """When an iteration does not end, say what we have, so that the others send the rest."""
        if trio.current_time() >= self._resend_at:
            for peer in self._peers.values():
                self._tell_status(peer)  # also one that never answered: it may have missed our first
            self._resend_s = min(self._pace.resend_s_max, self._resend_s * 2)
            self._resend_at = trio.current_time() + self._resend_s
