"""Merkle-Patricia tries read from a handful of their nodes: which nodes a read needs, and what they prove.

A node's name is its Keccak-256, and a trie's root names its first node, so whoever trusts the root trusts whatever is
found on the way down, absence too (Ethereum Yellow Paper, appendix D; EIP-1186 has the same proofs). The same reads
serve both sides: the prover runs them over a whole store and keeps the nodes they touched, the verifier runs them over
those nodes and insists that they touch all of them, in that order. Knows no header and no certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import rlp
from eth.rlp.accounts import Account
from eth_hash.auto import keccak
from rlp.sedes import big_endian_int
from trie.exceptions import InvalidNibbles, InvalidNode, MissingTrieNode
from trie.exceptions import ValidationError as TrieValidationError
from trie.hexary import HexaryTrie

from contracts import layout
from contracts.addresses import ADDRESSES, ContractName
from contracts.errors import BadInput
from contracts.types import Address

ReadNode = Callable[[bytes], bytes | None]
"""A trie node by its hash."""

T = TypeVar("T")

_MALFORMED = (
    rlp.exceptions.RLPException,
    InvalidNode,
    InvalidNibbles,
    TrieValidationError,
    ValueError,
    TypeError,
    IndexError,
    RecursionError,
)
"""What rlp and the trie library raise for nodes that are none: an authority that lies may have put a root over them."""


class Witness:
    """Nodes by hash out of a source, and which of them were read, in the order of their first use."""

    def __init__(self, read: ReadNode) -> None:
        self._read = read
        self._used: dict[bytes, bytes] = {}

    @property
    def nodes(self) -> tuple[bytes, ...]:
        """The nodes read so far."""
        return tuple(self._used.values())

    def __getitem__(self, key: bytes) -> bytes:
        node = self._used.get(key)
        if node is None:
            node = self._read(key)
            if node is None:
                raise KeyError(key)
            self._used[key] = node
        return node

    def value(self, root: bytes, key: bytes) -> bytes:
        """What the trie with this root holds under `key`, b"" for nothing. Raises BadInput without the nodes to tell
        it, or when they are no nodes of a trie."""
        try:
            return bytes(HexaryTrie(self, root).get(key))
        except MissingTrieNode as error:
            raise BadInput(f"a trie node is missing below the root 0x{root.hex()}") from error
        except _MALFORMED as error:
            raise BadInput(f"what lies below the root 0x{root.hex()} is no trie") from error


def item(witness: Witness, root: bytes, index: int) -> bytes:
    """A block's transaction or receipt, by the root in its header. Raises BadInput when it has none of this index."""
    value = witness.value(root, rlp.encode(index, big_endian_int))
    if not value:
        raise BadInput(f"nothing has the index {index} below the root 0x{root.hex()}")
    return value


def storage(witness: Witness, state_root: bytes, contract: ContractName) -> layout.ReadSlot:
    """How a contract's storage reads in the state with this root. Raises BadInput, and so does what it returns."""
    account = witness.value(state_root, keccak(ADDRESSES[contract]))
    root = bytes(_decoded(account, Account).storage_root)

    def read(slot: int) -> int:
        value = witness.value(root, keccak(slot.to_bytes(layout.WORD)))
        return int(_decoded(value, big_endian_int)) if value else 0

    return read


def _decoded(data: bytes, kind: Any) -> Any:
    try:
        return rlp.decode(data, kind)
    except _MALFORMED as error:
        raise BadInput("the state has an entry that is none") from error


def authorities(witness: Witness, state_root: bytes) -> frozenset[Address]:
    """Who the authorities are in the state with this root. Raises BadInput."""
    return frozenset(layout.authorities(storage(witness, state_root, "Accounts")))


def proven(nodes: Sequence[bytes], read: Callable[[Witness], T]) -> T:
    """What a read gives over these nodes alone. Raises BadInput unless it needs every one of them, in this order."""
    known = {keccak(node): node for node in nodes}
    witness = Witness(known.get)
    found = read(witness)
    if witness.nodes != tuple(nodes):
        raise BadInput(
            f"its {len(nodes)} trie nodes are not the {len(witness.nodes)} that are needed, in the order of their use"
        )
    return found


def gathered(source: ReadNode, read: Callable[[Witness], T]) -> tuple[T, tuple[bytes, ...]]:
    """What a read gives over a whole store, and the nodes that prove it."""
    witness = Witness(source)
    return read(witness), witness.nodes
