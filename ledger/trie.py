"""Merkle Patricia tries (Yellow Paper, appendix D) none of whose keys begins with another: read by a key, changed by
many at once.

A change makes each node on the way anew once, however many keys lie below it, and hashes it once, at the end. Decoded
nodes are remembered and never changed. Knows no accounts and no storage (see ledger.state), nor what is in a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

import rlp
from eth.constants import BLANK_ROOT_HASH
from eth_hash.auto import keccak
from eth_typing import Hash32
from rlp.codec import encode_raw
from trie.exceptions import MissingTrieNode
from trie.utils.nibbles import decode_nibbles, is_nibbles_terminated, remove_nibbles_terminator

ReadNode = Callable[[bytes], bytes | None]

DECODED_MAX: Final = 8_192
"""Nodes remembered decoded: about 8 MB."""

HASH_SIZE: Final = 32
BRANCH_SIZE: Final = 17

Nibbles = tuple[int, ...]

Node = Sequence[Any]
"""A branch (17 parts), or a path and what is at its end; b"" for none. A child is a node, or the hash of one."""

Item = tuple[Nibbles, bytes]
"""A key and its value; b"" takes it out."""


@lru_cache(DECODED_MAX)
def _decoded(encoded: bytes) -> Node:
    return tuple(rlp.decode(encoded))


@lru_cache(DECODED_MAX)
def _path(encoded: bytes) -> tuple[Nibbles, bool]:
    """The nibbles of a leaf's or an extension's path, and whether it is a leaf's (hex-prefix, Yellow Paper C)."""
    nibbles = decode_nibbles(encoded)
    return tuple(remove_nibbles_terminator(nibbles)), is_nibbles_terminated(nibbles)


def missing(name: bytes, root: bytes) -> MissingTrieNode:
    """What to raise where nothing of this hash is to be found below a root."""
    return MissingTrieNode(Hash32(name), Hash32(root), b"")


def nibbles_of(key: bytes) -> Nibbles:
    return tuple(nibble for byte in key for nibble in (byte >> 4, byte & 15))


class Trie:
    """The trie below a root, as it was. Raises MissingTrieNode where one of its nodes is not there."""

    def __init__(self, read: ReadNode, root: bytes) -> None:
        self._read = read
        self._root = root

    def get(self, key: bytes) -> bytes:
        """The value, b"" for none."""
        nibbles, at = nibbles_of(key), 0
        node = self._top()
        while node:
            if len(node) == BRANCH_SIZE:
                child, at = node[nibbles[at]], at + 1
            else:
                path, is_leaf = _path(node[0])
                if path != nibbles[at : at + len(path)]:
                    return b""
                if is_leaf:
                    value: bytes = node[1]
                    return value
                child, at = node[1], at + len(path)
            node = self._node(child)
        return b""

    def changed(self, changes: Mapping[bytes, bytes]) -> tuple[bytes, dict[bytes, bytes]]:
        """The root with these values, and the nodes that makes, by their hashes. A value of b"" takes its key out."""
        if not changes:
            return self._root, {}
        items = sorted((nibbles_of(key), value) for key, value in changes.items())
        return _rooted(self._put(self._top(), items, 0))

    def _top(self) -> Node:
        return b"" if self._root == BLANK_ROOT_HASH else self._node(self._root)

    def _node(self, child: Node) -> Node:
        """The node that a part stands for."""
        if not isinstance(child, bytes) or not child:
            return child
        encoded = self._read(child)
        if encoded is None:
            raise missing(child, self._root)
        return _decoded(encoded)

    def _put(self, node: Node, items: Sequence[Item], at: int) -> Node:
        """The node with these items, which are in order and whose keys are the same up to `at`."""
        if not node:
            return _built([item for item in items if item[1]], at)
        if len(node) == BRANCH_SIZE:
            children = list(node)
            for nibble, below in groupby(items, key=lambda item: item[0][at]):
                children[nibble] = self._put(self._node(children[nibble]), list(below), at + 1)
            return self._collapsed(children)
        path, is_leaf = _path(node[0])
        if is_leaf:
            leaf = {items[0][0][:at] + path: node[1]}
            return _built([item for item in sorted((leaf | dict(items)).items()) if item[1]], at)
        same = min(_shared(path, items[0][0][at:]), _shared(path, items[-1][0][at:]))
        if same == len(path):
            return self._under(path, self._put(self._node(node[1]), items, at + same))
        branch: list[Any] = [b""] * BRANCH_SIZE
        rest = path[same + 1 :]
        branch[path[same]] = [hex_prefix(rest, is_leaf=False), node[1]] if rest else node[1]
        return self._under(path[:same], self._put(branch, items, at + same))

    def _collapsed(self, children: list[Any]) -> Node:
        """A branch, unless it has fewer than two children."""
        there = [nibble for nibble, child in enumerate(children) if child]
        if len(there) > 1:
            return children
        return self._under((there[0],), self._node(children[there[0]])) if there else b""

    @staticmethod
    def _under(path: Nibbles, node: Node) -> Node:
        """A node with a path to it."""
        if not path or not node:
            return node
        if len(node) == BRANCH_SIZE:
            return [hex_prefix(path, is_leaf=False), node]
        rest, is_leaf = _path(node[0])
        return [hex_prefix(path + rest, is_leaf), node[1]]


def _built(items: Sequence[Item], at: int) -> Node:
    """The node over nothing but these items."""
    if len(items) < 2:
        return [hex_prefix(items[0][0][at:], is_leaf=True), items[0][1]] if items else b""
    fork = at + _shared(items[0][0][at:], items[-1][0][at:])
    branch: list[Any] = [b""] * BRANCH_SIZE
    for nibble, below in groupby(items, key=lambda item: item[0][fork]):
        branch[nibble] = _built(list(below), fork + 1)
    return [hex_prefix(items[0][0][at:fork], is_leaf=False), branch] if fork > at else branch


def list_root(items: Sequence[bytes]) -> bytes:
    """The root of a list, which is what a header says of its transactions and of its receipts (Yellow Paper, 4.3.2): of
    the trie from the RLP of each index to the item."""
    leaves = sorted((nibbles_of(rlp.encode(index)), item) for index, item in enumerate(items))
    return _rooted(_built(leaves, 0))[0]


def _rooted(top: Node) -> tuple[bytes, dict[bytes, bytes]]:
    """The root of the trie with this node on top, and the nodes that were made, by their hashes."""
    if not top:
        return bytes(BLANK_ROOT_HASH), {}
    made: dict[bytes, bytes] = {}
    reference = _reference(top, made)
    if not isinstance(reference, bytes):  # a root is named by its hash, however short it is
        encoded = encode_raw(reference)
        reference = bytes(keccak(encoded))
        made[reference] = encoded
    return reference, made


def hex_prefix(path: Nibbles, is_leaf: bool) -> bytes:
    """A path in whole bytes, its first nibble telling a leaf's and an odd one's (Yellow Paper C)."""
    odd = len(path) % 2
    nibbles = (2 * is_leaf + odd, *(() if odd else (0,)), *path)
    return bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))


def _shared(first: Nibbles, second: Nibbles) -> int:
    """How many nibbles both begin with."""
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


def _reference(node: Node, made: dict[bytes, bytes]) -> Node:
    """What stands for a node in the one above: itself when that is short, else its hash."""
    parts = [part if isinstance(part, bytes) else _reference(part, made) for part in node]
    encoded = encode_raw(parts)
    if len(encoded) < HASH_SIZE:
        return parts
    name = bytes(keccak(encoded))
    made[name] = encoded
    return name
