"""A walk over a state's tries that asks for the nodes it does not find and ends when all of them are there.

A node is named by its Keccak-256, and the first name is the state root in a header, so nodes may come from anywhere
(Yellow Paper, appendix D). What is found is walked over rather than taken to be whole below: a walk that was broken off
has left nodes whose children are missing. Knows no chain; reads through one function, writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from typing import Any

import rlp
from eth.constants import BLANK_ROOT_HASH
from eth.rlp.accounts import Account
from trie.utils.nibbles import decode_nibbles, is_nibbles_terminated

from contracts.errors import BadPeer
from ledger.trie import BRANCH_SIZE, HASH_SIZE, ReadNode


class Kind(Enum):
    """What a hash in a state names."""

    ACCOUNTS = auto()
    """A node of the trie of accounts."""
    STORAGE = auto()
    """A node of the trie of one account's storage."""


class StateWalk:
    """`wanted` and `give` in turn until `is_done`. One call at a time."""

    def __init__(self, read: ReadNode, root: bytes) -> None:
        self._read = read
        self._left: list[tuple[bytes, Kind]] = [(root, Kind.ACCOUNTS)]
        """Depth first, so that there are never more than some times the depth."""
        self._asked: dict[bytes, Kind] = {}
        self.nodes_seen = 0

    @property
    def is_done(self) -> bool:
        return not self._left and not self._asked

    def wanted(self, count_max: int) -> list[bytes]:
        """Hashes of nodes that are missing and nobody was asked for. Empty: all others are on their way, or it is done.

        Raises BadPeer when there is a node that is none: two thirds of the authorities signed for it.
        """
        found: list[bytes] = []
        while self._left and len(found) < count_max:
            key, kind = self._left.pop()
            if key in self._asked:
                continue
            if (node := self._read(key)) is not None:
                self._expand(node, kind)
            else:
                self._asked[key] = kind
                found.append(key)
        return found

    def give(self, nodes: Mapping[bytes, bytes]) -> None:
        """Nodes asked for that are there from now on."""
        for key, node in nodes.items():
            # Two may have been asked for one node, after the first one seemed not to answer.
            if (kind := self._asked.pop(key, None)) is not None:
                self._expand(node, kind)

    def put_back(self, asked: Iterable[bytes]) -> None:
        """Hashes to ask somebody else for, as far as they are still missing."""
        for key in asked:
            if (kind := self._asked.pop(key, None)) is not None:
                self._left.append((key, kind))

    def _expand(self, node: bytes, kind: Kind) -> None:
        self.nodes_seen += 1
        try:
            self._left.extend(_below(rlp.decode(node), kind))
        except (rlp.exceptions.RLPException, ValueError, TypeError, IndexError, RecursionError) as error:
            raise BadPeer(f"below the state root there is a node that is none: {error}") from error


def _below(node: list[Any], kind: Kind) -> Iterator[tuple[bytes, Kind]]:
    """The nodes that a node names. Code is not asked for: all of it stands in genesis, and no transaction makes any."""
    if len(node) == BRANCH_SIZE:
        for child in node[:-1]:
            yield from _named(child, kind)
    elif not is_nibbles_terminated(decode_nibbles(node[0])):
        yield from _named(node[1], kind)
    elif kind is Kind.ACCOUNTS:
        account = rlp.decode(node[1], Account)
        if account.storage_root != BLANK_ROOT_HASH:
            yield account.storage_root, Kind.STORAGE


def _named(child: bytes | list[Any], kind: Kind) -> Iterator[tuple[bytes, Kind]]:
    """A child that is named by its hash; a short one stands in its parent."""
    if isinstance(child, list):
        yield from _below(child, kind)
    elif child:
        if len(child) != HASH_SIZE:
            raise ValueError(f"a child of {len(child)} bytes")
        yield child, kind
