"""What all flights of a process share: who this node is, what it remembers of sources, its limits, and how others are
found and reached. Decides nothing.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from contracts.types import NodeId
from node.network.fetching.connections import Connection, connect
from node.network.fetching.records import Records
from node.network.identity import NodeIdentity
from node.network.pace import Pace
from node.network.sources import PeerSource, Source
from node.network.wire import DataLimits
from node.storage.manifest import ManifestShard

Connect = Callable[[Source, ManifestShard, NodeIdentity, DataLimits], AbstractAsyncContextManager[Connection]]


@dataclass
class Means:
    identity: NodeIdentity
    limits: DataLimits
    records: Records
    pace: Pace
    rng: random.Random
    locate: Callable[[NodeId], Sequence[PeerSource]]
    """Where a node is that another one named."""
    lanes_max: int
    connect: Connect = connect
    """How a source is reached; a simulation has its own way."""
    anybody: Callable[[], Sequence[PeerSource]] = lambda: ()
    """Some nodes picked at random, to be asked when nobody who is known gives anything now."""
