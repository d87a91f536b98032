"""The blocks over the newest final one: proposed, checked and executed, and in memory only.

Keeps a proposal of the right leader until its parent is known, executes it once it is of use, and hands it to the
votes. Knows who sent what only to blame them; knows no time and sends nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from contracts.errors import BadPeer, Busy
from ledger import seal
from ledger.chain import Tip
from ledger.exchange import Proposed, decode_proposed
from ledger.execution import Executed
from ledger.ledger import Ledger
from ledger.simplex import LOOKAHEAD, Proposal, Simplex
from ledger.votes import Evidence

log = logging.getLogger(__name__)

REFUSED_MAX = 2
"""Bad proposals of one iteration that are executed; an honest leader makes none."""


@dataclass(frozen=True)
class _Unchecked:
    """A proposal of the right leader that was not executed yet."""

    sender: str
    header: Any
    message: Proposed

    @property
    def hash(self) -> bytes:
        return bytes(self.header.hash)


class Undecided:
    """The undecided blocks of one epoch."""

    def __init__(self, ledger: Ledger, simplex: Simplex, blame: Callable[[str, str], None]) -> None:
        self._ledger = ledger
        self._simplex = simplex
        self._blame = blame
        self._tips: dict[bytes, Tip] = {}
        """The executed blocks by hash: those that the votes know."""
        self._unchecked: dict[int, dict[bytes, _Unchecked]] = {}
        self._refused: dict[int, set[bytes]] = {}
        self._publish()
        # After a restart: the blocks we voted for, which nobody else may have kept.
        for iteration, ballot in simplex.ballots.items():
            if ballot.proposal:
                message = decode_proposed(ballot.proposal)
                header = seal.decode_header(message.header_rlp)
                self._unchecked.setdefault(iteration, {})[ballot.notarised] = _Unchecked("", header, message)

    def __len__(self) -> int:
        return len(self._tips)

    def tip_of(self, block_hash: bytes) -> Tip | None:
        """An undecided block, or the newest final one, to build on."""
        return self._ledger.tip if block_hash == self._simplex.root.hash else self._tips.get(block_hash)

    def newest_unchecked(self) -> int:
        """The highest iteration with a proposal that waits to be executed; 0 without one."""
        return max(self._unchecked, default=0)

    def _publish(self) -> None:
        """Let an import know what it need not execute again."""
        self._ledger.set_undecided(self._tips.values())

    def advance(self) -> None:
        """The votes have a new root: forget what they forgot."""
        root = self._simplex.root
        tips = {}
        for proposal in self._simplex.proposals():
            tips[proposal.hash] = self._tips[proposal.hash].over(root.hash)
        self._tips = tips
        self._unchecked = {n: found for n, found in self._unchecked.items() if n > root.iteration}
        self._refused = {n: found for n, found in self._refused.items() if n > root.iteration}
        self._publish()

    def read(self, sender: str, message: Proposed) -> Evidence | None:
        """Keep a proposal of the right leader; what it proves when there is another of its iteration. Raises BadPeer or
        BadInput when it is no leader's."""
        header = seal.decode_header(message.header_rlp)
        root, iteration, block_hash = self._simplex.root, seal.iteration_of(header), bytes(header.hash)
        if not root.iteration < iteration <= self._simplex.iteration + LOOKAHEAD:
            return None
        refused = self._refused.get(iteration, set())
        if block_hash in self._tips or block_hash in refused or block_hash in self._unchecked.get(iteration, {}):
            return None
        is_decided = self._simplex.is_decided(iteration, block_hash)
        if len(refused) >= REFUSED_MAX and not is_decided:
            return None
        seal.check_proposer(header, root.epoch, root.authorities)
        first = self._first_header(iteration)
        if first is None or is_decided:
            self._unchecked.setdefault(iteration, {})[block_hash] = _Unchecked(sender, header, message)
        return None if first is None else Evidence(root.epoch, first, message.header_rlp)

    def _first_header(self, iteration: int) -> bytes | None:
        """Of another proposal of this iteration, RLP."""
        for proposal in self._simplex.round(iteration).proposals.values():
            return decode_proposed(proposal.encoded).header_rlp
        for unchecked in self._unchecked.get(iteration, {}).values():
            return unchecked.message.header_rlp
        return None

    async def execute_next(self) -> bool:
        """Execute a proposal that is of use and whose parent is known; whether there was one. The head may have moved
        on afterwards."""
        for iteration in sorted(self._unchecked):
            for unchecked in self._unchecked[iteration].values():
                parent = self.tip_of(bytes(unchecked.header.parent_hash))
                if parent is not None and self._simplex.wants(iteration, unchecked.hash):
                    executed = await self._execute(iteration, unchecked, parent)
                    if executed is not None:
                        self.take_in(executed, unchecked.message)
                    return True
        return False

    async def _execute(self, iteration: int, unchecked: _Unchecked, parent: Tip) -> Executed | None:
        root = self._simplex.root
        del self._unchecked[iteration][unchecked.hash]
        if not self._unchecked[iteration]:
            del self._unchecked[iteration]
        try:
            if unchecked.message.transactions and parent.epoch != root.epoch:
                raise BadPeer(f"iteration {iteration}: a block on one that changes the authorities has to be empty")
            return await self._ledger.execute(unchecked.header, unchecked.message.transactions, parent)
        except Busy as error:  # its sender has it, and sends it again
            log.warning("a proposal of iteration %d is not looked at: %s", iteration, error)
        except BadPeer as error:
            # When the head moved on meanwhile, it was judged by what holds after it, and is not wanted any more.
            if self._ledger.tip.hash == root.hash:
                self._refused.setdefault(iteration, set()).add(unchecked.hash)
                log.warning("iteration %d: refused 0x%s: %s", iteration, unchecked.hash.hex(), error)
                if unchecked.sender:
                    self._blame(unchecked.sender, str(error))
        return None

    def take_in(self, executed: Executed, message: Proposed) -> bool:
        """Hand an executed block to the votes; whether they still want it."""
        header = executed.header
        encoded = msgspec.msgpack.encode(message)
        proposal = Proposal(bytes(header.hash), bytes(header.parent_hash), seal.iteration_of(header), encoded)
        parent = self.tip_of(proposal.parent_hash)
        if parent is None or parent.hash != proposal.parent_hash:
            return False
        if not self._simplex.wants(proposal.iteration, proposal.hash):
            return False
        self._simplex.add_proposal(proposal)
        self._tips[proposal.hash] = parent.after(executed)
        self._publish()
        return True

    def path(self, final: Proposal) -> list[Tip]:
        """The blocks after the root up to this one, oldest first."""
        return [self._tips[proposal.hash] for proposal in self._simplex.path(final)]
