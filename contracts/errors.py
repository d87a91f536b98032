"""The one tree of expected errors. Every message says what happened, the numbers, and what to do next.

A bug is an AssertionError or a crash, never one of these. The JSON-RPC code of each kind is fixed here, so that a
client meets the same number whichever method refused. Knows nothing else.
"""

from typing import ClassVar


class Refused(Exception):
    """Something was refused for a reason the caller can act on; `str()` is the one line to show."""

    code: ClassVar[int] = -32000


class BadInput(Refused):
    """A value from outside is malformed or out of its limits."""

    code: ClassVar[int] = -32602


class NotFound(Refused):
    """What was named does not exist."""

    code: ClassVar[int] = -32001


class NotAllowed(Refused):
    """The caller may not do this: wrong key, no tier, not enrolled, not a member."""

    code: ClassVar[int] = -32003


class Conflict(Refused):
    """It exists already, or the state it needs has moved on (second registration, used nonce, port in use)."""

    code: ClassVar[int] = -32004


class NoSpace(Refused):
    """It does not fit: disk, memory or cache. The message has need and have."""

    code: ClassVar[int] = -32005


class BadPeer(Refused):
    """A peer, mirror or gateway broke the protocol or served wrong bytes; it is dropped."""

    code: ClassVar[int] = -32006


class Corrupt(Refused):
    """Bytes of our own on disk are not what was written; the message names the file and the way out."""

    code: ClassVar[int] = -32007


class Busy(Refused):
    """A limit or a deadline was reached; the same request may succeed in `retry_after_s`, where that is known."""

    code: ClassVar[int] = -32008

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Reverted(Refused):
    """A contract refused a call that was only tried. `data` is what it returned; the code is execution clients' own."""

    code: ClassVar[int] = 3

    def __init__(self, message: str, data: bytes = b"") -> None:
        super().__init__(message)
        self.data = data


_KINDS: dict[int, type[Refused]] = {
    kind.code: kind for kind in (Refused, BadInput, NotFound, NotAllowed, Conflict, NoSpace, BadPeer, Corrupt, Busy)
}


def refused(code: int, message: str) -> Refused:
    """An error that travelled between processes, as its own kind again."""
    return _KINDS.get(code, Refused)(message)
