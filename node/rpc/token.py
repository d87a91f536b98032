"""Bearer tokens: a message signed by an account, made offline, good until its expiry on one chain.

The message is EIP-712 typed data, so a wallet can show and sign it: domain (name "AIGEN", version "1", chainId),
type `Access(address account,uint64 expiry)`. The token is `aigen_` and the base64url of account, expiry and
signature, which also suits an OpenAI client's `api_key`. Knows no HTTP, no clock and no ledger.
"""

from __future__ import annotations

import base64
import binascii

from eth_hash.auto import keccak

from contracts.errors import BadInput, NotAllowed
from contracts.types import Address
from ledger.keys import Key, recover

PREFIX = "aigen_"

LIFETIME_MAX_S = 366 * 24 * 3600
"""A token that would be good for longer is refused: a leaked one must end some day."""

DOMAIN_TYPE = b"EIP712Domain(string name,string version,uint256 chainId)"
ACCESS_TYPE = b"Access(address account,uint64 expiry)"

ACCOUNT_SIZE = 20
EXPIRY_SIZE = 8
SIGNATURE_SIZE = 65
TOKEN_SIZE = ACCOUNT_SIZE + EXPIRY_SIZE + SIGNATURE_SIZE
"""93 bytes, a multiple of 3: base64 of it has no padding and no spare bits, so a token has one spelling."""

TOKEN_CHARACTERS = len(PREFIX) + TOKEN_SIZE // 3 * 4

WALLET_PARITY_OFFSET = 27
"""Wallets write the y parity as 27 or 28."""


def digest(account: Address, expiry: int, chain_id: int) -> bytes:
    """The 32 bytes that are signed (EIP-712)."""
    domain = keccak(keccak(DOMAIN_TYPE) + keccak(b"AIGEN") + keccak(b"1") + chain_id.to_bytes(32, "big"))
    access = keccak(keccak(ACCESS_TYPE) + account.rjust(32, b"\0") + expiry.to_bytes(32, "big"))
    return keccak(b"\x19\x01" + domain + access)


def mint(key: Key, chain_id: int, expiry: int) -> str:
    """A token for the key's account, good on that chain until `expiry` (Unix seconds)."""
    if not 0 < expiry < 1 << (8 * EXPIRY_SIZE):
        raise BadInput(f"the expiry {expiry} is no time in Unix seconds")
    signature = key.sign(digest(key.address, expiry, chain_id))
    return encode(key.address, expiry, signature)


def encode(account: Address, expiry: int, signature: bytes) -> str:
    """The token of a signature made elsewhere (a wallet)."""
    return PREFIX + base64.urlsafe_b64encode(account + expiry.to_bytes(EXPIRY_SIZE, "big") + signature).decode()


def verify(token: str, chain_id: int, now: float) -> Address:
    """The account that signed the token. Raises NotAllowed with the first check it fails."""
    account, expiry, signature = _decode(token)
    _check_time(expiry, now)
    try:
        signer = recover(digest(account, expiry, chain_id), signature)
    except BadInput as error:
        raise NotAllowed(f"the bearer token's signature is not valid: {error}") from error
    if signer != account:
        raise NotAllowed(
            f"the bearer token is not signed by 0x{account.hex()} for chain id {chain_id}: "
            "make one for this network with `aigen token`"
        )
    return account


def _decode(token: str) -> tuple[Address, int, bytes]:
    if not token.startswith(PREFIX) or len(token) != TOKEN_CHARACTERS:
        raise NotAllowed(
            f"the bearer token is not one of AIGEN's ({PREFIX} and {TOKEN_CHARACTERS - len(PREFIX)} characters): "
            "make one with `aigen token`"
        )
    try:
        content = base64.b64decode(token[len(PREFIX) :].encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise NotAllowed("the bearer token is not base64url: copy it whole, or make one with `aigen token`") from error
    account = Address(content[:ACCOUNT_SIZE])
    expiry = int.from_bytes(content[ACCOUNT_SIZE : ACCOUNT_SIZE + EXPIRY_SIZE], "big")
    signature = content[ACCOUNT_SIZE + EXPIRY_SIZE :]
    if signature[-1] >= WALLET_PARITY_OFFSET:
        signature = signature[:-1] + bytes([signature[-1] - WALLET_PARITY_OFFSET])
    return account, expiry, signature


def _check_time(expiry: int, now: float) -> None:
    if expiry <= now:
        raise NotAllowed(f"the bearer token expired {int(now - expiry)} s ago: make another with `aigen token`")
    if expiry > now + LIFETIME_MAX_S:
        raise NotAllowed(
            f"the bearer token is good for {int(expiry - now)} s more, at most {LIFETIME_MAX_S} s are taken: "
            "make a shorter one with `aigen token`"
        )
