"""What IPFS calls a shard: the root CID of its tree under the profile `unixfs-v1-2025`, from its piece hashes alone.

Owns the profile: CIDv1, raw leaves, SHA-256, 1 MiB chunks, at most 1,024 links a node, balanced. A piece is a leaf, so
what is hashed here are the few nodes above the pieces. Pure: knows no disk and no network.

Sources: the profile, IPIP-499 (https://specs.ipfs.tech/ipips/ipip-0499/); a file's node,
https://specs.ipfs.tech/unixfs/; a node's bytes, https://ipld.io/specs/codecs/dag-pb/spec/; CIDs,
https://github.com/multiformats/cid.
"""

from base64 import b32encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from contracts.types import PIECE_SIZE
from node.storage.manifest import ManifestShard

LINKS_MAX: Final = 1024
"""Of one node of the tree."""

_RAW: Final = bytes.fromhex("01551220")
"""CIDv1 of raw bytes by a SHA-256 of 32 bytes."""
_DAG_PB: Final = bytes.fromhex("01701220")
"""CIDv1 of a dag-pb node by a SHA-256 of 32 bytes."""


@dataclass(frozen=True, slots=True)
class Node:
    """A block of the tree and what lies below it, sizes in bytes."""

    cid: bytes
    content_size: int
    """Of the shard's bytes below it."""
    tree_size: int
    """Of its own block and all below it."""
    block: bytes = b""
    """Its bytes; empty for a leaf, whose bytes are the piece."""


def raw_cid(block_hash: bytes) -> bytes:
    """The CID of a block of plain bytes, such as a piece, by its SHA-256."""
    return _RAW + block_hash


def cid_text(cid: bytes) -> str:
    """A CID in base32, as it is written in paths."""
    return "b" + b32encode(cid).decode().rstrip("=").lower()


def root_cid(shard: ManifestShard) -> str:
    """What IPFS calls a shard. A shard of one piece is its own root, a raw block."""
    return cid_text(shard_tree(shard)[-1].cid)


def shard_tree(shard: ManifestShard) -> tuple[Node, ...]:
    """The nodes above a shard's pieces; see `tree`."""
    leaves = []
    for index in range(shard.piece_count):
        size = min(PIECE_SIZE, shard.size - index * PIECE_SIZE)
        leaves.append(Node(raw_cid(shard.piece_hash(index)), size, size))
    return tree(leaves)


def tree(leaves: Sequence[Node], links_max: int = LINKS_MAX) -> tuple[Node, ...]:
    """The nodes above some leaves, the lowest level first, the root last. A single leaf is its own root.

    Balanced: each level takes the one below in runs of `links_max`, and all leaves are at one depth.
    """
    assert leaves
    assert links_max > 1
    found: list[Node] = []
    level = list(leaves)
    while len(level) > 1:
        level = [_parent(level[first : first + links_max]) for first in range(0, len(level), links_max)]
        found += level
    return tuple(found) if found else (level[0],)


def _parent(children: Sequence[Node]) -> Node:
    """The dag-pb node of a file, its links before its data, as the one canonical encoding has them."""
    links = b"".join(
        _field(2, _field(1, child.cid) + _field(2, b"") + _number(3, child.tree_size)) for child in children
    )
    size = sum(child.content_size for child in children)
    sizes = b"".join(_number(4, child.content_size) for child in children)
    file = _number(1, 2) + _number(3, size) + sizes  # type 2: a file
    block = links + _field(1, file)
    cid = _DAG_PB + sha256(block).digest()
    return Node(cid, size, len(block) + sum(child.tree_size for child in children), block)


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
