"""A token bucket: how often something may happen. The caller brings the time."""

from dataclasses import dataclass, field


@dataclass
class Rate:
    """`per_s` times a second on average, after a burst of `burst`."""

    per_s: float
    burst: float
    _credit: float = field(init=False)
    _credited_at: float = field(default=float("-inf"), init=False)

    def __post_init__(self) -> None:
        self._credit = self.burst

    def take(self, now: float) -> bool:
        """Whether it may happen once more; it counts if so."""
        if now > self._credited_at:
            self._credit = min(self.burst, self._credit + (now - self._credited_at) * self.per_s)
            self._credited_at = now
        if self._credit < 1:
            return False
        self._credit -= 1
        return True
