"""Which pieces are asked of which source next. Pure: no sockets, threads or clock; whoever calls brings the time.

A lane is one connection to one source. It takes a run of neighbouring pieces, the rarest first; as soon as it is
through it takes the next, so a fast source simply takes more. Pieces are sets of bits in integers: bit i is piece i.

Only pieces within a window after the first missing one are given out: the shard's own hash follows the pieces in
order, and what it reads back must still be in memory. For the same reason pieces are taken in order while every
source has them all; in a swarm, where nodes live on what they have that others lack, from a random place on.

A lane that has nothing left to take takes over from one that has been silent for long, or that is much slower once
every missing piece was asked of somebody (the end game). A piece is asked of two lanes at most.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from contracts.types import PIECE_SIZE

WINDOW_PIECES: Final = 1024
"""1 GiB, as much as may have to be read back for the shard's hash."""
RUN_PIECES_MAX: Final = 64
RUN_S: Final = 1.0
"""A run is what its source brings in about this time."""
RUN_IN_SWARM_S: Final = 0.25
"""The same while some sources have only a part: what is rarest changes soon, and others may take the same."""
SILENT_S: Final = 2.0
"""A lane that has brought nothing for this long may be taken over from, unless its pieces are known to take longer."""
SILENT_PIECES: Final = 3
"""Then it may after the time that so many of its pieces take."""
SOONER_TIMES: Final = 2
"""At the end a piece is asked of a second source when the first will take more than so many times as long: one with a
long queue, such as the only node that has everything, would keep everybody's last pieces waiting."""
SOONER_S: Final = 0.5
"""But not before the first has had this long: its last piece may have taken long for once."""
LANES_PER_PIECE_MAX: Final = 2
COUNTED_COPIES_MAX: Final = 8
"""What more lanes than this have is not told apart by rarity."""


@dataclass(eq=False)
class Lane:
    """One connection's place in the queue."""

    have: int
    """The pieces its source has."""
    coming: int = 0
    """The pieces its source will have soon: others need not ask the few that have them now."""
    given: int = 0
    """The pieces its source gave to others, whom this node need not know: each is as good as one more copy."""
    refused: int = 0
    """The pieces it said it had and did not give."""
    asked: int = 0
    """The pieces asked of it that have not come yet."""
    heard: float = 0.0
    """When it was asked or last brought something."""
    piece_s: float = 0.0
    """How long a piece took of late."""
    length_max: int = 1
    """Pieces of its next run at most: twice its last one's."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pieces to ask of a lane; `silent` is the lane they were taken over from, if any: silent, or slow."""

    pieces: range
    silent: Lane | None = None


@dataclass
class PieceQueue:
    """The missing pieces of one shard, and which lane was asked for which."""

    piece_count: int
    missing: int
    rng: random.Random
    lanes: list[Lane] = field(default_factory=list)
    is_shared: bool = False
    """Other nodes fetch this shard too."""

    @classmethod
    def of(cls, piece_count: int, missing: Iterable[int], rng: random.Random) -> "PieceQueue":
        bits = bytearray(piece_count // 8 + 1)
        for index in missing:
            bits[index // 8] |= 1 << index % 8
        return cls(piece_count, int.from_bytes(bits, "little"), rng)

    @property
    def everything(self) -> int:
        return (1 << self.piece_count) - 1

    def join(self, have: int, coming: int = 0, given: int = 0) -> Lane:
        """A new connection, whose source has these pieces; what lies beyond the shard is not believed."""
        lane = Lane(0)
        self.update(lane, have, coming, given)
        self.lanes.append(lane)
        return lane

    def update(self, lane: Lane, have: int, coming: int = 0, given: int = 0) -> None:
        """The source has these pieces by now."""
        lane.have = have & self.everything & ~lane.refused
        lane.coming = coming & self.everything
        lane.given = given & self.everything

    def refuse(self, lane: Lane, index: int) -> None:
        """Its source did not give a piece it was asked for."""
        lane.refused |= 1 << index
        lane.have &= ~lane.refused

    def leave(self, lane: Lane) -> None:
        """The connection ended; what it was asked for is free again."""
        self.lanes.remove(lane)

    def arrived(self, lane: Lane, index: int, now: float) -> bool:
        """A proved piece came; False when another lane had brought it already."""
        bit, took = 1 << index, now - lane.heard
        lane.asked &= ~bit
        lane.piece_s = (lane.piece_s + took) / 2 if lane.piece_s else took
        lane.heard = now
        new = bool(self.missing & bit)
        self.missing &= ~bit
        return new

    def finish(self, lane: Lane) -> None:
        """The lane's run is over, whatever of it came."""
        lane.asked = 0

    def take(self, lane: Lane, now: float, bytes_per_s: float) -> Run | None:
        """What to ask of a lane next, and note it; None when there is nothing for it now.

        `bytes_per_s` is what its source was seen to bring; 0 when it brought nothing yet: it gets one piece.
        """
        assert not lane.asked, "a lane takes one run at a time"
        useful = self._window() & lane.have
        run: Run | None
        if free := useful & ~self.asked():
            first = self._choose(free)
            run = Run(range(first, first + min(lane.length_max, self._length(free, first, bytes_per_s))))
            lane.length_max = 2 * len(run.pieces)
        else:
            run = self._take_over(lane, useful, now)
        if run is not None:
            lane.asked = (1 << run.pieces.stop) - (1 << run.pieces.start)
            lane.heard = now
        return run

    def can_use(self, lane: Lane) -> bool:
        """Whether its source has anything that is missing."""
        return bool(self.missing & lane.have)

    def _window(self) -> int:
        """The missing pieces that may be asked for now."""
        lowest = self.missing & -self.missing
        return self.missing & ((lowest << WINDOW_PIECES) - lowest)

    def asked(self) -> int:
        """The pieces that lanes were asked for."""
        found = 0
        for lane in self.lanes:
            found |= lane.asked
        return found

    def _choose(self, free: int) -> int:
        """The first piece of a run: a rarest one."""
        rarest = self._rarest(free)
        if not self._in_swarm():
            return _lowest(rarest)
        first = _lowest(free)
        beyond = first + self.rng.randrange(free.bit_length() - first)
        return _lowest(rarest >> beyond << beyond or rarest)

    def _rarest(self, pieces: int) -> int:
        """Those of `pieces` of which the fewest copies are known: what lanes have, will have soon, and gave away."""
        at_least = [pieces] + [0] * COUNTED_COPIES_MAX
        for copies in (copies for lane in self.lanes for copies in (lane.have | lane.coming, lane.given)):
            for count in range(COUNTED_COPIES_MAX, 0, -1):
                at_least[count] |= at_least[count - 1] & copies
        for count in range(COUNTED_COPIES_MAX):
            if exactly := at_least[count] & ~at_least[count + 1]:
                return exactly
        return pieces

    def _in_swarm(self) -> bool:
        return self.is_shared or any(lane.have != self.everything for lane in self.lanes)

    def _length(self, free: int, first: int, bytes_per_s: float) -> int:
        """How many pieces from `first` on: a while's worth, without a gap, and less towards the end."""
        gap = ~(free >> first)
        neighbours = _lowest(gap)
        share = self.missing.bit_count() // (2 * len(self.lanes))
        seconds = RUN_IN_SWARM_S if self._in_swarm() else RUN_S
        return max(1, min(neighbours, share, RUN_PIECES_MAX, int(bytes_per_s * seconds / PIECE_SIZE)))

    def _take_over(self, lane: Lane, useful: int, now: float) -> Run | None:
        """One piece of the lane that has been silent the longest, if that is long for it; or, when every missing piece
        was asked of somebody, if this lane will have brought it long before."""
        is_end = not self._window() & ~self.asked()
        for silent in sorted(self.lanes, key=lambda other: other.heard):
            waited_s = now - silent.heard
            left_s = silent.piece_s - waited_s
            is_sooner = is_end and waited_s >= SOONER_S and 0 < SOONER_TIMES * lane.piece_s < left_s
            if waited_s < max(SILENT_S, SILENT_PIECES * silent.piece_s) and not is_sooner:
                continue
            pieces = useful & silent.asked
            while pieces:
                index = _lowest(pieces)
                if sum(other.asked >> index & 1 for other in self.lanes) < LANES_PER_PIECE_MAX:
                    return Run(range(index, index + 1), silent)
                pieces &= pieces - 1
        return None


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
