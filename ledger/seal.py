"""Who made a block and who calls it final: the proposer's seal in the header, the authorities' certificate beside it.

The header's extra_data is 24 bytes of vanity that name the epoch, the iteration number in 8, and 65 bytes of the
proposer's signature over the header without that signature. An epoch is the time of one set of authorities; it is
named by the hash of the block after which it began: genesis, or the last block that changed them. A certificate holds
the finalising votes of two thirds of the authorities for the block or for a descendant of it: a final block makes its
ancestors final (Chan and Pass, "Simplex Consensus", eprint 2023/463). Knows no storage and no execution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth_hash.auto import keccak

from contracts.errors import BadPeer, NotAllowed
from contracts.types import Address
from ledger.keys import SIGNATURE_SIZE, Key, recover

VANITY_SIZE = 24
UNSEALED_SIZE = 32
EXTRA_DATA_SIZE = UNSEALED_SIZE + SIGNATURE_SIZE
_EXTRA_DATA = CancunBlockHeader._meta.field_names.index("extra_data")
VOTE_DOMAIN = b"aigen finalising vote, version 1"

HEADER_BYTES_MAX = 1024
"""A sealed header takes about 700 bytes."""

HEADER_NUMBER_MAX = (1 << 64) - 1
"""RLP integers are unbounded; the store's, msgpack's and every sane peer's are not."""


class Certificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The finalising votes for one block: 65-byte signatures in ascending order of their signers' addresses.

    `epoch`, `iteration` and `block_hash` are of the block that was voted on. When it is a descendant of the certified
    one, `descendants` has the RLP headers from the certified block's child to it, all of the same epoch.
    """

    epoch: bytes
    block_hash: bytes
    iteration: int
    votes: tuple[bytes, ...]
    descendants: tuple[bytes, ...] = ()


def quorum(authority_count: int) -> int:
    """Two thirds of the authorities, rounded up."""
    return -(-2 * authority_count // 3)


def leader(authorities: Sequence[Address], iteration: int) -> Address:
    """Who may propose in an iteration: the authorities take turns in the order of their addresses."""
    return sorted(authorities)[iteration % len(authorities)]


def next_led(authorities: Sequence[Address], authority: Address, after: int) -> int:
    """The first iteration after another that `authority` leads. Raises NotAllowed for an account that is none."""
    if authority not in authorities:
        raise NotAllowed(f"0x{authority.hex()} is no authority of this ledger: it cannot seal blocks")
    return next(i for i in range(after + 1, after + 1 + len(authorities)) if leader(authorities, i) == authority)


def vanity(epoch: bytes) -> bytes:
    """How the extra_data of an epoch's headers begin: the seal covers it, so no header belongs to two."""
    return b"aigen".ljust(8, b"\0") + epoch[:16]


def unsealed_extra_data(epoch: bytes, iteration: int) -> bytes:
    return vanity(epoch) + iteration.to_bytes(8, "big")


def iteration_of(header: CancunBlockHeader) -> int:
    """The iteration a header was proposed in; 0 for genesis."""
    if header.block_number == 0:
        return 0
    return int.from_bytes(header.extra_data[VANITY_SIZE:UNSEALED_SIZE], "big")


def seal(header: CancunBlockHeader, key: Key) -> CancunBlockHeader:
    """Append the proposer's signature to a header whose extra_data is `unsealed_extra_data(...)`."""
    assert len(header.extra_data) == UNSEALED_SIZE
    return header.copy(extra_data=header.extra_data + key.sign(_sealing_hash(header)))


def proposer_of(header: CancunBlockHeader) -> Address:
    """The account that sealed a header. Raises BadPeer or BadInput when it is not sealed."""
    if len(header.extra_data) != EXTRA_DATA_SIZE:
        raise BadPeer(
            f"block {header.block_number}: extra_data has {len(header.extra_data)} bytes, not {EXTRA_DATA_SIZE}"
        )
    return recover(_sealing_hash(header), header.extra_data[UNSEALED_SIZE:])


def _sealing_hash(header: CancunBlockHeader) -> bytes:
    fields = CancunBlockHeader.serialize(header)
    fields[_EXTRA_DATA] = header.extra_data[:UNSEALED_SIZE]
    return bytes(keccak(rlp.encode(fields)))


def vote_hash(epoch: bytes, iteration: int, block_hash: bytes) -> bytes:
    """What a finalising vote signs; the epoch ties it to one network and one set of authorities."""
    return bytes(keccak(VOTE_DOMAIN + epoch + iteration.to_bytes(8, "big") + block_hash))


def certify(epoch: bytes, header: CancunBlockHeader, keys: Sequence[Key]) -> Certificate:
    """The certificate that these authorities' votes make."""
    iteration = iteration_of(header)
    digest = vote_hash(epoch, iteration, header.hash)
    votes = tuple(key.sign(digest) for key in sorted(keys, key=lambda key: key.address))
    return Certificate(epoch, bytes(header.hash), iteration, votes)


def voters(certificate: Certificate) -> tuple[Address, ...]:
    """Who signed the votes, in their order. Raises BadInput for a signature that is none."""
    digest = vote_hash(certificate.epoch, certificate.iteration, certificate.block_hash)
    return tuple(recover(digest, vote) for vote in certificate.votes)


def check_proposer(header: CancunBlockHeader, epoch: bytes, authorities: Sequence[Address]) -> Address:
    """The proposer. Raises BadPeer, or BadInput for a signature that is none, unless it is the leader of the header's
    iteration in this epoch."""
    number, iteration = header.block_number, iteration_of(header)
    if header.extra_data[:VANITY_SIZE] != vanity(epoch):
        raise BadPeer(f"block {number}: its extra_data is not of the epoch that began with 0x{epoch.hex()}")
    proposer, expected = proposer_of(header), leader(authorities, iteration)
    if proposer != expected:
        raise BadPeer(f"block {number}: sealed by 0x{proposer.hex()}, iteration {iteration} is 0x{expected.hex()}'s")
    return proposer


def check_seal(
    header: CancunBlockHeader, parent: CancunBlockHeader, epoch: bytes, authorities: Sequence[Address]
) -> Address:
    """The proposer. Raises what check_proposer does, and BadPeer unless the iteration comes after the parent's."""
    number, iteration = header.block_number, iteration_of(header)
    if iteration <= iteration_of(parent):
        raise BadPeer(f"block {number}: iteration {iteration} is not after its parent's {iteration_of(parent)}")
    return check_proposer(header, epoch, authorities)


def decode_header(data: bytes) -> CancunBlockHeader:
    """Raises BadPeer when the bytes are no Cancun header within the limits, or not its canonical encoding."""
    if len(data) > HEADER_BYTES_MAX:
        raise BadPeer(f"a block header of {len(data)} bytes, at most {HEADER_BYTES_MAX} are taken")
    try:
        header = rlp.decode(data, CancunBlockHeader)
    except (rlp.exceptions.RLPException, ValueError, TypeError, RecursionError) as error:
        raise BadPeer(f"not a Cancun block header: {error}") from error
    if rlp.encode(header, sedes=CancunBlockHeader) != data:  # its sedes named: not the bytes it remembers
        raise BadPeer("not a Cancun block header: its bytes are not the canonical encoding of what they say")
    numbers = header.block_number, header.timestamp, header.gas_limit, header.gas_used
    if max(numbers) > HEADER_NUMBER_MAX:
        raise BadPeer(f"not a Cancun block header: a number in it is above {HEADER_NUMBER_MAX}")
    return header


def check_certificate(
    certificate: Certificate, header: CancunBlockHeader, epoch: bytes, authorities: Sequence[Address]
) -> None:
    """Raise BadPeer, or BadInput for a signature that is none, unless a quorum of distinct authorities voted this block
    or a descendant of it final."""
    number = header.block_number
    if certificate.epoch != epoch:
        raise BadPeer(f"block {number}: its certificate is of the epoch of 0x{certificate.epoch.hex()}, not this one")
    for data in certificate.descendants:
        child = decode_header(data)
        if child.parent_hash != header.hash:
            raise BadPeer(f"block {number}: its certificate's headers are not descendants of it")
        header = child
    if certificate.block_hash != header.hash or certificate.iteration != iteration_of(header):
        raise BadPeer(f"block {number}: its certificate is for another block or iteration")
    if len(certificate.votes) > len(authorities):
        raise BadPeer(f"block {number}: {len(certificate.votes)} votes from {len(authorities)} authorities")
    found = voters(certificate)
    if any(later <= earlier for earlier, later in pairwise(found)):
        raise BadPeer(f"block {number}: its certificate's voters are not distinct and in ascending order")
    if strangers := set(found) - set(authorities):
        raise BadPeer(f"block {number}: 0x{min(strangers).hex()} voted and is no authority")
    if len(found) < quorum(len(authorities)):
        raise BadPeer(f"block {number}: {len(found)} votes, {quorum(len(authorities))} make it final")
