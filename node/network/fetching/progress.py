"""How far the shards of one model are, for whoever waits for them."""

from dataclasses import dataclass, field

import trio

from node.network.fetching.meter import Meter


@dataclass
class FetchProgress:
    """Bytes of a model's shards that this node holds, as they come in; `bytes_done` never goes back."""

    bytes_done: int = 0
    bytes_total: int = 0
    _here: dict[int, int] = field(default_factory=dict)
    """By shard."""
    _meter: Meter = field(default_factory=Meter)

    def report(self, index: int, bytes_here: int) -> None:
        """So much of a shard is here now. What lay here when it was first looked at did not come in."""
        came = bytes_here - self._here.get(index, bytes_here)
        if came > 0:
            self._meter.add(came, trio.current_time())
        self._here[index] = bytes_here
        self.bytes_done = max(self.bytes_done, sum(self._here.values()))

    def rate(self) -> float:
        """Bytes a second over the last seconds."""
        return self._meter.rate(trio.current_time())
