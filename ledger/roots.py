"""The root of a list: what a header says of its transactions and of its receipts. Knows nothing of what is in them.

The list is a Merkle Patricia trie from the RLP of each index to the item (Yellow Paper 4.3.2 and D). Here it is built
once from below; py-evm puts the items in one after another, which makes each node on the way as often as it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import rlp
from eth.constants import BLANK_ROOT_HASH
from eth_hash.auto import keccak
from rlp.codec import encode_raw

HASH_SIZE = 32

Nibbles = tuple[int, ...]
Node = list["bytes | Node"]


def list_root(items: Sequence[bytes]) -> bytes:
    """The root hash of the encoded items, in their order."""
    if not items:
        return bytes(BLANK_ROOT_HASH)
    leaves = sorted((_nibbles(rlp.encode(index)), item) for index, item in enumerate(items))
    return bytes(keccak(encode_raw(_node(leaves, 0))))


def _nibbles(key: bytes) -> Nibbles:
    return tuple(nibble for byte in key for nibble in (byte >> 4, byte & 15))


def _node(leaves: Sequence[tuple[Nibbles, bytes]], at: int) -> Node:
    """The node over these leaves, in order, whose paths are the same up to `at`. No path begins with another one: RLP
    tells where it ends, so no branch has a value of its own."""
    first, last = leaves[0][0], leaves[-1][0]
    if len(leaves) == 1:
        return [hex_prefix(first[at:], is_leaf=True), leaves[0][1]]
    fork = at
    while first[fork] == last[fork]:
        fork += 1
    branch: Node = [b""] * 17
    for nibble, below in groupby(leaves, key=lambda leaf: leaf[0][fork]):
        branch[nibble] = _reference(_node(list(below), fork + 1))
    return branch if fork == at else [hex_prefix(first[at:fork], is_leaf=False), _reference(branch)]


def _reference(node: Node) -> bytes | Node:
    """What stands for a node in the one above: itself when that is short, else its hash."""
    encoded = encode_raw(node)
    return node if len(encoded) < HASH_SIZE else bytes(keccak(encoded))


def hex_prefix(path: Nibbles, is_leaf: bool) -> bytes:
    """A path in whole bytes, its first nibble telling a leaf's and an odd one's (Yellow Paper C)."""
    odd = len(path) % 2
    nibbles = (2 * is_leaf + odd, *(() if odd else (0,)), *path)
    return bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
