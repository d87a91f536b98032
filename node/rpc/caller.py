"""Who is asking: the account behind a request, and the named checks on it. Knows no method and no HTTP framework.

- `Authorization: Bearer` names the account that signed the token; a token that is not good refuses the request.
- Without one, on a server bound to loopback, the node's own operator is meant: whoever can open a loopback socket
  can read the operator's files as well. Not so when a proxy has forwarded the request: then its asker is unknown.
- Without one elsewhere the asker is nobody, who may read the public ledger and hand in signed transactions.

An account counts as known when it is enrolled or holds a tier. Anyone can make a key and sign a token with it, so a
token of an unknown account opens nothing, and causes no transaction of the node's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from contracts.errors import NotAllowed
from contracts.types import Address
from node.rpc import token
from node.rpc.port import NodePort

FORWARDING_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""What a proxy adds: the socket's other end is then not the asker."""

SCHEME = "bearer"


@dataclass(frozen=True)
class Caller:
    """`account` is None for nobody."""

    account: Address | None
    is_operator: bool


NOBODY = Caller(None, False)


def identify(node: NodePort, headers: Mapping[str, str], loopback: bool, now: float) -> Caller:
    """The caller of a request. Raises NotAllowed for credentials that are not good."""
    authorization = headers.get("authorization")
    if authorization is not None:
        account = token.verify(_bearer(authorization), node.chain_id, now)
        return Caller(account, account == node.operator)
    if loopback and not any(name in headers for name in FORWARDING_HEADERS):
        return Caller(node.operator, True)
    return NOBODY


def _bearer(authorization: str) -> str:
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != SCHEME:
        raise NotAllowed("the Authorization header is no bearer token: send `Authorization: Bearer` and one")
    return credentials.strip()


def require_known(node: NodePort, caller: Caller, method: str) -> Address:
    """The caller's account. Raises NotAllowed for nobody and for an account the ledger has never let in."""
    account = require_account(caller, method)
    if not caller.is_operator:
        require_on_ledger(node, account)
    return account


def require_account(caller: Caller, method: str) -> Address:
    """The caller's account, known or not. Raises NotAllowed for nobody."""
    if caller.account is None:
        raise NotAllowed(f"{method} needs to know who asks: send `Authorization: Bearer` with a token of `aigen token`")
    return caller.account


def is_known(node: NodePort, caller: Caller) -> bool:
    """Whether to tell the caller what is this node's own affair, in an answer that is open to all."""
    try:
        require_known(node, caller, "")
    except NotAllowed:
        return False
    return True


def require_on_ledger(node: NodePort, account: Address) -> None:
    """Raise NotAllowed unless the account is enrolled or holds a tier."""
    info = node.account(account)
    if not info.enrolled and info.tier is None:
        shown = f"0x{account.hex()}"
        raise NotAllowed(
            f"account {shown} is neither enrolled nor holds a tier on this ledger: an admin runs "
            f"`aigen account enrol {shown}` or `aigen tier grant {shown}`"
        )


def require_operator(caller: Caller, method: str) -> None:
    """Raise NotAllowed unless the node's operator asks."""
    if not caller.is_operator:
        who = "nobody" if caller.account is None else f"0x{caller.account.hex()}"
        raise NotAllowed(f"{method} is for this node's operator, and {who} asks: use the operator's key")
