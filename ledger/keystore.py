"""Accounts' keys on disk, encrypted (Web3 Secret Storage, version 3, scrypt). Knows nothing of who owns them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import eth_keyfile

from contracts.errors import BadInput, Conflict, NoSpace, NotAllowed, NotFound
from contracts.types import Address
from ledger.keys import Key

SCRYPT_WORK_FACTOR = 1 << 17
"""N of scrypt, as OWASP recommends: 128 MiB and some tenths of a second for each guess at the password."""

KEYSTORE_BYTES_MAX = 16_384

WRONG_PASSWORD = "MAC mismatch"
"""What eth_keyfile says of a password that does not fit; its other errors are about the file."""


def write(path: Path, key: Key, password: str, work_factor: int = SCRYPT_WORK_FACTOR) -> None:
    """Write `key` encrypted under `password`, readable by its owner only. Raises Conflict if the file exists."""
    document = eth_keyfile.create_keyfile_json(key.secret, password.encode(), kdf="scrypt", iterations=work_factor)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise Conflict(f"{path} exists: a key is never overwritten; move it away or choose another name") from error
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink()  # half a key is of no use, and would stand in the way of the next attempt
        raise NoSpace(f"{path} cannot be written ({error.strerror}): free space, then try again") from error
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """A file survives a power cut only when the directory that names it was synced too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _document(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            text = file.read(KEYSTORE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFound(f"no key at {path}: make one with `aigen account new`") from error
    except OSError as error:
        raise BadInput(f"the key {path} cannot be read: {error.strerror}") from error
    if len(text) > KEYSTORE_BYTES_MAX:
        raise BadInput(f"{path} is no keystore: it has more than {KEYSTORE_BYTES_MAX} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is no keystore: not JSON") from error
    if not isinstance(document, dict) or "address" not in document:
        raise BadInput(f"{path} is no keystore: an object with address and crypto is expected")
    return document


def address(path: Path) -> Address:
    """The address of the key in a keystore, which is readable without the password."""
    return _address(path, _document(path))


def _address(path: Path, document: dict[str, object]) -> Address:
    text = str(document["address"]).removeprefix("0x")
    if re.fullmatch("[0-9a-fA-F]{40}", text) is None:
        raise BadInput(f"{path} is no keystore: its address is not 40 hexadecimal digits")
    return Address(bytes.fromhex(text))


def read(path: Path, password: str) -> Key:
    """Decrypt. Raises NotAllowed for a wrong password, BadInput for a file that is no keystore."""
    document = _document(path)
    expected = _address(path, document)
    try:
        secret = eth_keyfile.decode_keyfile_json(document, password.encode())
    except (KeyError, TypeError, AttributeError, NotImplementedError, ValueError, MemoryError) as error:
        if str(error) == WRONG_PASSWORD:
            raise NotAllowed(f"wrong password for {path}") from error
        raise BadInput(f"{path} is no version 3 keystore: {error}") from error
    key = Key.from_secret(secret)
    if key.address != expected:
        raise BadInput(f"{path} names account 0x{expected.hex()}, its key is of 0x{key.address.hex()}: it was altered")
    return key
