"""Keys: what is signed is recovered, and nothing else is."""

import contextlib

import pytest
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadInput
from ledger.keys import HALF_ORDER, SIGNATURE_SIZE, Key, recover
from tests.ledger.world import ADMIN

ORDER = 2 * HALF_ORDER + 1
digests = st.binary(min_size=32, max_size=32)


@given(secret=st.integers(1, ORDER - 1).map(lambda n: n.to_bytes(32)), digest=digests)
def test_signature_recovers_to_its_signer(secret: bytes, digest: bytes) -> None:
    key = Key.from_secret(secret)
    signature = key.sign(digest)
    assert len(signature) == SIGNATURE_SIZE
    assert recover(digest, signature) == key.address


def test_address_is_the_one_other_wallets_derive() -> None:
    assert ADMIN.address.hex() == Account.from_key(ADMIN.secret).address.removeprefix("0x").lower()


@given(digest=digests, place=st.integers(0, SIGNATURE_SIZE - 1), change=st.integers(1, 255))
def test_altered_signature_is_refused_or_anothers(digest: bytes, place: int, change: int) -> None:
    signature = bytearray(ADMIN.sign(digest))
    signature[place] ^= change
    with contextlib.suppress(BadInput):
        assert recover(digest, bytes(signature)) != ADMIN.address


@given(digest=digests, signature=st.binary(max_size=70))
def test_any_bytes_are_a_signature_or_bad_input(digest: bytes, signature: bytes) -> None:
    with contextlib.suppress(BadInput):
        assert len(recover(digest, signature)) == 20


def test_second_form_of_a_signature_is_refused() -> None:
    digest = b"\5" * 32
    signature = ADMIN.sign(digest)
    s = ORDER - int.from_bytes(signature[32:64])
    other = signature[:32] + s.to_bytes(32) + bytes([signature[64] ^ 1])
    with pytest.raises(BadInput, match="not canonical"):
        recover(digest, other)


@pytest.mark.parametrize("parity", [2, 3, 27, 255])
def test_parity_is_0_or_1(parity: int) -> None:
    """The curve's library takes 2 and 3 too, for points that no signature of ours has."""
    digest = b"\5" * 32
    with pytest.raises(BadInput, match="parity"):
        recover(digest, ADMIN.sign(digest)[:64] + bytes([parity]))


@pytest.mark.parametrize("secret", [b"", b"\1" * 31, bytes(32), ORDER.to_bytes(32), b"\xff" * 32])
def test_no_key_of_wrong_size_or_outside_the_group(secret: bytes) -> None:
    with pytest.raises(BadInput, match="private key"):
        Key.from_secret(secret)


def test_generated_keys_differ_and_do_not_show_their_secret() -> None:
    first, second = Key.generate(), Key.generate()
    assert first.address != second.address
    assert first.secret.hex() not in repr(first)
    assert repr(first.secret) not in repr(first)
