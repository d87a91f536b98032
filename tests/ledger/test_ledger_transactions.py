"""Transactions: ours and other wallets' are taken; altered ones are refused or somebody else's."""

import contextlib
import sys
from typing import Any

import pytest
import rlp
from eth_account import Account
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import BadInput, NotAllowed
from ledger.keys import HALF_ORDER
from ledger.transactions import CALL_GAS, TRANSACTION_BYTES_MAX, check_enrolled, decode, sign
from tests.ledger.world import ADMIN, CONFIG, OPERATOR, register

CHAIN_ID, GAS_LIMIT = CONFIG.network.chain_id, CONFIG.network.gas_limit
CALL = register()
RAW = sign(ADMIN, CHAIN_ID, 7, CALL.to, CALL.encode(), CALL_GAS)

FIELDS: dict[str, Any] = {
    "type": 2,
    "chainId": CHAIN_ID,
    "nonce": 7,
    "to": CALL.to,
    "value": 0,
    "gas": CALL_GAS,
    "maxFeePerGas": 0,
    "maxPriorityFeePerGas": 0,
    "data": CALL.encode(),
}
LEGACY: dict[str, Any] = {key: FIELDS[key] for key in ("chainId", "nonce", "to", "value", "gas", "data")} | {
    "gasPrice": 0
}


LISTED = FIELDS | {
    "accessList": [{"address": "0x" + CALL.to.hex(), "storageKeys": ["0x" + "01" * 32, "0x" + "00" * 32]}]
}


def take(raw: bytes) -> Any:
    return decode(raw, CHAIN_ID, GAS_LIMIT)


def signed(fields: dict[str, Any]) -> bytes:
    """As another wallet signs."""
    return bytes(Account.sign_transaction(fields, ADMIN.secret).raw_transaction)


def test_what_is_signed_is_decoded() -> None:
    found = take(RAW)
    assert (found.sender, found.nonce, found.to, found.data) == (ADMIN.address, 7, CALL.to, CALL.encode())
    assert (found.raw, found.gas) == (RAW, CALL_GAS)


@pytest.mark.parametrize("fields", [FIELDS, LEGACY], ids=["type 2", "legacy"])
def test_other_wallets_transactions_are_taken(fields: dict[str, Any]) -> None:
    found = take(signed(fields))
    assert (found.sender, found.nonce, found.to, found.data) == (ADMIN.address, 7, CALL.to, CALL.encode())
    assert found.hash == Account.sign_transaction(fields, ADMIN.secret).hash


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chainId": CHAIN_ID + 1}, "chain id"),
        ({"maxFeePerGas": 1}, "fee"),
        ({"maxFeePerGas": 1, "maxPriorityFeePerGas": 1}, "fee"),
        ({"value": 1}, "value"),
        ({"to": OPERATOR.address}, "destination"),
        ({"to": b"", "data": b"\0"}, "contract creation"),
        ({"gas": GAS_LIMIT + 1}, "above a block's"),
        ({"gas": 21_000}, "below the intrinsic"),
    ],
)
def test_rules_that_need_no_state(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        take(signed(FIELDS | change))


def test_legacy_rules() -> None:
    with pytest.raises(BadInput, match="fee"):
        take(signed(LEGACY | {"gasPrice": 1}))
    with pytest.raises(BadInput, match="chain id"):
        take(signed({key: value for key, value in LEGACY.items() if key != "chainId"}))


def test_access_list_type_is_refused() -> None:
    with pytest.raises(BadInput, match="type 1"):
        take(signed(LEGACY | {"type": 1, "accessList": []}))


def test_type_2_with_an_access_list_is_taken() -> None:
    assert take(signed(LISTED)).sender == ADMIN.address


@pytest.mark.parametrize("fields", [FIELDS, LEGACY, LISTED], ids=["type 2", "legacy", "with an access list"])
def test_what_is_read_is_what_py_evm_reads(fields: dict[str, Any]) -> None:
    found = take(signed(fields))
    theirs = found.signed
    assert (found.sender, found.hash, found.type) == (theirs.get_sender(), theirs.hash, theirs.type_id or 0)
    for name in ("nonce", "gas", "to", "data", "intrinsic_gas"):
        assert getattr(found, name) == getattr(theirs, name)
    assert found.access_list == tuple((account, tuple(slots)) for account, slots in theirs.access_list)


ACCOUNT, KEY = b"a" * 20, b"k" * 32
NUMBERS = [b"\0", b"\0\1", b"\1" * 33, []]
NO_LISTS = [b"", b"\1", [b""], [[ACCOUNT]], [[ACCOUNT, b""]], [[b"", []]], [[ACCOUNT, [KEY[1:]]]], [[ACCOUNT, [[]]]]]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((place, value) for place in (0, 1, 2, 3, 4, 6, 9, 10, 11) for value in NUMBERS),
        (1, b"\xff" * 8),
        (9, b"\2"),
        (5, []),
        (7, []),
        *((8, value) for value in NO_LISTS),
    ],
)
def test_fields_that_are_none(place: int, value: Any) -> None:
    """Whoever signed it: the sender would be somebody, were it taken."""
    fields = rlp.decode(RAW[1:])
    fields[place] = value
    with pytest.raises(BadInput, match="not a signed Ethereum transaction"):
        take(RAW[:1] + rlp.encode(fields))


@pytest.mark.parametrize("first", [*range(2), *range(3, 256)])
def test_only_two_types_are_taken(first: int) -> None:
    with pytest.raises(BadInput, match=r"type|list|not a signed"):
        take(bytes([first]) + RAW[1:])


def test_oversized_transaction() -> None:
    with pytest.raises(BadInput, match="at most"):
        take(bytes(TRANSACTION_BYTES_MAX + 1))


def test_second_form_of_the_signature_is_refused() -> None:
    fields = rlp.decode(RAW[1:])
    parity, s = int.from_bytes(fields[-3]), int.from_bytes(fields[-1])
    fields[-3:] = [b"" if parity else b"\1", fields[-2], (2 * HALF_ORDER + 1 - s).to_bytes(32)]
    with pytest.raises(BadInput, match="not canonical"):
        take(RAW[:1] + rlp.encode(fields))


@settings(max_examples=300)
@given(place=st.integers(0, len(RAW) - 1), change=st.integers(1, 255))
def test_any_altered_byte_is_refused_or_anothers(place: int, change: int) -> None:
    raw = bytearray(RAW)
    raw[place] ^= change
    with contextlib.suppress(BadInput):
        assert take(bytes(raw)).sender != ADMIN.address


@given(field=st.integers(0, 11), value=st.binary(max_size=40))
def test_any_altered_field_is_refused_or_anothers(field: int, value: bytes) -> None:
    fields = rlp.decode(RAW[1:])
    if fields[field] == value:
        return
    fields[field] = value
    with contextlib.suppress(BadInput):
        assert take(RAW[:1] + rlp.encode(fields)).sender != ADMIN.address


@given(raw=st.binary(max_size=200) | st.integers(0, 255).flatmap(lambda n: st.just(bytes([n]) + RAW[1:])))
def test_any_bytes_are_a_transaction_or_bad_input(raw: bytes) -> None:
    with contextlib.suppress(BadInput):
        take(raw)


@pytest.mark.parametrize("fields", [FIELDS, LEGACY], ids=["type 2", "legacy"])
def test_second_encoding_of_the_same_is_refused(fields: dict[str, Any]) -> None:
    """An empty list could be taken for the number 0, and no bytes for an empty list: another hash of the same."""
    raw = signed(fields)
    kind, body = (raw[:1], raw[1:]) if raw[0] == 2 else (b"", raw)
    values = rlp.decode(body)
    for place, value in enumerate(values):
        if value in (b"", []):
            other = kind + rlp.encode([*values[:place], b"" if value == [] else [], *values[place + 1 :]])
            assert other != raw
            with pytest.raises(BadInput):
                take(other)


@pytest.mark.parametrize("raw", [RAW + b"\0", RAW[:-1], b"\x02" + RAW])
def test_more_or_less_than_one_transaction(raw: bytes) -> None:
    with pytest.raises(BadInput):
        take(raw)


def test_enrolment() -> None:
    check_enrolled(take(RAW), {ADMIN.address}.__contains__)
    with pytest.raises(NotAllowed, match="aigen account enrol"):
        check_enrolled(take(RAW), set().__contains__)


def test_lists_nested_without_end_are_refused() -> None:
    nested = b"\xc0"
    for _ in range(2000):
        size = len(nested)
        width = (size.bit_length() + 7) // 8
        nested = (bytes([0xC0 + size]) if size < 56 else bytes([0xF7 + width]) + size.to_bytes(width)) + nested
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # a node's own, see node.startup
    try:
        for raw in (nested, b"\x02" + nested):
            with pytest.raises(BadInput, match="not a signed Ethereum transaction"):
                decode(raw, CONFIG.network.chain_id, CONFIG.network.gas_limit)
    finally:
        sys.setrecursionlimit(limit)
