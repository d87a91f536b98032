"""What authorities sign about the blocks of an iteration: the three kinds of vote, and the proof that one lied.

Chan and Pass, "Simplex Consensus" (eprint 2023/463), section 2: a vote for a proposal or for the dummy block of an
iteration, and a vote that finalises. Knows no storage, no execution and no rules beyond what contradicts what.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
from eth_hash.auto import keccak
from msgspec import Meta

from contracts.errors import BadInput
from contracts.limits import AUTHORITIES_MAX
from contracts.types import Address, EvidenceHash
from ledger.keys import SIGNATURE_SIZE, Key, recover
from ledger.seal import (
    HEADER_BYTES_MAX,
    UNSEALED_SIZE,
    VOTE_DOMAIN,
    decode_header,
    iteration_of,
    proposer_of,
    unsealed_extra_data,
)

ITERATION_MAX = 2**63 - 1

NO_BLOCK = bytes(32)
"""Stands for the dummy block, which has no hash."""


class Kind(IntEnum):
    """What a vote says."""

    NOTARISE = 1
    """This proposal is valid, and the first of its iteration that I saw."""
    DUMMY = 2
    """I waited for this iteration's block long enough: let it have none."""
    FINALISE = 3
    """I saw this block notarised and have not voted for the dummy of its iteration, nor ever will."""


_DOMAINS = {
    Kind.NOTARISE: b"aigen notarising vote, version 1",
    Kind.DUMMY: b"aigen dummy vote, version 1",
    Kind.FINALISE: VOTE_DOMAIN,
}

Iteration = Annotated[int, Meta(ge=1, le=ITERATION_MAX)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_SIZE, max_length=SIGNATURE_SIZE)]


class Votes(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Signatures under one statement: a single vote, or as many as decide."""

    kind: Kind
    iteration: Iteration
    block_hash: Hash
    signatures: Annotated[tuple[Signature, ...], Meta(min_length=1, max_length=AUTHORITIES_MAX)]


def digest(epoch: bytes, kind: Kind, iteration: int, block_hash: bytes) -> bytes:
    """What a vote signs; the epoch (see ledger.seal) ties it to one network and one set of authorities."""
    return bytes(keccak(_DOMAINS[kind] + epoch + iteration.to_bytes(8, "big") + block_hash))


def sign(key: Key, epoch: bytes, kind: Kind, iteration: int, block_hash: bytes) -> bytes:
    return key.sign(digest(epoch, kind, iteration, block_hash))


class Evidence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """Two statements that no honest authority signs both: two votes (one signature each) or two sealed headers."""

    epoch: Hash
    first: Votes | Annotated[bytes, Meta(max_length=HEADER_BYTES_MAX)]
    second: Votes | Annotated[bytes, Meta(max_length=HEADER_BYTES_MAX)]

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @property
    def hash(self) -> EvidenceHash:
        """What the transaction that removes the authority cites, 32 bytes."""
        return EvidenceHash(bytes(keccak(self.encode())))


EVIDENCE_BYTES_MAX = 4 * HEADER_BYTES_MAX


def decode_evidence(data: bytes) -> Evidence:
    """Raises BadInput for anything that is no evidence within the limits; `liar` says whether it proves anything."""
    if len(data) > EVIDENCE_BYTES_MAX:
        raise BadInput(f"evidence of {len(data)} bytes, at most {EVIDENCE_BYTES_MAX} are read")
    try:
        return msgspec.msgpack.decode(data, type=Evidence)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInput(f"these {len(data)} bytes are no evidence: {error}") from None


def contradict(one: tuple[Kind, bytes], other: tuple[Kind, bytes]) -> bool:
    """Whether an honest authority never says both of one iteration: two different blocks notarised or finalised, or a
    block finalised and the dummy."""
    (kind, block_hash), (other_kind, other_hash) = one, other
    if kind == other_kind:
        return block_hash != other_hash
    return {kind, other_kind} == {Kind.DUMMY, Kind.FINALISE}


def liar(evidence: Evidence) -> Address:
    """Who signed both statements. Raises BadInput or BadPeer when they do not contradict each other.

    That the epoch is one of this network's, and who its authorities were, is for the caller to know.
    """
    first, second = evidence.first, evidence.second
    if isinstance(first, Votes) and isinstance(second, Votes):
        signers = [_sole_signer(evidence.epoch, first), _sole_signer(evidence.epoch, second)]
        same_iteration = first.iteration == second.iteration
        lies = contradict((first.kind, first.block_hash), (second.kind, second.block_hash))
    elif isinstance(first, bytes) and isinstance(second, bytes):
        headers = decode_header(first), decode_header(second)
        signers = [proposer_of(header) for header in headers]
        same_iteration = all(
            header.extra_data[:UNSEALED_SIZE] == unsealed_extra_data(evidence.epoch, iteration_of(headers[0]))
            for header in headers
        )
        lies = headers[0].hash != headers[1].hash
    else:
        raise BadInput("evidence is two votes or two headers, not one of each")
    if signers[0] != signers[1]:
        raise BadInput(f"no evidence: 0x{signers[0].hex()} signed one statement and 0x{signers[1].hex()} the other")
    if not same_iteration or not lies:
        raise BadInput(f"no evidence: an honest authority may say both, as 0x{signers[0].hex()} did")
    return signers[0]


def _sole_signer(epoch: bytes, votes: Votes) -> Address:
    if len(votes.signatures) != 1:
        raise BadInput(f"evidence has one signature under each vote, not {len(votes.signatures)}")
    said = digest(epoch, votes.kind, votes.iteration, votes.block_hash)
    return recover(said, votes.signatures[0])
