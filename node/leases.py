"""Which members are there, by the leases that they renew on the ledger.

The clock is the ledger's: the time of the newest block. So a network that was switched off whole finds nobody gone when
it starts again; and for the moment when the first renewals come, whose block is a day after all others, a member that
is late is given a while longer. Pure but for what it remembers; the caller brings the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from contracts.types import NodeId
from node.state import State

GRACE: Final = 1 / 8
"""Of a lease: how long a member that is late still counts as there."""


@dataclass
class Leases:
    lease_s: int
    _late_since: dict[NodeId, float] = field(default_factory=dict)
    """By this process's clock, of those whose lease is over on the ledger."""

    @property
    def grace_s(self) -> float:
        return self.lease_s * GRACE

    def live(self, state: State, moment: float) -> frozenset[NodeId]:
        """The members that count as there; `moment` is this process's clock, which never goes back."""
        members = state.members.members
        late = {n for n, member in members.items() if not member.is_live(state.time, self.lease_s)}
        self._late_since = {node_id: self._late_since.get(node_id, moment) for node_id in late}
        gone = {node_id for node_id, since in self._late_since.items() if moment >= since + self.grace_s}
        return frozenset(members) - gone

    def next_change(self, moment: float) -> float:
        """When the next one counts as gone, without another block; infinity: nobody."""
        ends = (since + self.grace_s for since in self._late_since.values())
        return min((end for end in ends if end > moment), default=math.inf)

    def renewal_due(self, seen_at: int, now: float) -> float:
        """Seconds until a lease that was renewed at `seen_at` should be renewed again; 0: it is time.

        Everybody renews at the same two moments of a lease, so that one block takes many renewals.
        """
        half = self.lease_s / 2
        return max(0.0, (seen_at // half + 1) * half - now)
