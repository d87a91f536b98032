"""Simplex: how the authorities agree on one chain. The pure part: votes and proposals in, decisions out.

Chan and Pass, "Simplex Consensus: A Simple and Fast Consensus Protocol", TCC 2023 (eprint 2023/463). In each iteration
one leader proposes a block on a notarised chain; a proposal or the iteration's dummy with a quorum of votes is
notarised and ends the iteration; a block is final, with its ancestors, when a quorum that never voted for the dummy of
its iteration says so. What is particular here:

- A dummy is a gap in the iterations and no block.
- What an authority says is journalled before it leaves, so the two rules hold across restarts: in one iteration it
  votes for one block at most, and never both for the dummy and to finalise.
- Votes count within one epoch, the time of one set of authorities. A block that changes the authorities is decided by
  those before it. Until it is final only empty blocks can be built on it (`ledger.consensus`): they let it become
  final as any block does, and then end with their epoch: the new authorities go on from the block that made them.
  Merely waiting for it would not do: once some timed out in its iteration, only a descendant can make it final.

Knows no clock, no network, no storage and no execution: a proposal comes here once it was found valid.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from contracts.errors import BadPeer
from contracts.types import Address
from ledger import seal
from ledger.keys import Key, recover
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes, contradict, digest, sign

WINDOW = 64
"""Iterations ahead of ours of which quorums are taken; who is further behind takes more steps."""

LOOKAHEAD = 2
"""Iterations ahead of ours of which single votes and proposals are taken: others get there a moment before us."""

STATEMENTS_PER_VOTER_MAX = 4
"""What is kept of one authority in one iteration beyond quorums: an honest one says three things at most."""


class Ballot(msgspec.Struct, frozen=True, array_like=True):
    """What this authority has said in one iteration; the journal's entry."""

    notarised: bytes = b""
    """The hash of the block it voted for."""
    proposal: bytes = b""
    """That block, encoded: it must come back even after every authority lost power at once."""
    timed_out: bool = False
    """It voted for the dummy."""
    finalised: bytes = b""
    """The hash of the block it voted to finalise."""

    def statements(self) -> Iterator[tuple[Kind, bytes]]:
        if self.notarised:
            yield Kind.NOTARISE, self.notarised
        if self.timed_out:
            yield Kind.DUMMY, NO_BLOCK
        if self.finalised:
            yield Kind.FINALISE, self.finalised


@dataclass(frozen=True)
class Proposal:
    """A valid block over the newest final one, as far as agreement is concerned."""

    hash: bytes
    parent_hash: bytes
    iteration: int
    encoded: bytes


@dataclass(frozen=True)
class Root:
    """The newest final block, and who decides on what follows it."""

    hash: bytes
    iteration: int
    epoch: bytes
    authorities: tuple[Address, ...]


@dataclass
class Round:
    """What is known of one iteration."""

    votes: dict[tuple[Kind, bytes], dict[Address, bytes]] = field(default_factory=dict)
    """Signatures by what they say and who says it."""
    proposals: dict[bytes, Proposal] = field(default_factory=dict)
    """By hash: the first, and those that a quorum voted for."""

    def count(self, kind: Kind, block_hash: bytes) -> int:
        return len(self.votes.get((kind, block_hash), ()))

    def said_by(self, voter: Address) -> list[tuple[Kind, bytes]]:
        return [statement for statement, signatures in self.votes.items() if voter in signatures]


@dataclass
class Outcome:
    """What a step led to. `ballots` are to be on disk before `votes` leave or anybody learns what is final."""

    ballots: dict[int, Ballot] = field(default_factory=dict)
    votes: list[Votes] = field(default_factory=list)
    """To tell everyone: our own votes, and the quorums that ended iterations."""
    final: Proposal | None = None
    """The newest block that became final."""


class Simplex:
    """One authority's view of an epoch (or, without a key of it, a witness's). Call `step` after any change."""

    def __init__(self, root: Root, key: Key | None, ballots: Mapping[int, Ballot]) -> None:
        self.root = root
        self._key = key if key is not None and key.address in root.authorities else None
        self.quorum = seal.quorum(len(root.authorities))
        self.iteration = root.iteration + 1
        self.rounds: dict[int, Round] = {}
        self.ballots: dict[int, Ballot] = {}
        self.evidence: dict[Address, Evidence] = {}
        """The first contradiction of each voter."""
        if self._key is not None:
            self.ballots |= {iteration: ballot for iteration, ballot in ballots.items() if iteration > root.iteration}
            for iteration, ballot in self.ballots.items():
                for kind, block_hash in ballot.statements():
                    self._count_own(iteration, kind, block_hash)

    # What is known

    def round(self, iteration: int) -> Round:
        return self.rounds.get(iteration) or Round()

    def proposals(self) -> Iterator[Proposal]:
        return (proposal for round_ in self.rounds.values() for proposal in round_.proposals.values())

    def find(self, block_hash: bytes) -> Proposal | None:
        return next((proposal for proposal in self.proposals() if proposal.hash == block_hash), None)

    @property
    def is_voting(self) -> bool:
        """Whether our key is one of the authorities'."""
        return self._key is not None

    @property
    def is_leader(self) -> bool:
        """Whether it is our turn to propose, and we have not yet."""
        if self._key is None or self.ballot.notarised:
            return False
        return self._key.address == seal.leader(self.root.authorities, self.iteration)

    @property
    def ballot(self) -> Ballot:
        """What we said in the current iteration."""
        return self.ballots.get(self.iteration, Ballot())

    def has_dummy(self, iteration: int) -> bool:
        return self.round(iteration).count(Kind.DUMMY, NO_BLOCK) >= self.quorum

    def is_decided(self, iteration: int, block_hash: bytes) -> bool:
        """Whether a quorum voted for a block, known or not."""
        round_ = self.round(iteration)
        return max(round_.count(kind, block_hash) for kind in (Kind.NOTARISE, Kind.FINALISE)) >= self.quorum

    def is_notarised(self, proposal: Proposal) -> bool:
        return self.round(proposal.iteration).count(Kind.NOTARISE, proposal.hash) >= self.quorum

    def wants(self, iteration: int, block_hash: bytes) -> bool:
        """Whether a proposal would be of use: the first of its iteration, or one that a quorum voted for."""
        if not self.root.iteration < iteration <= self.iteration:
            return False
        proposals = self.round(iteration).proposals
        return block_hash not in proposals and (not proposals or self.is_decided(iteration, block_hash))

    def lacks(self) -> Iterator[tuple[int, bytes]]:
        """Blocks that a quorum voted for and that we have not seen."""
        for iteration, round_ in self.rounds.items():
            for (kind, block_hash), voters in round_.votes.items():
                is_block = kind is not Kind.DUMMY
                if is_block and block_hash not in round_.proposals and len(voters) >= self.quorum:
                    yield iteration, block_hash

    def parent(self) -> Proposal | Root | None:
        """What a proposal of the current iteration extends: the newest notarised block, else the root; None while an
        iteration in between is open, as it is for a moment after a restart."""
        for iteration in range(self.iteration - 1, self.root.iteration, -1):
            for proposal in self.round(iteration).proposals.values():
                if self.is_notarised(proposal):
                    return proposal
            if not self.has_dummy(iteration):
                return None
        return self.root

    def path(self, proposal: Proposal) -> list[Proposal]:
        """The blocks after the root up to this one, oldest first."""
        found = [proposal]
        while found[-1].parent_hash != self.root.hash:
            parent = self.find(found[-1].parent_hash)
            assert parent is not None, "a proposal is taken in after its parent"
            found.append(parent)
        return found[::-1]

    def telling(self, iteration: int) -> Iterator[tuple[Kind, bytes]]:
        """What was said of an iteration that may be news to others: of one that is over only what decides."""
        round_ = self.round(iteration)
        for kind, block_hash in round_.votes:
            statement = Kind.NOTARISE if kind is Kind.FINALISE else kind
            if iteration >= self.iteration or round_.count(statement, block_hash) >= self.quorum:
                yield kind, block_hash

    def votes_for(self, iteration: int, kind: Kind, block_hash: bytes, without: Container[Address] = ()) -> Votes:
        """The known votes that say this, in ascending order of who says it."""
        signatures = self.round(iteration).votes[kind, block_hash]
        voters = sorted(voter for voter in signatures if voter not in without)
        return Votes(kind, iteration, block_hash, tuple(signatures[voter] for voter in voters))

    # What comes in

    def add_votes(self, votes: Votes) -> bool:
        """Count votes; whether any was new. Raises BadPeer, or BadInput for a signature that is none, for what no
        authority signed. Votes of iterations that are over, or far ahead, are left alone."""
        if not self.root.iteration < votes.iteration <= self.iteration + WINDOW:
            return False
        if votes.kind is Kind.DUMMY and votes.block_hash != NO_BLOCK:
            raise BadPeer(f"a vote for the dummy of iteration {votes.iteration} names a block")
        known = self.round(votes.iteration).votes.get((votes.kind, votes.block_hash), {}).values()
        if votes.iteration > self.iteration + LOOKAHEAD and len({*known, *votes.signatures}) < self.quorum:
            return False
        said = digest(self.root.epoch, votes.kind, votes.iteration, votes.block_hash)
        new = {recover(said, signature): signature for signature in set(votes.signatures) - set(known)}
        if strangers := new.keys() - set(self.root.authorities):
            raise BadPeer(f"0x{min(strangers).hex()} voted in iteration {votes.iteration} and is no authority")
        # Whatever else its voters have said: what a quorum says holds.
        decides = len({*new, *known}) >= self.quorum
        counted = [
            self._count(votes.iteration, votes.kind, votes.block_hash, voter, signature, decides)
            for voter, signature in new.items()
        ]
        return any(counted)

    def _count(
        self, iteration: int, kind: Kind, block_hash: bytes, voter: Address, signature: bytes, decides: bool = False
    ) -> bool:
        """Take in a vote; whether it was new. One that contradicts another of its voter's counts too, and the two are
        evidence."""
        round_ = self.rounds.setdefault(iteration, Round())
        said = round_.said_by(voter)
        if (kind, block_hash) in said:
            return False
        for other_kind, other_hash in said:
            if voter not in self.evidence and contradict((kind, block_hash), (other_kind, other_hash)):
                other = Votes(other_kind, iteration, other_hash, (round_.votes[other_kind, other_hash][voter],))
                this = Votes(kind, iteration, block_hash, (signature,))
                self.evidence[voter] = Evidence(self.root.epoch, other, this)
        if len(said) >= STATEMENTS_PER_VOTER_MAX and not decides:
            return False
        round_.votes.setdefault((kind, block_hash), {})[voter] = signature
        return True

    def add_proposal(self, proposal: Proposal) -> None:
        """Take in a valid proposal that is wanted, after its parent."""
        assert self.wants(proposal.iteration, proposal.hash)
        assert proposal.parent_hash == self.root.hash or self.find(proposal.parent_hash) is not None
        self.rounds.setdefault(proposal.iteration, Round()).proposals[proposal.hash] = proposal

    # What follows

    def step(self, timed_out: bool = False) -> Outcome:
        """Everything that what is known leads to; `timed_out`: the current iteration took too long."""
        outcome, iteration = Outcome(), self.iteration
        while self._vote(outcome) or self._end_iteration(outcome):
            pass
        is_late = timed_out and self.iteration == iteration
        # After a restart we may stand in an iteration again that we finalised before it.
        if is_late and self._key is not None and not (self.ballot.timed_out or self.ballot.finalised):
            self._say(outcome, Kind.DUMMY, NO_BLOCK, timed_out=True)
            while self._end_iteration(outcome) or self._vote(outcome):
                pass
        outcome.final = self._newest_final()
        return outcome

    def _vote(self, outcome: Outcome) -> bool:
        """Vote for the current iteration's proposal."""
        if self._key is None or self.ballot.notarised:
            return False
        for proposal in self.round(self.iteration).proposals.values():
            if self._may_extend(proposal):
                changes = {"notarised": proposal.hash, "proposal": proposal.encoded}
                self._say(outcome, Kind.NOTARISE, proposal.hash, **changes)
                return True
        return False

    def _may_extend(self, proposal: Proposal) -> bool:
        """Whether what the proposal builds on is notarised."""
        after = self.root.iteration
        if proposal.parent_hash != self.root.hash:
            parent = self.find(proposal.parent_hash)
            assert parent is not None
            if not self.is_notarised(parent):
                return False
            after = parent.iteration
        return all(self.has_dummy(iteration) for iteration in range(after + 1, proposal.iteration))

    def _end_iteration(self, outcome: Outcome) -> bool:
        """Go on when the current iteration has a notarised block, or a notarised dummy."""
        iteration = self.iteration
        notarised = next((p for p in self.round(iteration).proposals.values() if self.is_notarised(p)), None)
        if notarised is not None:
            if self._key is not None and not self.ballot.timed_out and not self.ballot.finalised:
                self._say(outcome, Kind.FINALISE, notarised.hash, finalised=notarised.hash)
            outcome.votes.append(self.votes_for(iteration, Kind.NOTARISE, notarised.hash))
        elif self.has_dummy(iteration):
            outcome.votes.append(self.votes_for(iteration, Kind.DUMMY, NO_BLOCK))
        else:
            return False
        self.iteration += 1
        return True

    def _newest_final(self) -> Proposal | None:
        final = (
            proposal
            for proposal in self.proposals()
            if self.round(proposal.iteration).count(Kind.FINALISE, proposal.hash) >= self.quorum
        )
        return max(final, key=lambda proposal: proposal.iteration, default=None)

    def _say(self, outcome: Outcome, kind: Kind, block_hash: bytes, **changes: object) -> None:
        """Vote in the current iteration."""
        ballot = msgspec.structs.replace(self.ballot, **changes)
        self.ballots[self.iteration] = outcome.ballots[self.iteration] = ballot
        signature = self._count_own(self.iteration, kind, block_hash)
        outcome.votes.append(Votes(kind, self.iteration, block_hash, (signature,)))

    def _count_own(self, iteration: int, kind: Kind, block_hash: bytes) -> bytes:
        assert self._key is not None
        signature = sign(self._key, self.root.epoch, kind, iteration, block_hash)
        self._count(iteration, kind, block_hash, self._key.address, signature)
        return signature

    def advance(self, root: Root) -> None:
        """A block of this epoch became final that follows the root: forget what it decided and what it excludes."""
        assert root.iteration > self.root.iteration
        assert root.epoch == self.root.epoch, "another epoch begins anew"
        self.root = root
        self.iteration = max(self.iteration, root.iteration + 1)
        for decided in [iteration for iteration in self.rounds if iteration <= root.iteration]:
            del self.rounds[decided]
        for decided in [iteration for iteration in self.ballots if iteration <= root.iteration]:
            del self.ballots[decided]
        kept = {root.hash}
        for iteration in sorted(self.rounds):
            proposals = self.rounds[iteration].proposals
            for block_hash in [p.hash for p in proposals.values() if p.parent_hash not in kept]:
                del proposals[block_hash]
            kept |= proposals.keys()
