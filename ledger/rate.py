"""A token bucket: how often something may happen, or how much of it. The caller brings the time."""

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

    def take(self, now: float, amount: float = 1) -> bool:
        """Whether it may happen once more, or so much of it; it counts if so."""
        self._accrue(now)
        if self._credit < amount:
            return False
        self._credit -= amount
        return True

    def give_back(self, now: float, amount: float) -> None:
        """What was taken and not used. Below 0 it is what was used and not taken: a debt, which is waited off."""
        self._accrue(now)
        self._credit = min(self.burst, self._credit + amount)

    def left(self, now: float) -> float:
        """How much may be taken; all of the burst when nothing was of late."""
        self._accrue(now)
        return self._credit

    def wait_s(self, now: float, amount: float) -> float:
        """How long until so much may be taken, if nothing else is until then."""
        assert amount <= self.burst, f"{amount} are never there at once: the burst is {self.burst}"
        return max(0.0, amount - self.left(now)) / self.per_s

    def _accrue(self, now: float) -> None:
        if now > self._credited_at:
            self._credit = min(self.burst, self._credit + (now - self._credited_at) * self.per_s)
            self._credited_at = now
