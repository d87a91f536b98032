"""Receipts: what a node signs about an answer it gave, how anyone checks that, and the newest ones kept by their id.

A receipt says which node answered whom with which model, by what tier check, and has the hashes of prompt and answer:
who has the texts can show that they are the ones, who has not can only guess them. The node's Ed25519 key signs it; the
node_id in it is that key's peer id, so the receipt alone is enough to check the signature. It shows who said so, not
that it is true.

**Canonical JSON** is what Python's `json` writes with keys in ascending order, no spaces and no escapes but those JSON
needs, in UTF-8. Signed is DOMAIN, a zero byte and the canonical JSON of all members but `signature`. `prompt_hash` is
the SHA-256 of the canonical JSON of the prompt as the model was asked, a string for a plain text, else the messages
with `role` and `content` each; `answer_hash` is that of the answer's text itself. Knows no HTTP and no ledger.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from contracts.errors import BadInput
from contracts.types import Address, ManifestHash, ModelId, NodeId, TransactionHash, Version
from node.inference.spec import Completion, Parameters, Prompt
from node.network.identity import NODE_ID_CHARS_MAX, NodeIdentity, verify_signature

FORMAT: Final = "aigen-receipt-1"
DOMAIN = b"aigen receipt 1"

HEADER = "x-aigen-receipt"
ID_HEADER = "x-aigen-receipt-id"
"""Of HTTP. The id is that of the answer too, after `chatcmpl-` or `cmpl-`."""

KEPT_MAX = 10_000
"""Receipts a node keeps, the newest; some 14 MB."""

RECEIPT_BYTES_MAX = 16 << 10
"""In either form. A usual one has 1.0 kB, 1.4 kB in a header."""

TEXT_CHARACTERS_MAX = 256
PARAMETERS_MAX = 64

Text = Annotated[str, Meta(max_length=TEXT_CHARACTERS_MAX, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
Hash = Annotated[str, Meta(pattern=r"\A0x[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0)]


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`check_transaction_hash` is the tier check that let the account in, `time` in Unix seconds. In `parameters`, so
    that who has the prompt can ask again: those that are numbers as they are, any other by the SHA-256 of its canonical
    JSON, and none that is empty. The JSON schema counts as the text that the engine was given, in the asker's order."""

    format: Literal["aigen-receipt-1"]
    receipt_id: Text
    node_id: Annotated[NodeId, Meta(max_length=NODE_ID_CHARS_MAX)]
    chain_id: Count
    genesis_hash: Hash
    model_id: Text
    version: Text
    manifest_hash: Hash
    precision: Text
    account: Annotated[str, Meta(pattern=r"\A0x[0-9a-f]{40}\Z")]
    check_transaction_hash: Hash
    check_block_number: Count
    prompt_hash: Hash
    answer_hash: Hash
    parameters: Annotated[dict[Text, bool | int | float | Hash], Meta(max_length=PARAMETERS_MAX)]
    finish_reason: Text
    prompt_tokens: Count
    completion_tokens: Count
    time: Count
    signature: Annotated[str, Meta(pattern=r"\A0x[0-9a-f]{128}\Z")]

    def signed_bytes(self) -> bytes:
        """What the signature is over: everything else."""
        said = msgspec.to_builtins(self)
        del said["signature"]
        return DOMAIN + b"\0" + canonical(said)

    def check(self) -> None:
        """Raise BadInput unless the node it names signed just this."""
        if not verify_signature(self.node_id, self.signed_bytes(), bytes.fromhex(self.signature[2:])):
            raise BadInput(
                f"the receipt is not what node {self.node_id} signed: it was changed, or somebody else made it; ask "
                "for it again where it came from"
            )

    def is_of(self, account: Address) -> bool:
        return self.account == _hex(account)

    def header(self) -> str:
        """For one line of ASCII: the canonical JSON in base64url, without padding."""
        return base64.urlsafe_b64encode(canonical(msgspec.to_builtins(self))).rstrip(b"=").decode()


def canonical(value: Any) -> bytes:
    """The one JSON of a plain value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def prompt_hash(prompt: Prompt) -> str:
    return _sha256(canonical(msgspec.to_builtins(prompt)))


def answer_hash(text: str) -> str:
    return _sha256(text.encode())


def decode(data: bytes) -> Receipt:
    """A receipt as JSON or as `header` wrote it, with or without the header's name before it; its signature is checked.
    Raises BadInput for anything else."""
    if len(data) > RECEIPT_BYTES_MAX:
        raise BadInput(f"a receipt of {len(data)} bytes or more, at most {RECEIPT_BYTES_MAX} are read")
    text = data.strip()
    if not text.startswith(b"{"):
        try:
            word = text.split()[-1] if text else b""
            text = base64.b64decode(word + b"=" * (-len(word) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInput("not a receipt: neither a JSON object nor the base64url of a response's header") from error
    try:
        receipt = msgspec.json.decode(text, type=Receipt)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a receipt of this version: {error}") from error
    receipt.check()
    return receipt


class Receipts:
    """A node's own: written under its key, the newest KEPT_MAX of them kept until it stops."""

    def __init__(
        self,
        identity: NodeIdentity,
        chain_id: int,
        genesis_hash: bytes,
        *,
        kept_max: int = KEPT_MAX,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._chain_id = chain_id
        self._genesis_hash = _hex(genesis_hash)
        self._kept_max = kept_max
        self._clock = clock
        self._kept: dict[str, Receipt] = {}

    def find(self, receipt_id: str) -> Receipt | None:
        return self._kept.get(receipt_id)

    def write(
        self,
        receipt_id: str,
        *,
        account: Address,
        model_id: ModelId,
        version: Version,
        manifest_hash: ManifestHash,
        precision: str,
        check: tuple[TransactionHash, int],
        prompt: Prompt,
        parameters: Parameters,
        done: Completion,
    ) -> Receipt:
        """Sign and keep one; `check` is the transaction of the tier check and its block."""
        unsigned = Receipt(
            format=FORMAT,
            receipt_id=receipt_id,
            node_id=self._identity.node_id,
            chain_id=self._chain_id,
            genesis_hash=self._genesis_hash,
            model_id=model_id,
            version=version,
            manifest_hash=_hex(manifest_hash),
            precision=precision,
            account=_hex(account),
            check_transaction_hash=_hex(check[0]),
            check_block_number=check[1],
            prompt_hash=prompt_hash(prompt),
            answer_hash=answer_hash(done.text),
            parameters=_parameters(parameters),
            finish_reason=done.finish_reason,
            prompt_tokens=done.usage.prompt_tokens,
            completion_tokens=done.usage.completion_tokens,
            time=int(self._clock()),
            signature="",
        )
        signature = self._identity.sign(unsigned.signed_bytes())
        receipt = msgspec.structs.replace(unsigned, signature=_hex(signature))
        self._kept[receipt_id] = receipt
        while len(self._kept) > self._kept_max:
            del self._kept[next(iter(self._kept))]
        return receipt


def _parameters(parameters: Parameters) -> dict[str, bool | int | float | str]:
    """Whole numbers without a fraction, so that every language writes them alike."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in msgspec.to_builtins(parameters).items():
        if isinstance(value, float) and value.is_integer():
            found[name] = int(value)
        elif isinstance(value, bool | int | float):
            found[name] = value
        elif value:
            found[name] = _sha256(canonical(value))
    return found


def _sha256(data: bytes) -> str:
    return _hex(hashlib.sha256(data).digest())


def _hex(data: bytes) -> str:
    return f"0x{data.hex()}"
