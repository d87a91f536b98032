"""How receipts leave the node: their ids, the lines of HTTP they travel in, and who may ask for one.

The id goes out in a header of every answer, before there is a receipt; the receipt itself in a header of a whole
answer, and in a comment before the end of a stream. Knows no route and no engine.
"""

from __future__ import annotations

import secrets

from contracts.errors import NotFound
from node.receipts import HEADER, ID_HEADER, KEPT_MAX, Receipt
from node.rpc import params
from node.rpc.caller import Caller, require_account
from node.rpc.port import NodePort

ID_BYTES = 16
"""Nobody guesses one."""


class ReceiptParams(params.Params, frozen=True):
    receipt_id: str


def new_id() -> str:
    return secrets.token_hex(ID_BYTES)


def announced(node: NodePort, receipt_id: str) -> dict[str, str]:
    """The headers of an answer that may have to begin before it is there."""
    return {ID_HEADER: receipt_id} if node.gives_receipts else {}


def carried(receipt: Receipt | None) -> dict[str, str]:
    """The further headers of a whole answer."""
    return {} if receipt is None else {HEADER: receipt.header()}


def comment(receipt: Receipt) -> bytes:
    """The same line in a stream, where clients pass over it."""
    return f": {HEADER}: {receipt.header()}\n\n".encode()


def find(node: NodePort, caller: Caller, receipt_id: str) -> Receipt:
    """The receipt, for the account that it names and the operator: that account may have lost its tier by now. Raises
    NotAllowed or NotFound; other people's are not there."""
    asker = require_account(caller, "getReceipt")
    if not node.gives_receipts:
        raise NotFound(
            "this node gives no receipts: inference.receipts is false in its config.toml; its operator sets it to true "
            "and starts the node again"
        )
    receipt = node.answer_receipt(receipt_id)
    if receipt is None or not (caller.is_operator or receipt.is_of(asker)):
        raise NotFound(
            f"no receipt {params.shown(receipt_id)} of yours here: it is there once the answer has ended, until the "
            f"node stops or has written {KEPT_MAX:,} later ones"
        )
    return receipt
