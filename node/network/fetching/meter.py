"""Bytes a second over the last few seconds. Pure; the caller brings the time."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

SPAN_S: Final = 10.0
STEP_S: Final = 0.25
"""Bytes this close together are counted as one, so a meter has a bounded size."""
SHORTEST_S: Final = 0.05
"""A rate over less says nothing; until then it is taken over this."""


@dataclass
class Meter:
    _steps: deque[tuple[float, int]] = field(default_factory=deque)
    """When a step began, and the bytes in it."""
    _bytes: int = 0

    def start(self, now: float) -> None:
        """What comes from now on is measured from now on; without this, from the first bytes on."""
        if not self._steps:
            self._steps.append((now, 0))

    def add(self, count: int, now: float) -> None:
        if self._steps and now - self._steps[-1][0] < STEP_S:
            began, before = self._steps.pop()
            self._steps.append((began, before + count))
        else:
            self._steps.append((now, count))
        self._bytes += count
        self._forget(now)

    def rate(self, now: float) -> float:
        """Bytes a second; 0 when nothing came."""
        self._forget(now)
        if not self._bytes:
            return 0.0
        return self._bytes / max(SHORTEST_S, now - self._steps[0][0])

    def _forget(self, now: float) -> None:
        while self._steps and now - self._steps[0][0] > SPAN_S:
            self._bytes -= self._steps.popleft()[1]
