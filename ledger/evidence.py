"""Evidence on its way: every connected node learns which authorities lied, whichever node found it.

Followers take part as authorities do. Who the authorities of an epoch were stands in the chain, so each node checks a
proof before it keeps it and passes it on. A task of its own, so that agreement waits for none of it. Knows no sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import trio

from contracts.errors import BadInput, BadPeer
from ledger.exchange import encode
from ledger.ledger import Ledger
from ledger.peers import Peer
from ledger.votes import Evidence, liar

log = logging.getLogger(__name__)


class EvidenceSharing:
    """Start `run`; `stir` when a peer came or sent something, and when the head moved."""

    def __init__(self, ledger: Ledger, peers: Mapping[str, Peer], blame: Callable[[str, str], None]) -> None:
        """`peers` are those that are connected, by name; `blame` is told of one that sent what proves nothing."""
        self._ledger = ledger
        self._peers = peers
        self._blame = blame
        self._stirred = trio.Event()

    def stir(self) -> None:
        """Have everything looked at again."""
        self._stirred.set()

    async def run(self) -> None:
        """Read and tell for as long as it runs. Raises what the disk refused."""
        while True:
            self._stirred = trio.Event()
            for name, peer in list(self._peers.items()):
                await self._read(name, peer)
            self._tell()
            await self._stirred.wait()

    async def keep(self, evidence: Evidence) -> None:
        """Keep the first proof that an authority lied, and pass it on. Raises as `liar` does."""
        culprit = liar(evidence)
        if culprit not in self._ledger.evidence:
            log.error("authority 0x%s contradicts itself: evidence 0x%s", culprit.hex(), evidence.hash.hex())
            await self._ledger.keep_evidence(culprit, evidence)
            self.stir()

    async def _read(self, name: str, peer: Peer) -> None:
        """Look at what a peer sent. What is of an epoch that our chain has not reached stays."""
        sent, peer.evidence = peer.evidence, []
        for evidence in sent:
            try:
                if self._is_proved(evidence):
                    await self.keep(evidence)
                    peer.liars.add(liar(evidence))
                else:
                    peer.evidence.append(evidence)
            except (BadInput, BadPeer) as error:
                self._blame(name, str(error))

    def _is_proved(self, evidence: Evidence) -> bool:
        """Whether it shows an authority to have lied; False while our chain has not reached its epoch. Raises BadInput
        or BadPeer when it shows nothing."""
        culprit = liar(evidence)
        if culprit in self._ledger.evidence:
            return True
        authorities = self._ledger.history.authorities_of(evidence.epoch)
        if authorities is not None and culprit not in authorities:
            raise BadPeer(f"evidence against 0x{culprit.hex()}, no authority of the epoch 0x{evidence.epoch.hex()}")
        return authorities is not None

    def _tell(self) -> None:
        """Send each peer what it was not told and did not tell; what its outbox has no room for, at the next look."""
        epoch = self._ledger.tip.epoch
        for peer in self._peers.values():
            for culprit in self._ledger.evidence.keys() - peer.liars:
                if peer.outbox.put(encode(epoch, self._ledger.evidence[culprit])):
                    peer.liars.add(culprit)
