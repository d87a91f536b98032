"""Whether nodes hold the same state: its hash at a block, and what a difference between two nodes means.

All nodes fold the same final blocks, so the state after one block is the same on all of them. Where it is not, a disk
or a memory has erred, or two versions fold differently: nothing that either node says from there on can be relied on.
Owns the hash and the judgement. Knows no sockets and no chain; `node.replay` says which blocks are compared.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

import msgspec

from contracts.types import NodeId
from ledger.accounts import Accounts
from node import state as states
from node.state import Part, State

STATE_HASH_FORMAT = "aigen state hash 1"
"""Goes into every hash. Nodes compare hashes of one format only: a new number needs a new protocol version."""

ALARMS_MAX = 64
"""Peers that an alarm is kept of: as many as are connected."""

log = logging.getLogger(__name__)

_encoder = msgspec.msgpack.Encoder(order="deterministic")


def _encode_accounts(accounts: Accounts) -> bytes:
    """Their sets and maps in one order, whichever fields the ledger gives them."""
    return _encoder.encode(accounts)


class StateHasher:
    """SHA-256 over the digests of a state's parts; those that did not change since the last time cost nothing.

    One call at a time. For equal states and accounts the hash is the same, whatever their history and the process.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[object, bytes]] = {}

    def hash(self, state: State, accounts: Accounts) -> bytes:
        known: dict[tuple[str, ...], tuple[object, bytes]] = {}
        for part in (Part(("accounts",), accounts, _encode_accounts), *states.parts(state)):
            before = self._known.get(part.name)
            same = before is not None and before[0] is part.value
            known[part.name] = before if before and same else (part.value, hashlib.sha256(part.encode()).digest())
        self._known = known
        digests = [(name, digest) for name, (_, digest) in known.items()]
        return hashlib.sha256(_encoder.encode([STATE_HASH_FORMAT, digests])).digest()


class StateMark(msgspec.Struct, frozen=True):
    """The hash of the state after a final block."""

    number: int
    hash: bytes


class Difference(msgspec.Struct, frozen=True):
    """A block after which a peer's state is not ours. `str()` says so in one line, and what to do."""

    node_id: NodeId
    number: int
    ours: bytes
    theirs: bytes

    def __str__(self) -> str:
        return (
            f"after block {self.number} the state of {self.node_id} has the hash 0x{self.theirs.hex()}, ours is "
            f"0x{self.ours.hex()}: one of the two is wrong; run `aigen ledger verify` on both, and `aigen ledger "
            "resync` on the one that it finds damaged"
        )


class Agreement:
    """What comparing with each peer came to. An alarm stands until that peer agrees at a later block."""

    def __init__(self) -> None:
        self._alarms: dict[NodeId, Difference] = {}

    def compare(self, node_id: NodeId, ours: Iterable[StateMark], theirs: Iterable[StateMark]) -> bool | None:
        """Whether the peer's state is ours where both name a block; None when they name none in common.

        A difference is logged as an error, once for each peer and block.
        """
        our_hashes = {mark.number: mark.hash for mark in ours}
        common = sorted((mark for mark in theirs if mark.number in our_hashes), key=lambda mark: mark.number)
        if not common:
            return None
        standing = self._alarms.get(node_id)
        differing = [mark for mark in common if mark.hash != our_hashes[mark.number]]
        if not differing:
            if standing is not None and common[-1].number > standing.number:
                log.warning("the state of %s is ours again as of block %d", node_id, common[-1].number)
                del self._alarms[node_id]
            return True
        newest = differing[-1]
        if standing is None or newest.number > standing.number:
            self._raise_alarm(Difference(node_id, newest.number, our_hashes[newest.number], newest.hash))
        return False

    def _raise_alarm(self, found: Difference) -> None:
        log.error("%s", found)
        self._alarms.pop(found.node_id, None)
        self._alarms[found.node_id] = found
        if len(self._alarms) > ALARMS_MAX:
            del self._alarms[next(iter(self._alarms))]

    def alarms(self) -> tuple[str, ...]:
        """A line for each peer whose state is not ours, the newest last."""
        return tuple(map(str, self._alarms.values()))
