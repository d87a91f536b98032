"""Keystores: read back with the password, refused with a reason otherwise, never overwritten."""

import json
import os
from pathlib import Path

import pytest
from eth_account import Account

from contracts.errors import BadInput, Conflict, NoSpace, NotAllowed, NotFound
from ledger import keystore
from ledger.keys import Key
from tests.ledger.world import ADMIN, OPERATOR

QUICK = 2
"""A work factor for tests."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys" / "admin.json"
    keystore.write(path, ADMIN, "correct horse", QUICK)
    return path


def alter(path: Path, *place: str, value: object) -> None:
    document = json.loads(path.read_text())
    part = document
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    path.write_text(json.dumps(document))


def test_written_key_is_read_back(path: Path) -> None:
    assert keystore.read(path, "correct horse") == ADMIN
    assert keystore.address(path) == ADMIN.address


def test_only_the_owner_may_read_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_default_work_factor_is_read_back_and_is_other_wallets_format(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    keystore.write(path, OPERATOR, "pässword")
    assert keystore.read(path, "pässword") == OPERATOR
    assert Account.decrypt(path.read_text(), "pässword") == OPERATOR.secret


def test_wrong_password(path: Path) -> None:
    with pytest.raises(NotAllowed, match="wrong password"):
        keystore.read(path, "correct house")


def test_existing_key_is_never_overwritten(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(Conflict, match="exists"):
        keystore.write(path, Key.generate(), "x", QUICK)
    assert path.read_bytes() == before


def test_missing_key(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="aigen account new"):
        keystore.read(tmp_path / "none.json", "x")


def test_directory_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        keystore.read(tmp_path, "x")


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", "{}", '{"address": "zz"}', '{"address": 5}', "[" * 10_000, '"' + "x" * 20_000 + '"'],
)
def test_no_keystore(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="no keystore"):
        keystore.read(path, "x")
    with pytest.raises(BadInput, match="no keystore"):
        keystore.address(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("version",), 1),
        (("version",), 4),
        (("crypto",), None),
        (("crypto", "kdf"), "md5"),
        (("crypto", "ciphertext"), "zz"),
        (("crypto", "kdfparams", "n"), 3),
        (("crypto", "kdfparams", "n"), 1 << 40),
        (("crypto", "kdfparams", "salt"), 5),
        (("crypto", "cipherparams", "iv"), "00" * 16),
        (("address",), OPERATOR.address.hex()),
    ],
)
def test_altered_keystore_is_bad_input_whatever_the_password(path: Path, place: tuple[str, ...], value: object) -> None:
    alter(path, *place, value=value)
    with pytest.raises(BadInput):
        keystore.read(path, "correct horse")


def test_full_disk_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "key.json"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(NoSpace, match="No space left"):
            keystore.write(path, ADMIN, "x", QUICK)
    assert not path.exists()
    keystore.write(path, ADMIN, "x", QUICK)
