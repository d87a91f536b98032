"""Seals and certificates: the leader's, a quorum's, of this block; anything else is refused."""

from itertools import combinations

import msgspec
import pytest
import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader

from contracts.errors import BadPeer, Refused
from contracts.types import Address
from ledger import seal
from ledger.block import child_header
from ledger.keys import Key
from ledger.seal import Certificate
from tests.ledger.world import EPOCH, GENESIS, STRANGER

KEYS = [Key.from_secret(bytes([i]) * 32) for i in range(1, 32)]
NETWORK = b"\x99" * 32


def addresses(count: int) -> tuple[Address, ...]:
    return tuple(key.address for key in KEYS[:count])


def sealed(iteration: int, authority_count: int) -> CancunBlockHeader:
    """A header sealed by the leader of its iteration."""
    expected = seal.leader(addresses(authority_count), iteration)
    key = next(key for key in KEYS if key.address == expected)
    return seal.seal(unsealed(iteration, key), key)


def unsealed(iteration: int, proposer: Key) -> CancunBlockHeader:
    return child_header(GENESIS.header, EPOCH + 9, proposer.address, seal.unsealed_extra_data(NETWORK, iteration))


@pytest.mark.parametrize("count", range(1, 32))
def test_quorum_is_two_thirds_so_that_two_quorums_share_an_honest_authority(count: int) -> None:
    needed, liars = seal.quorum(count), (count - 1) // 3
    assert 3 * needed >= 2 * count > 3 * (needed - 1)
    assert 2 * needed - count > liars, "two quorums overlap in more than may lie"
    assert count - liars >= needed, "the honest ones alone can decide"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 31])
def test_authorities_lead_in_turn(count: int) -> None:
    leaders = [seal.leader(addresses(count), iteration) for iteration in range(2 * count)]
    assert leaders[:count] == leaders[count:] == sorted(addresses(count))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_leaders_seal_is_taken_and_tells_the_proposer(count: int) -> None:
    for iteration in range(1, 2 * count + 1):
        header = sealed(iteration, count)
        assert seal.check_seal(header, GENESIS.header, NETWORK, addresses(count)) == seal.proposer_of(header)
        assert seal.iteration_of(header) == iteration


def test_seal_of_another_is_refused() -> None:
    with pytest.raises(BadPeer, match="sealed by"):
        seal.check_seal(seal.seal(unsealed(1, STRANGER), STRANGER), GENESIS.header, NETWORK, addresses(3))
    behind = sealed(1, 3)
    with pytest.raises(BadPeer, match="not after its parent's"):
        seal.check_seal(behind, sealed(2, 3), NETWORK, addresses(3))


@pytest.mark.parametrize("field", [name for name, _ in CancunBlockHeader._meta.fields if name != "extra_data"])
def test_seal_covers_every_field(field: str) -> None:
    header = sealed(1, 1)
    value = getattr(header, field)
    changed = bytes([value[0] ^ 1]) + value[1:] if isinstance(value, bytes) else value + 1
    with pytest.raises(Refused):
        seal.check_seal(header.copy(**{field: changed}), GENESIS.header, NETWORK, addresses(1))


@pytest.mark.parametrize("place", range(seal.EXTRA_DATA_SIZE))
def test_seal_covers_every_byte_of_extra_data(place: int) -> None:
    header = sealed(1, 1)
    extra_data = bytearray(header.extra_data)
    extra_data[place] ^= 1
    with pytest.raises(Refused):
        seal.check_seal(header.copy(extra_data=bytes(extra_data)), GENESIS.header, NETWORK, addresses(1))


@pytest.mark.parametrize("extra_data", [b"", b"x", seal.unsealed_extra_data(NETWORK, 1), b"\0" * 98])
def test_header_without_a_seal_is_refused(extra_data: bytes) -> None:
    with pytest.raises(BadPeer):
        seal.check_seal(sealed(1, 1).copy(extra_data=extra_data), GENESIS.header, NETWORK, addresses(1))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_exactly_the_quorums_certify(count: int) -> None:
    header = sealed(1, count)
    needed = seal.quorum(count)
    for voters in combinations(KEYS[:count], needed):
        seal.check_certificate(seal.certify(NETWORK, header, voters), header, NETWORK, addresses(count))
    for voters in combinations(KEYS[:count], needed - 1):
        with pytest.raises(BadPeer, match="make it final"):
            seal.check_certificate(seal.certify(NETWORK, header, voters), header, NETWORK, addresses(count))


HEADER = sealed(1, 4)
CERTIFICATE = seal.certify(NETWORK, HEADER, KEYS[:4])
OTHER = sealed(2, 4)


def check(certificate: Certificate, header: CancunBlockHeader = HEADER) -> None:
    seal.check_certificate(certificate, header, NETWORK, addresses(4))


def altered(place: int) -> bytes:
    vote = bytearray(CERTIFICATE.votes[0])
    vote[place] ^= 1
    return bytes(vote)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": bytes(32)},
        {"block_hash": OTHER.hash},
        {"block_hash": b""},
        {"iteration": 2},
        {"iteration": -1},
        {"votes": ()},
        {"votes": CERTIFICATE.votes[::-1]},
        {"votes": CERTIFICATE.votes[:2] + CERTIFICATE.votes[:1]},
        {"votes": (CERTIFICATE.votes[0],) * 3},
        {"votes": (CERTIFICATE.votes[0],) * 4},
        {"votes": CERTIFICATE.votes * 2},
        {"votes": seal.certify(NETWORK, HEADER, [*KEYS[:3], STRANGER, KEYS[9]]).votes[:4]},
        {"votes": seal.certify(NETWORK, OTHER, KEYS[:4]).votes},
        {"votes": seal.certify(b"\x98" * 32, HEADER, KEYS[:4]).votes},
        {"votes": (*CERTIFICATE.votes[:3], b"")},
        *({"votes": (altered(place), *CERTIFICATE.votes[1:])} for place in (0, 31, 32, 63, 64)),
    ],
)
def test_altered_certificate_is_refused(change: dict[str, object]) -> None:
    check(CERTIFICATE)
    with pytest.raises(Refused):
        check(msgspec.structs.replace(CERTIFICATE, **change))


def test_certificate_of_another_block_is_refused() -> None:
    with pytest.raises(BadPeer, match="another block"):
        check(CERTIFICATE, OTHER)


def test_voters_are_told() -> None:
    assert list(seal.voters(CERTIFICATE)) == sorted(addresses(4))


def child(parent: CancunBlockHeader, iteration: int) -> CancunBlockHeader:
    proposer = next(key for key in KEYS[:4] if key.address == seal.leader(addresses(4), iteration))
    header = child_header(parent, parent.timestamp + 1, proposer.address, seal.unsealed_extra_data(NETWORK, iteration))
    return seal.seal(header, proposer)


def test_votes_for_a_descendant_certify_its_ancestors() -> None:
    second = child(HEADER, 2)
    third = child(second, 4)
    votes = seal.certify(NETWORK, third, KEYS[:3])
    chain = (rlp.encode(second), rlp.encode(third))
    certificate = msgspec.structs.replace(votes, descendants=chain)
    check(certificate)
    check(msgspec.structs.replace(votes, descendants=chain[1:]), second)
    for descendants in ((), chain[:1], chain[1:], chain[::-1], (*chain, chain[1]), (b"", *chain)):
        with pytest.raises(BadPeer):
            check(msgspec.structs.replace(votes, descendants=descendants))
    with pytest.raises(BadPeer, match="not descendants"):
        check(certificate, OTHER)
