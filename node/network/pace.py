"""A limit in bytes a second, shared fairly: whoever got least so far comes next.

`Pace` is for threads that move bytes; `Shares` beneath it is the rule, without clock and threads: virtual time, as in
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). Somebody who was away saves up nothing.
"""

import heapq
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from contracts.errors import Busy

BURST_S: Final = 0.25
"""How much may go out at once after a pause, as time at the limit."""


@dataclass(eq=False)
class Ticket:
    """Somebody's wish to move some bytes."""

    size_bytes: int
    granted: bool = False


@dataclass
class Shares:
    """Who may move bytes when. Time in seconds, brought by the caller."""

    bytes_per_s: float
    _waiting: list[tuple[float, int, str, Ticket]] = field(default_factory=list)
    _finished: dict[str, float] = field(default_factory=dict)
    """Where each name's last ticket ended in virtual time, of those who are ahead of it."""
    _virtual: float = 0.0
    _count: int = 0
    _free_at: float = 0.0
    """When all that was granted is through at the limit."""

    def ask(self, name: str, size_bytes: int) -> Ticket:
        start = max(self._virtual, self._finished.get(name, 0.0))
        self._finished[name] = start + size_bytes
        ticket = Ticket(size_bytes)
        self._count += 1
        heapq.heappush(self._waiting, (start, self._count, name, ticket))
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        self._waiting = [entry for entry in self._waiting if entry[3] is not ticket]
        heapq.heapify(self._waiting)

    def grant(self, now: float) -> bool:
        """Let the next one go if it is time; whether somebody was."""
        if not self._waiting or self.due() > now:
            return False
        self._virtual, _, _, ticket = heapq.heappop(self._waiting)
        ticket.granted = True
        self._free_at = max(self._free_at, now - BURST_S) + ticket.size_bytes / self.bytes_per_s
        self._finished = {name: end for name, end in self._finished.items() if end > self._virtual}
        return True

    def due(self) -> float:
        """When the next one may go."""
        return self._free_at


class Pace:
    """A limit on what threads move. Without one (0) nobody ever waits."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._shares = Shares(bytes_per_s) if bytes_per_s else None
        self._changed = threading.Condition()

    def take(self, share: "Share", size_bytes: int) -> None:
        """See `Share`, as for the next."""
        if self._shares is None:
            return
        with self._changed:
            ticket = self._shares.ask(share.name, size_bytes)
            while not ticket.granted:
                if share.closed:
                    self._shares.withdraw(ticket)
                    raise Busy("the connection was given up")
                while self._shares.grant(time.monotonic()):
                    self._changed.notify_all()
                if not ticket.granted:
                    self._changed.wait(max(0.0, self._shares.due() - time.monotonic()))

    def close(self, share: "Share") -> None:
        with self._changed:
            share.closed = True
            self._changed.notify_all()


class Share:
    """One connection's access to a limit. Those of one name have one share between them. `take` is for its thread,
    `close` for anybody."""

    def __init__(self, pace: Pace, name: str = "") -> None:
        self.name = name
        self.closed = False
        self._pace = pace

    def take(self, size_bytes: int) -> None:
        """Wait for leave to move so many bytes. Raises Busy once closed."""
        self._pace.take(self, size_bytes)

    def close(self) -> None:
        """End a wait."""
        self._pace.close(self)
