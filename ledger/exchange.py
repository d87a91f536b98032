"""What authorities send one another, and what one of them has that another lacks. Pure; knows no sockets.

Votes and proposals are sent once, to everyone; whatever gets lost is made good by statuses: who does not get on says
what it has, and is answered with the rest. Evidence goes to followers as well (`ledger.evidence`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
from msgspec import Meta

from contracts.errors import BadPeer
from contracts.limits import AUTHORITIES_MAX
from ledger.block import BLOCK_TRANSACTIONS_MAX, PROPOSED_TRANSACTIONS_BYTES_MAX
from ledger.seal import HEADER_BYTES_MAX
from ledger.simplex import WINDOW, Simplex
from ledger.votes import ITERATION_MAX, Evidence, Hash, Iteration, Kind, Votes

MESSAGE_BYTES_MAX = PROPOSED_TRANSACTIONS_BYTES_MAX + (64 << 10)
"""A proposal of the largest size with its framing."""

ANSWER_BYTES_MAX = 2 * MESSAGE_BYTES_MAX
"""What one status is answered with; the next one brings more."""

STATUS_ROUNDS_MAX = 2 * WINDOW
ROUND_STATEMENTS_MAX = 4 * AUTHORITIES_MAX


class Proposed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """A sealed block that is not final: RLP header and raw transactions in order."""

    header_rlp: Annotated[bytes, Meta(max_length=HEADER_BYTES_MAX)]
    transactions: Annotated[tuple[bytes, ...], Meta(max_length=BLOCK_TRANSACTIONS_MAX)]


class Statement(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose votes for it are known: bit i stands for the i-th authority in ascending order."""

    kind: Kind
    block_hash: Hash
    voters: Annotated[int, Meta(ge=0, lt=2**AUTHORITIES_MAX)]


class RoundStatus(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    iteration: Iteration
    proposals: Annotated[tuple[Hash, ...], Meta(max_length=ROUND_STATEMENTS_MAX)]
    statements: Annotated[tuple[Statement, ...], Meta(max_length=ROUND_STATEMENTS_MAX)]


class Status(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """How far an authority is and what it knows of the iterations after its newest final block."""

    root_iteration: Annotated[int, Meta(ge=0, le=ITERATION_MAX)]
    iteration: Iteration
    rounds: Annotated[tuple[RoundStatus, ...], Meta(max_length=STATUS_ROUNDS_MAX)]


Message = Votes | Proposed | Status | Evidence


class Envelope(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message and the epoch it belongs to: in another one it means nothing, but for evidence, which names its own."""

    epoch: Hash
    message: Message


_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(epoch: bytes, message: Message) -> bytes:
    return msgspec.msgpack.encode(Envelope(epoch, message))


def decode(data: bytes) -> Envelope:
    """Raises BadPeer for anything that is not one message within the limits."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise BadPeer(f"a consensus message of {len(data)} bytes, at most {MESSAGE_BYTES_MAX} are taken")
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadPeer(f"a consensus message of {len(data)} bytes that is none: {error}") from None


def decode_proposed(encoded: bytes) -> Proposed:
    """What `Proposal.encoded` holds."""
    return msgspec.msgpack.decode(encoded, type=Proposed)


def status_of(simplex: Simplex) -> Status:
    """What we have, the oldest iterations first when it is too much: they are what holds us up."""
    authorities = sorted(simplex.root.authorities)
    rounds = []
    for iteration in sorted(simplex.rounds)[:STATUS_ROUNDS_MAX]:
        round_ = simplex.rounds[iteration]
        statements = tuple(
            Statement(*statement, sum(1 << authorities.index(voter) for voter in round_.votes[statement]))
            for statement in simplex.telling(iteration)
        )[:ROUND_STATEMENTS_MAX]
        rounds.append(RoundStatus(iteration, tuple(round_.proposals)[:ROUND_STATEMENTS_MAX], statements))
    return Status(simplex.root.iteration, simplex.iteration, tuple(rounds))


def lacking(simplex: Simplex, status: Status) -> list[Message]:
    """What we know and the sender of a status does not, the oldest iterations first."""
    known = {round_status.iteration: round_status for round_status in status.rounds}
    listed_all = len(status.rounds) < STATUS_ROUNDS_MAX
    found: list[Message] = []
    size_bytes = 0
    for iteration in sorted(simplex.rounds):
        if not status.root_iteration < iteration <= status.iteration + WINDOW:
            continue
        if iteration not in known and not listed_all:
            break
        for message in _lacking_of_round(simplex, iteration, known.get(iteration)):
            size_bytes += len(msgspec.msgpack.encode(message))
            if found and size_bytes > ANSWER_BYTES_MAX:
                return found
            found.append(message)
    return found


def _lacking_of_round(simplex: Simplex, iteration: int, known: RoundStatus | None) -> Iterator[Message]:
    """Votes before proposals: whoever has a proposal of its own takes another only when a quorum voted for it."""
    authorities = sorted(simplex.root.authorities)
    round_ = simplex.rounds[iteration]
    has = {(s.kind, s.block_hash): s.voters for s in known.statements} if known else {}
    for statement in simplex.telling(iteration):
        mask = has.get(statement, 0)
        without = [voter for place, voter in enumerate(authorities) if mask >> place & 1]
        if round_.votes[statement].keys() - set(without):
            yield simplex.votes_for(iteration, *statement, without)
    for proposal in round_.proposals.values():
        if known is None or proposal.hash not in known.proposals:
            yield decode_proposed(proposal.encoded)
