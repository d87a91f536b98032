"""Accounts' keys on disk, encrypted (Web3 Secret Storage, version 3, scrypt). Knows nothing of who owns them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import eth_keyfile

from contracts.errors import BadInput, Conflict, NotAllowed, NotFound
from contracts.types import Address
from ledger.keys import Key

SCRYPT_WORK_FACTOR = 1 << 14
"""N of scrypt: 16 MiB and some tens of milliseconds a guess."""

KEYSTORE_BYTES_MAX = 16_384


def write(path: Path, key: Key, password: str) -> None:
    """Write `key` encrypted under `password`, readable by its owner only. Raises Conflict if the file exists."""
    document = eth_keyfile.create_keyfile_json(key.secret, password.encode(), kdf="scrypt", iterations=SCRYPT_WORK_FACTOR)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise Conflict(f"{path} exists: a key is never overwritten; move it away or choose another name") from error
    with os.fdopen(handle, "w") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())


def _document(path: Path) -> dict[str, object]:
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"no key at {path}: make one with `aigen account new`") from error
    if len(text) > KEYSTORE_BYTES_MAX:
        raise BadInput(f"{path} is no keystore: {len(text)} bytes, at most {KEYSTORE_BYTES_MAX}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no keystore: not JSON") from error
    if not isinstance(document, dict) or "address" not in document:
        raise BadInput(f"{path} is no keystore: an object with address and crypto is expected")
    return document


def address(path: Path) -> Address:
    """The address of the key in a keystore, which is readable without the password."""
    try:
        value = bytes.fromhex(str(_document(path)["address"]).removeprefix("0x"))
    except ValueError as error:
        raise BadInput(f"{path} is no keystore: its address is not hexadecimal") from error
    return Address(value)


def read(path: Path, password: str) -> Key:
    """Decrypt. Raises NotAllowed for a wrong password, BadInput for a file that is no keystore."""
    document = _document(path)
    try:
        secret = eth_keyfile.decode_keyfile_json(document, password.encode())
    except ValueError as error:
        raise NotAllowed(f"wrong password for {path}") from error
    except (KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise BadInput(f"{path} is no version 3 keystore: {error}") from error
    return Key.from_secret(secret)
