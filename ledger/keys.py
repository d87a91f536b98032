"""secp256k1 keys of accounts: sign a 32-byte hash, recover who signed. Knows nothing of what is signed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import lru_cache

from coincurve import PublicKey
from eth_hash.auto import keccak
from eth_keys import datatypes as keys
from eth_utils.exceptions import ValidationError as KeyValidationError

from contracts.errors import BadInput
from contracts.types import Address

SIGNATURE_SIZE = 65
"""Bytes of a signature: r (32), s (32), y parity (1, 0 or 1)."""

HALF_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2
"""Signatures with s above this are the second form of the same signature and refused (EIP-2)."""


RECOVERED_MAX = 4_096
"""Signatures whose signer is remembered: a transaction's is asked for when it comes and again with its block."""


@dataclass(frozen=True)
class Key:
    """A private key. Its repr shows the address only."""

    secret: bytes = field(repr=False)
    address: Address

    @staticmethod
    def from_secret(secret: bytes) -> Key:
        """Raise BadInput unless `secret` is 32 bytes and in the group."""
        try:
            private = keys.PrivateKey(secret)
            address = private.public_key.to_canonical_address()
        except (KeyValidationError, ValueError) as error:
            raise BadInput("a private key is 32 bytes between 1 and the order of secp256k1") from error
        return Key(secret, Address(address))

    @staticmethod
    def generate() -> Key:
        return Key.from_secret(secrets.token_bytes(32))

    def sign(self, digest: bytes) -> bytes:
        """Sign a 32-byte digest; returns r, s and the y parity in 65 bytes."""
        return bytes(keys.PrivateKey(self.secret).sign_msg_hash(digest).to_bytes())


@lru_cache(RECOVERED_MAX)
def recover(digest: bytes, signature: bytes) -> Address:
    """The account that signed `digest` (32 bytes). Raises BadInput when the signature is not one or not canonical."""
    if len(signature) != SIGNATURE_SIZE:
        raise BadInput(f"a signature has {SIGNATURE_SIZE} bytes, this one {len(signature)}")
    if int.from_bytes(signature[32:64], "big") > HALF_ORDER:
        raise BadInput("the signature is not canonical: its s lies in the upper half of the order (EIP-2)")
    if signature[64] > 1:
        raise BadInput(f"the y parity of a signature is 0 or 1, not {signature[64]}")
    try:
        # What eth_keys calls as well; its own objects around that take as long as the curve does.
        public = PublicKey.from_signature_and_message(signature, digest, hasher=None)
    except ValueError as error:
        raise BadInput("the signature is not a valid secp256k1 signature") from error
    return Address(keccak(public.format(compressed=False)[1:])[-20:])
