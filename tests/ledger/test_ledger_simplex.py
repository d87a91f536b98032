"""The rules of agreement, one by one: what gets a vote, when an iteration ends, what is final, what a restart keeps."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import combinations

import pytest

from contracts.errors import BadInput, BadPeer
from ledger import seal
from ledger.exchange import lacking, status_of
from ledger.keys import Key
from ledger.simplex import LOOKAHEAD, STATEMENTS_PER_VOTER_MAX, WINDOW, Ballot, Proposal, Root, Simplex
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes, decode_evidence, liar, sign
from tests.ledger.test_ledger_simulation import finalising_after_a_timeout

KEYS = sorted((Key.from_secret(bytes([i]) * 32) for i in range(1, 8)), key=lambda key: key.address)
EPOCH = b"\x11" * 32
ROOT = Root(EPOCH, 0, EPOCH, tuple(key.address for key in KEYS[:4]))


def simplex(key: Key | None = KEYS[0], ballots: dict[int, Ballot] | None = None, root: Root = ROOT) -> Simplex:
    return Simplex(root, key, ballots or {})


def proposal(iteration: int, parent: bytes = EPOCH, mark: int = 0) -> Proposal:
    name = bytes([iteration, mark]).ljust(32, b"\x22")
    return Proposal(name, parent, iteration, b"\x93" + bytes([2]) + b"\xc4\x00" + b"\x90")


def vote(key: Key, kind: Kind, iteration: int, block_hash: bytes = NO_BLOCK) -> Votes:
    return Votes(kind, iteration, block_hash, (sign(key, EPOCH, kind, iteration, block_hash),))


def hear(one: Simplex, kind: Kind, iteration: int, block_hash: bytes, keys: list[Key]) -> None:
    for key in keys:
        one.add_votes(vote(key, kind, iteration, block_hash))


def test_the_first_proposal_gets_the_vote_and_no_other() -> None:
    one = simplex()
    one.add_proposal(proposal(1))
    outcome = one.step()
    assert [(v.kind, v.block_hash) for v in outcome.votes] == [(Kind.NOTARISE, proposal(1).hash)]
    assert outcome.ballots == {1: Ballot(notarised=proposal(1).hash, proposal=proposal(1).encoded)}
    assert not one.wants(1, proposal(1, mark=1).hash)
    assert one.step().votes == []


def test_a_notarised_block_ends_the_iteration_and_is_voted_final() -> None:
    one = simplex()
    one.add_proposal(proposal(1))
    hear(one, Kind.NOTARISE, 1, proposal(1).hash, KEYS[1:2])
    assert one.step().final is None
    assert one.iteration == 1, "two of four are no quorum"
    hear(one, Kind.NOTARISE, 1, proposal(1).hash, KEYS[2:3])
    outcome = one.step()
    assert one.iteration == 2
    assert outcome.ballots[1].finalised == proposal(1).hash
    assert Kind.FINALISE in {v.kind for v in outcome.votes}
    assert len(next(v for v in outcome.votes if v.kind is Kind.NOTARISE).signatures) == 3, "the quorum is told"
    for key in KEYS[1:3]:
        assert outcome.final is None
        one.add_votes(vote(key, Kind.FINALISE, 1, proposal(1).hash))
        outcome = one.step()
    assert outcome.final == proposal(1)


def test_who_timed_out_never_finalises_and_who_finalised_never_times_out() -> None:
    late = simplex()
    late.add_proposal(proposal(1))
    outcome = late.step(timed_out=True)
    assert outcome.ballots[1].timed_out
    hear(late, Kind.NOTARISE, 1, proposal(1).hash, KEYS[1:3])
    outcome = late.step()
    assert late.iteration == 2
    assert not late.ballots[1].finalised
    assert Kind.FINALISE not in {v.kind for v in outcome.votes}

    back = simplex(ballots={1: Ballot(notarised=proposal(1).hash, finalised=proposal(1).hash)})
    assert back.iteration == 1
    assert back.step(timed_out=True).votes == []
    assert not back.ballots.get(1, Ballot()).timed_out


def test_a_dummy_ends_the_iteration_without_a_block() -> None:
    one = simplex()
    hear(one, Kind.DUMMY, 1, NO_BLOCK, KEYS[1:3])
    assert one.step().votes == []
    assert one.iteration == 1
    one.step(timed_out=True)
    assert one.iteration == 2
    assert one.parent() == ROOT


def test_a_proposal_waits_for_the_dummies_between_it_and_its_parent() -> None:
    one = simplex()
    one.add_proposal(proposal(1))
    hear(one, Kind.NOTARISE, 1, proposal(1).hash, KEYS[1:4])
    one.step()
    assert one.iteration == 2
    one.add_proposal(proposal(2, mark=7))
    assert one.step().votes == [], "it leaves the notarised block out without a dummy in its place"
    hear(one, Kind.DUMMY, 1, NO_BLOCK, KEYS[1:4])
    assert [v.block_hash for v in one.step().votes] == [proposal(2, mark=7).hash]


def test_a_restart_votes_again_for_nothing_else() -> None:
    ballots = {1: Ballot(notarised=proposal(1).hash, proposal=proposal(1).encoded)}
    one = simplex(ballots=ballots)
    one.add_proposal(proposal(1, mark=5))
    assert one.step().votes == []
    assert one.round(1).count(Kind.NOTARISE, proposal(1).hash) == 1, "what was said is told again"
    assert not one.is_leader


def test_a_quorum_holds_whatever_else_its_voters_said() -> None:
    one = simplex(KEYS[3])
    for mark in range(9):
        one.add_votes(vote(KEYS[0], Kind.NOTARISE, 1, bytes([mark]) * 32))
    assert len(one.round(1).votes) == STATEMENTS_PER_VOTER_MAX
    signatures = tuple(vote(key, Kind.NOTARISE, 1, b"\xee" * 32).signatures[0] for key in KEYS[:3])
    assert one.add_votes(Votes(Kind.NOTARISE, 1, b"\xee" * 32, signatures))
    assert one.round(1).count(Kind.NOTARISE, b"\xee" * 32) == 3
    assert list(one.lacks()) == [(1, b"\xee" * 32)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((Kind.NOTARISE, b"\1" * 32), (Kind.NOTARISE, b"\2" * 32)),
        ((Kind.FINALISE, b"\1" * 32), (Kind.FINALISE, b"\2" * 32)),
        ((Kind.FINALISE, b"\1" * 32), (Kind.DUMMY, NO_BLOCK)),
        ((Kind.DUMMY, NO_BLOCK), (Kind.FINALISE, b"\1" * 32)),
    ],
)
def test_contradictions_are_evidence_that_anyone_can_check(
    first: tuple[Kind, bytes], second: tuple[Kind, bytes]
) -> None:
    one = simplex()
    for kind, block_hash in (first, second):
        one.add_votes(vote(KEYS[2], kind, 1, block_hash))
    evidence = one.evidence[KEYS[2].address]
    assert liar(decode_evidence(evidence.encode())) == KEYS[2].address
    for changed in (
        Evidence(b"\x12" * 32, evidence.first, evidence.second),
        Evidence(EPOCH, evidence.first, evidence.first),
        Evidence(EPOCH, evidence.first, vote(KEYS[1], *second[:1], 1, second[1])),
        Evidence(EPOCH, evidence.first, vote(KEYS[2], *second[:1], 2, second[1])),
        Evidence(EPOCH, evidence.first, b""),
    ):
        with pytest.raises((BadInput, BadPeer)):
            liar(changed)


def test_what_an_honest_authority_says_is_no_evidence() -> None:
    one = simplex()
    for kind, block_hash in ((Kind.NOTARISE, b"\1" * 32), (Kind.DUMMY, NO_BLOCK)):
        one.add_votes(vote(KEYS[1], kind, 1, block_hash))
    for kind in (Kind.NOTARISE, Kind.FINALISE):
        one.add_votes(vote(KEYS[2], kind, 1, b"\1" * 32))
    assert one.evidence == {}


def test_strangers_and_wrong_signatures_are_refused() -> None:
    one = simplex()
    with pytest.raises(BadPeer, match="no authority"):
        one.add_votes(vote(KEYS[5], Kind.DUMMY, 1))
    with pytest.raises(BadInput):
        one.add_votes(Votes(Kind.DUMMY, 1, NO_BLOCK, (bytes(65),)))
    with pytest.raises(BadPeer, match="names a block"):
        one.add_votes(vote(KEYS[1], Kind.DUMMY, 1, b"\1" * 32))
    assert one.rounds == {}


def test_what_is_far_ahead_takes_a_quorum_and_what_is_over_nothing() -> None:
    one = simplex(root=Root(EPOCH, 5, EPOCH, ROOT.authorities))
    assert not one.add_votes(vote(KEYS[1], Kind.DUMMY, 5))
    assert one.add_votes(vote(KEYS[1], Kind.DUMMY, 6 + LOOKAHEAD))
    assert not one.add_votes(vote(KEYS[1], Kind.DUMMY, 7 + LOOKAHEAD))
    for iteration, taken in ((6 + WINDOW, True), (7 + WINDOW, False)):
        signatures = tuple(vote(key, Kind.DUMMY, iteration).signatures[0] for key in KEYS[1:4])
        assert one.add_votes(Votes(Kind.DUMMY, iteration, NO_BLOCK, signatures)) is taken


def test_a_new_root_forgets_what_it_decided_and_what_it_excludes() -> None:
    one = simplex()
    good, child, bad = proposal(1), proposal(2, proposal(1).hash), proposal(2, mark=9)
    one.add_proposal(good)
    hear(one, Kind.NOTARISE, 1, good.hash, KEYS[1:4])
    one.step()
    one.add_proposal(child)
    one.rounds[2].proposals[bad.hash] = bad
    one.advance(Root(good.hash, 1, EPOCH, ROOT.authorities))
    assert list(one.proposals()) == [child]
    assert one.iteration == 2
    assert list(one.rounds) == [2]


@pytest.mark.parametrize("behind", range(4))
def test_a_status_is_answered_with_all_that_is_lacking(behind: int) -> None:
    """Whatever part of the votes one has, after one answer it has what the other has."""
    ahead, follower = simplex(KEYS[0]), simplex(KEYS[3])
    ahead.add_proposal(proposal(1))
    statements = [(Kind.DUMMY, 1, NO_BLOCK), (Kind.NOTARISE, 2, b"\5" * 32), (Kind.DUMMY, 2, NO_BLOCK)]
    for kind, iteration, block_hash in statements:
        hear(ahead, kind, iteration, block_hash, KEYS[:3])
    ahead.step()
    for kind, iteration, block_hash in statements[:behind]:
        hear(follower, kind, iteration, block_hash, list(next(iter(combinations(KEYS[:3], 2)))))
    found = lacking(ahead, status_of(follower))
    for message in found:
        if isinstance(message, Votes):
            follower.add_votes(message)
    follower.step()
    assert follower.iteration == ahead.iteration == 3
    assert [m for m in lacking(ahead, status_of(follower)) if isinstance(m, Votes)] == []


def test_one_authority_decides_alone_and_at_once() -> None:
    root = Root(EPOCH, 0, EPOCH, (KEYS[0].address,))
    one = simplex(root=root)
    assert one.is_leader
    one.add_proposal(proposal(1))
    outcome = one.step()
    assert outcome.final == proposal(1)
    assert list(outcome.ballots) == [1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_leaders_take_turns(count: int) -> None:
    root = Root(EPOCH, 0, EPOCH, tuple(key.address for key in KEYS[:count]))
    for iteration in range(1, 2 * count):
        leaders = []
        for key in KEYS[:count]:
            one = simplex(key, root=root)
            one.iteration = iteration
            leaders += [key.address] * one.is_leader
        assert leaders == [seal.leader(root.authorities, iteration)]


# Why nobody finalises after it timed out


@pytest.mark.parametrize("is_broken", [False, True])
def test_one_that_finalises_after_a_timeout_lets_two_blocks_become_final(is_broken: bool) -> None:
    """One liar of four says all there is to say. What it says is late at the second authority, which times out before
    it sees the first block notarised; the third never saw that block."""
    first, second, third, liar_ = KEYS[:4]
    block, other = proposal(1), proposal(2, mark=1)
    with finalising_after_a_timeout() if is_broken else nullcontext():
        nodes = {key.address: simplex(key) for key in (first, second, third)}
        one, two, three = nodes.values()
        one.add_proposal(block)
        two.add_proposal(block)
        for node in (one, two):
            node.step()
        for node in (two, three):
            node.step(timed_out=True)
        hear(one, Kind.NOTARISE, 1, block.hash, [second, liar_])
        one.step()
        hear(two, Kind.NOTARISE, 1, block.hash, [first, liar_])
        says = {(v.kind, v.block_hash) for v in two.step().votes}
        assert ((Kind.FINALISE, block.hash) in says) == is_broken
        hear(one, Kind.FINALISE, 1, block.hash, [second, liar_] if is_broken else [liar_])

        hear(two, Kind.DUMMY, 1, NO_BLOCK, [third, liar_])
        hear(three, Kind.DUMMY, 1, NO_BLOCK, [second, liar_])
        for node in (two, three):
            node.step()
            node.add_proposal(other)
            node.step()
        for node, heard in ((two, third), (three, second)):
            hear(node, Kind.NOTARISE, 2, other.hash, [heard, liar_])
            node.step()
        hear(three, Kind.FINALISE, 2, other.hash, [second, liar_])
    assert one.step().final == (block if is_broken else None)
    assert three.step().final == other
