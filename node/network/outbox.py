"""Which transactions of the pool a peer is to be sent, and when again. Pure bookkeeping; the caller brings the time.

A transaction is sent when it arrives, or a little later if the peer may hear of it otherwise, and again, with growing
pauses and a bounded number of times, for as long as it is in the pool: the peer may have refused it because it was
behind, or have lost it in a crash.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from node.network.messages import TRANSACTIONS_BYTES_MAX, TRANSACTIONS_MAX

RESEND_S_MIN: Final = 2.0
RESEND_S_MAX: Final = 60.0
SENDS_MAX: Final = 10


@dataclass
class _Sending:
    count: int
    due: float


@dataclass
class Outbox:
    """What one peer has been sent of the transactions now in the pool."""

    _sent: dict[bytes, _Sending] = field(default_factory=dict)

    def take(self, pending: Iterable[bytes], now: float, first_s: float = 0) -> list[bytes]:
        """The next batch to send, in pool order (nonces of an account follow each other); empty when nothing is due.
        What is new is due in `first_s`.

        What has left the pool is forgotten, so this holds at most one entry for each pending transaction.
        """
        batch: list[bytes] = []
        batch_bytes = 0
        full = False
        kept: dict[bytes, _Sending] = {}
        for raw in pending:
            sending = self._sent.get(raw) or _Sending(0, now + first_s)
            kept[raw] = sending
            if full or sending.due > now or sending.count >= SENDS_MAX:
                continue
            full = bool(batch) and batch_bytes + len(raw) > TRANSACTIONS_BYTES_MAX
            if full:
                continue
            batch.append(raw)
            full = len(batch) == TRANSACTIONS_MAX
            batch_bytes += len(raw)
            self._count(sending, now)
        self._sent = kept
        return batch

    def received(self, raw: bytes, now: float) -> None:
        """The peer sent it to us, so it need not get it back at once."""
        self._count(self._sent.setdefault(raw, _Sending(0, now)), now)

    def next_due(self) -> float:
        """When something is to be sent again; infinite when nothing is."""
        return min((s.due for s in self._sent.values() if s.count < SENDS_MAX), default=float("inf"))

    @staticmethod
    def _count(sending: _Sending, now: float) -> None:
        sending.due = now + min(RESEND_S_MAX, RESEND_S_MIN * 2**sending.count)
        sending.count += 1
