"""Making the proofs that ledger.proof checks, out of the ledger's own store.

Owns the search for the event, and the way from genesis through the changes of the authorities. Reads what is final and
writes nothing; knows no models, only the events it is asked about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from eth.db.trie import make_trie_root_and_nodes

from contracts.errors import Conflict, NoSpace, NotFound
from contracts.events import ContractEvent
from contracts.types import Address
from ledger import proof as proofs
from ledger import witness
from ledger.block import SealedBlock
from ledger.proof import CHANGES_MAX, DESCENDANTS_MAX, Change, FinalBlock, Proof, Standing, Way, shown
from ledger.record import BlockRecord
from ledger.seal import quorum

Shows = Callable[[ContractEvent], bool]
"""Whether an event is the one asked about."""


class Reader(Protocol):
    """The part of ledger.store that proofs are made of."""

    def sealed(self, number: int) -> SealedBlock: ...
    def record(self, number: int) -> BlockRecord: ...
    def receipts(self, number: int) -> list[bytes]: ...
    def number_of(self, block_hash: bytes) -> int | None: ...
    def state_node(self, key: bytes) -> bytes | None: ...


def prove(store: Reader, head: int, shows: Shows) -> Proof:
    """The proof of the newest event up to block `head` that `shows` picks, with the state of `head` if it still stands.

    Raises NotFound when there is none, Conflict when the genesis file has it, NoSpace when it would be over the limits.
    """
    number, index = _newest(store, head, shows)
    guide = _Guide(store)
    way = guide.lead(number)
    sealed, receipts = store.sealed(number), store.receipts(number)
    event = proofs.provable_event(receipts[index])
    return Proof(
        format="aigen-proof-1",
        genesis_hash=shown(store.record(0).hash),
        way=way,
        transaction_index=index,
        transaction=_item(sealed.transactions, index),
        receipt=_item(receipts, index),
        standing=_standing(store, guide, head, event),
    )


def _newest(store: Reader, head: int, shows: Shows) -> tuple[int, int]:
    """Block number and index of the transaction: from the head back, because what is asked about is mostly new."""
    for number in range(head, 0, -1):
        found = [i for i, t in enumerate(store.record(number).transactions) if any(map(shows, t.events))]
        if found:
            return number, found[-1]
    if any(map(shows, store.record(0).events())):
        raise Conflict("that is in the genesis file: whoever has the file sees it there, no proof is needed")
    raise NotFound(f"no event up to block {head} says that, so there is nothing to prove")


@dataclass(frozen=True)
class _Encoded:
    """What py-evm's tries are made of."""

    data: bytes

    def encode(self) -> bytes:
        return self.data


def _item(items: tuple[bytes, ...] | list[bytes], index: int) -> tuple[str, ...]:
    root, nodes = make_trie_root_and_nodes(tuple(map(_Encoded, items)))
    _, needed = witness.gathered(nodes.get, lambda found: witness.item(found, root, index))
    return _shown_all(needed)


def _shown_all(values: tuple[bytes, ...]) -> tuple[str, ...]:
    return tuple(map(shown, values))


def _standing(store: Reader, guide: _Guide, head: int, event: ContractEvent) -> Standing | None:
    root = bytes(store.sealed(head).header().state_root)
    holds, nodes = witness.gathered(store.state_node, lambda found: proofs.stands(found, root, event))
    return Standing(guide.lead(head), _shown_all(nodes)) if holds else None


class _Guide:
    """Leads from genesis to final blocks, each at or after the one before, through every epoch on the way."""

    def __init__(self, store: Reader) -> None:
        self._store = store
        self._epoch = store.record(0).hash
        """The one the checker has come to, and how many authorities it has."""
        self._authority_count = len(self._authorities(0)[0])

    def _authorities(self, number: int) -> tuple[frozenset[Address], tuple[bytes, ...]]:
        """The authorities after a block, and the nodes of its state that say so."""
        root = bytes(self._store.sealed(number).header().state_root)
        return witness.gathered(self._store.state_node, lambda found: witness.authorities(found, root))

    def lead(self, number: int) -> Way:
        changes = tuple(self._change(change) for change in self._changes_before(number))
        return Way(changes, self._final(number))

    def _changes_before(self, number: int) -> list[int]:
        """The blocks that began the epochs after the checker's, up to a block's own, oldest first."""
        found: list[int] = []
        while (epoch := self._store.sealed(number).certificate.epoch) != self._epoch:
            begun = self._store.number_of(epoch)
            assert begun is not None, "every epoch began with a final block"
            if len(found) == CHANGES_MAX:
                raise NoSpace(
                    f"the proof needs more than {CHANGES_MAX} changes of the authorities, the most it can have"
                )
            found.insert(0, begun)
            number = begun
        return found

    def _change(self, number: int) -> Change:
        block = self._final(number)
        authorities, nodes = self._authorities(number)
        self._epoch, self._authority_count = self._store.record(number).hash, len(authorities)
        return Change(block, _shown_all(nodes))

    def _final(self, number: int) -> FinalBlock:
        sealed = self._store.sealed(number)
        certificate = sealed.certificate
        if len(certificate.descendants) > DESCENDANTS_MAX:
            raise NoSpace(
                f"block {number}: the votes that made it final are {len(certificate.descendants)} blocks after it, "
                f"a proof can have {DESCENDANTS_MAX}"
            )
        return FinalBlock(
            header=shown(sealed.header_rlp),
            descendants=_shown_all(certificate.descendants),
            votes=_shown_all(certificate.votes[: quorum(self._authority_count)]),
        )
