"""Whether the next pieces of one connection should come packed: measured as it runs. Pure; the caller brings the times.

What counts is how many bytes of the shard are there a second, proved and written, whatever held them up: the link, a
limit on it, or a processor at either end. At first a few pieces come as they are, then a few packed, in turns; from
then on as they came faster, and now and then a few come the other way, because links and loads change. A few at a time:
what lies in the buffers between the two ends is then of one kind for the most part.
"""

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Final

GROUP_PIECES: Final = 4
"""Pieces that come alike, and whose speed is one measurement."""
GROUPS: Final = 3
"""Measurements of each way that count, the newest; of an odd number one that went astray does not decide."""
GAIN_MIN: Final = 1.05
"""Packed pieces must come this much faster: they cost both ends time that others could use."""
PAUSE_GROUPS_MIN: Final = 8
PAUSE_GROUPS_MAX: Final = 128
"""Groups until the other way is tried again: the fewest after a change, then twice as many each time."""


class Chooser:
    """Ask `next` for each piece to request, and say with `took` how each came, in any order."""

    def __init__(self) -> None:
        self._speeds = {way: deque[float](maxlen=GROUPS) for way in (False, True)}
        self._under_way = {False: _Group(), True: _Group()}
        self._left = 0
        """Pieces still to ask for of the group."""
        self._way = True
        """Of the group that is asked for: packed or not. The first group comes as it is."""
        self._faster = False
        self._pause = self._pause_left = PAUSE_GROUPS_MIN

    def next(self) -> bool:
        """Whether the next piece may come packed."""
        if not self._left:
            self._left = GROUP_PIECES
            self._way = self._next_way()
        self._left -= 1
        return self._way

    def took(self, packed: bool, size_bytes: int, seconds: float) -> None:
        """A piece that was asked for this way, of so many bytes when it is not packed, took so long."""
        group = self._under_way[packed]
        group.pieces += 1
        group.bytes += size_bytes
        group.seconds += seconds
        if group.pieces == GROUP_PIECES:
            self._speeds[packed].append(group.bytes / max(group.seconds, 1e-9))
            self._under_way[packed] = _Group()

    def _next_way(self) -> bool:
        if min(map(len, self._speeds.values())) < GROUPS:
            return not self._way
        faster = median(self._speeds[True]) > GAIN_MIN * median(self._speeds[False])
        if faster != self._faster:
            self._faster = faster
            self._pause = self._pause_left = PAUSE_GROUPS_MIN
        if self._pause_left:
            self._pause_left -= 1
            return faster
        self._pause = self._pause_left = min(2 * self._pause, PAUSE_GROUPS_MAX)
        return not faster


@dataclass
class _Group:
    pieces: int = 0
    bytes: int = 0
    seconds: float = 0.0
