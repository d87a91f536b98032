"""The connected nodes as consensus sees them: what each is yet to be sent, and what it sent that waits to be read.

Everything is bounded for each peer by itself, so that none crowds out the rest; what is dropped, statuses make good.
Knows no sockets and no rules.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import trio

from contracts.limits import AUTHORITIES_MAX
from contracts.types import Address
from ledger.exchange import Envelope
from ledger.rate import Rate
from ledger.votes import Evidence

INBOX_MAX = 512
"""Messages of one peer that wait to be read."""

PEER_RATE = 100.0
"""Messages a second of one peer, after a burst of a full inbox: each may cost us the check of a signature."""

EVIDENCE_MAX = 2 * AUTHORITIES_MAX
"""Proofs that one peer sends in one connection; an honest one sends one for each liar there ever was."""

OUTBOX_MAX = 512
OUTBOX_BYTES_MAX = 32 << 20


class Outbox:
    """What one peer is yet to be sent."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._size_bytes = 0
        self._filled = trio.Event()
        self.dropped = 0

    def put(self, data: bytes) -> bool:
        """Whether there was room."""
        if len(self._waiting) >= OUTBOX_MAX or self._size_bytes + len(data) > OUTBOX_BYTES_MAX:
            self.dropped += 1
            return False
        self._waiting.append(data)
        self._size_bytes += len(data)
        self._filled.set()
        return True

    async def take(self, bytes_max: int, count_max: int) -> list[bytes]:
        """The next messages, once there are any: at least one, and as many more as fit."""
        while not self._waiting:
            self._filled = trio.Event()
            await self._filled.wait()
        taken: list[bytes] = []
        size_bytes = 0
        while self._waiting and len(taken) < count_max:
            size_bytes += len(self._waiting[0])
            if taken and size_bytes > bytes_max:
                break
            taken.append(self._waiting.popleft())
            self._size_bytes -= len(taken[-1])
        return taken


@dataclass
class Peer:
    """A connected node."""

    outbox: Outbox = field(default_factory=Outbox)
    takes_part: bool = False
    """It has sent a message of consensus other than evidence: only authorities do."""
    told_at: float = float("-inf")
    """When it was last told our status; `heard_at`: when its own was last answered."""
    heard_at: float = float("-inf")
    dropped: int = 0
    evidence: list[Evidence] = field(default_factory=list)
    """What it sent that was not looked at, or that waits for its epoch."""
    liars: set[Address] = field(default_factory=set)
    """Against whom it has evidence: from us, or it told us."""
    _evidence_left: int = EVIDENCE_MAX
    _inbox: deque[Envelope] = field(default_factory=deque)
    _rate: Rate = field(default_factory=lambda: Rate(PEER_RATE, INBOX_MAX))

    def put(self, envelope: Envelope) -> None:
        """Keep a message that it sent, while it keeps to its rate. Evidence, which is sent once only, has a place of
        its own."""
        if isinstance(envelope.message, Evidence):
            if self._evidence_left:
                self._evidence_left -= 1
                self.evidence.append(envelope.message)
            else:
                self.dropped += 1
            return
        if len(self._inbox) < INBOX_MAX and self._rate.take(trio.current_time()):
            self._inbox.append(envelope)
        else:
            self.dropped += 1

    def next(self) -> Envelope | None:
        return self._inbox.popleft() if self._inbox else None
