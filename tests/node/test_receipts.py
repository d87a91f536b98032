"""Receipts: whatever is changed in one shows, both forms say the same, and anybody can compute the hashes anew."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadInput
from contracts.types import Address, ManifestHash, ModelId, TransactionHash, Version
from node import receipts
from node.inference.spec import STOP_CHARACTERS_MAX, STOPS_MAX, Completion, Message, Parameters, Prompt, Usage
from node.network.identity import NodeIdentity, public_key_of_node_id
from node.receipts import RECEIPT_BYTES_MAX, Receipt, Receipts

US, OTHERS = (NodeIdentity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)) for seed in (1, 2))
ALICE, BOB = Address(b"\xaa" * 20), Address(b"\xbb" * 20)
NOW = 1_800_000_000
QUESTION = (Message("system", "Be brief."), Message("user", 'Wie heißt "Paris"?\n\u2028'))


def desk(identity: NodeIdentity = US, kept_max: int = receipts.KEPT_MAX) -> Receipts:
    return Receipts(identity, 41_000, b"\x0e" * 32, kept_max=kept_max, clock=lambda: NOW + 0.9)


def write(
    at: Receipts,
    receipt_id: str = "ab" * 16,
    prompt: Prompt = QUESTION,
    parameters: Parameters = Parameters(),  # noqa: B008 - frozen
    text: str = "Paris heißt Paris.",
) -> Receipt:
    return at.write(
        receipt_id,
        account=ALICE,
        model_id=ModelId("mistral-7b"),
        version=Version("1"),
        manifest_hash=ManifestHash(b"\x0a" * 32),
        precision="int4",
        check=(TransactionHash(b"\x0c" * 32), 12),
        prompt=prompt,
        parameters=parameters,
        done=Completion(text, "stop", Usage(9, 5, 3)),
    )


RECEIPT = write(desk(), parameters=Parameters(temperature=0.7, seed=5))
PLAIN: dict[str, Any] = msgspec.to_builtins(RECEIPT)


def encoded(plain: Any) -> bytes:
    return json.dumps(plain).encode()


def test_it_says_what_was_asked_and_answered() -> None:
    assert {
        name: value for name, value in PLAIN.items() if name not in {"prompt_hash", "answer_hash", "signature"}
    } == {
        "format": "aigen-receipt-1",
        "receipt_id": "ab" * 16,
        "node_id": US.node_id,
        "chain_id": 41_000,
        "genesis_hash": "0x" + "0e" * 32,
        "model_id": "mistral-7b",
        "version": "1",
        "manifest_hash": "0x" + "0a" * 32,
        "precision": "int4",
        "account": "0x" + "aa" * 20,
        "check_transaction_hash": "0x" + "0c" * 32,
        "check_block_number": 12,
        "parameters": {"max_tokens": 512, "temperature": 0.7, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 5},
        "finish_reason": "stop",
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "time": NOW,
    }
    assert RECEIPT.is_of(ALICE)
    assert not RECEIPT.is_of(BOB)


def test_who_has_no_code_of_ours_checks_it_with_what_the_document_says() -> None:
    """The recipe of the module's docstring, with Python's json, hashlib and Ed25519."""

    def canonical(value: Any) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    read = json.loads(base64.urlsafe_b64decode(RECEIPT.header() + "=="))
    signature = bytes.fromhex(read.pop("signature")[2:])
    key = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32).public_key()
    assert key.public_bytes_raw() == public_key_of_node_id(read["node_id"])
    key.verify(signature, b"aigen receipt 1\0" + canonical(read))
    messages = [{"role": message.role, "content": message.content} for message in QUESTION]
    assert read["prompt_hash"] == f"0x{hashlib.sha256(canonical(messages)).hexdigest()}"
    assert read["answer_hash"] == f"0x{hashlib.sha256('Paris heißt Paris.'.encode()).hexdigest()}"


def test_a_plain_text_is_no_conversation_that_reads_alike() -> None:
    text = receipts.canonical(msgspec.to_builtins(QUESTION)).decode()
    assert receipts.prompt_hash(text) != receipts.prompt_hash(QUESTION)


@pytest.mark.parametrize("form", [encoded(PLAIN), msgspec.json.encode(RECEIPT), RECEIPT.header().encode()])
@pytest.mark.parametrize("around", ["{}", " {}\n"])
def test_both_forms_are_read(form: bytes, around: str) -> None:
    assert receipts.decode(around.format(form.decode()).encode()) == RECEIPT


@pytest.mark.parametrize("line", ["x-aigen-receipt: {}\r\n", ": x-aigen-receipt: {}\n\n", "{}=="])
def test_the_header_is_read_as_it_stands_there(line: str) -> None:
    header = RECEIPT.header()
    if line.startswith("{}"):
        line = "{}" + "=" * (-len(header) % 4)
    assert receipts.decode(line.format(header).encode()) == RECEIPT


def test_what_a_language_with_one_kind_of_number_writes_is_read() -> None:
    """JavaScript's JSON has no 1.0."""
    whole = write(desk(), parameters=Parameters(temperature=1.0, top_p=0.25))
    assert b"1.0" not in msgspec.json.encode(whole)
    assert receipts.decode(msgspec.json.encode(whole)).parameters["temperature"] == 1


# What is changed shows


def other(value: Any) -> st.SearchStrategy[Any]:
    """Another value of that kind, fit for the place or not."""
    match value:
        case int() | float():
            kinds = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        case dict():
            kinds = st.just({}) | st.just({**value, "seed": 6}) | st.just({**value, "top_k": True})
        case _:
            digits = st.integers(0, len(value) - 1).map(
                lambda at: value[:at] + ("1" if value[at] != "1" else "2") + value[at + 1 :]
            )
            kinds = st.text(max_size=40) | digits
    return kinds.filter(lambda found: found != value or type(found) is not type(value))


@given(st.data())
def test_any_changed_field_is_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(PLAIN)))
    changed = {**PLAIN, name: data.draw(other(PLAIN[name]))}
    # 12.0 is 12: the number, not how it is written, is what was signed.
    if json.loads(encoded(changed)) == PLAIN and not isinstance(changed[name], bool | dict):
        return
    with pytest.raises(BadInput):
        receipts.decode(encoded(changed))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_every_field_is_signed(name: str) -> None:
    """Also when what stands there instead would be good."""
    elsewhere = msgspec.to_builtins(
        Receipts(OTHERS, 41_001, b"\x0f" * 32, clock=lambda: NOW + 5).write(
            "cd" * 16,
            account=BOB,
            model_id=ModelId("llama2-13b"),
            version=Version("2"),
            manifest_hash=ManifestHash(b"\x0b" * 32),
            precision="bf16",
            check=(TransactionHash(b"\x0d" * 32), 13),
            prompt="another",
            parameters=Parameters(seed=6),
            done=Completion("other", "length", Usage(10, 6)),
        )
    )
    if name == "format":
        return
    assert elsewhere[name] != PLAIN[name]
    with pytest.raises(BadInput, match="is not what node 12D3KooW"):
        receipts.decode(encoded({**PLAIN, name: elsewhere[name]}))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_field_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(BadInput, match=f"not a receipt of this version.*{name}"):
        receipts.decode(encoded({key: value for key, value in PLAIN.items() if key != name}))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a receipt"),
        (b"hello, world", "neither a JSON object nor the base64url"),
        (b"{}", "missing required field"),
        (b"{" * RECEIPT_BYTES_MAX, "not a receipt"),
        (b"\xff{}", "neither a JSON object"),
        (b" " * (RECEIPT_BYTES_MAX + 1), "16385 bytes or more, at most 16384"),
        (encoded({**PLAIN, "comment": "and more"}), "unknown field `comment`"),
        (encoded({**PLAIN, "format": "aigen-receipt-2"}), "aigen-receipt-2"),
        (encoded({**PLAIN, "node_id": "12D3KooW"}), "no node_id"),
        (base64.urlsafe_b64encode(b"[]"), "Expected `object`"),
    ],
)
def test_what_is_no_receipt_is_told_so_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(BadInput) as refused:
        receipts.decode(data)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_signature_for_something_else_is_none() -> None:
    said = {name: value for name, value in PLAIN.items() if name != "signature"}
    signature = f"0x{US.sign(receipts.canonical(said)).hex()}"
    with pytest.raises(BadInput, match="is not what node"):
        receipts.decode(encoded({**said, "signature": signature}))


# Parameters


def test_long_parameters_stand_there_by_their_hash() -> None:
    stop = tuple("é" * STOP_CHARACTERS_MAX for _ in range(STOPS_MAX))
    receipt = write(desk(), parameters=Parameters(stop=stop))
    found = hashlib.sha256(json.dumps(stop, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
    assert receipt.parameters["stop"] == f"0x{found}"
    assert len(receipt.header()) < 2_000, "a header has to pass proxies"
    assert receipts.decode(receipt.header().encode()) == receipt


@given(
    st.builds(
        Parameters,
        max_tokens=st.integers(1, 1 << 20),
        temperature=st.floats(0, 2),
        top_p=st.floats(0, 1, exclude_min=True),
        seed=st.none() | st.integers(0, (1 << 63) - 1),
        stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    ),
    st.text(),
)
def test_every_receipt_reads_back(parameters: Parameters, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in "".join((text, *parameters.stop))):
        return  # no JSON has them, so nobody asks with one
    receipt = write(desk(), parameters=parameters, prompt=text or "-", text=text)
    assert receipts.decode(msgspec.json.encode(receipt)) == receipt
    assert receipts.decode(receipt.header().encode()) == receipt


# Keeping


def test_the_newest_are_kept() -> None:
    at = desk(kept_max=3)
    written = [write(at, f"{number}") for number in range(5)]
    assert [at.find(f"{number}") for number in range(5)] == [None, None, *written[2:]]
