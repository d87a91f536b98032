"""The state of a block that is being executed: read through one function, changed in memory, its new root at the end.

Accounts, storage and tries are Ethereum's (Yellow Paper, 4.1 and appendix D). There is no coin and no contract is ever
created, so a transaction changes nothing but its sender's nonce and contracts' slots. Knows no opcodes and no gas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from typing import Final

import rlp
from eth.constants import BLANK_ROOT_HASH, EMPTY_SHA3
from eth_hash.auto import keccak

from contracts.types import Address
from ledger.trie import ReadNode, Trie, missing

NODES_MAX: Final = 8_192
"""State nodes remembered, about 2 MB."""

SLOT_SIZE: Final = 32


class Nodes:
    """State nodes and code, read or written lately. A node's key is its hash, so none that is remembered is stale."""

    def __init__(self, read: ReadNode) -> None:
        self._read = read
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, key: bytes) -> bytes | None:
        node = self._kept.get(key)
        if node is None:
            node = self._read(key)
            if node is not None:
                self.keep({key: node})
        return node

    def keep(self, nodes: Mapping[bytes, bytes]) -> None:
        """Remember nodes that are on disk, and forget the oldest ones above NODES_MAX."""
        self._kept.update(nodes)
        while len(self._kept) > NODES_MAX:
            self._kept.popitem(last=False)


class BlockState:
    """State at a root, and what transactions made of it since. Raises MissingTrieNode where a node is not there."""

    def __init__(self, read: ReadNode, root: bytes) -> None:
        self._read = read
        self._trie = Trie(read, root)
        self._accounts: dict[bytes, _Account] = {}

    def nonce(self, address: Address) -> int:
        return self._account(address).nonce

    def use_nonce(self, address: Address) -> None:
        """The account sends a transaction."""
        self._account(address).nonce += 1

    def get_code(self, address: bytes) -> bytes:
        return self._account(address).code

    def get_storage(self, address: bytes, slot: int) -> int:
        return self._account(address).slot(slot)

    def set_storage(self, address: bytes, slot: int, value: int) -> None:
        self._account(address).slots[slot] = value

    def _account(self, address: bytes) -> _Account:
        account = self._accounts.get(address)
        if account is None:
            account = self._accounts[address] = _Account(self._read, self._trie.get(keccak(address)))
        return account

    def finish(self) -> tuple[bytes, dict[bytes, bytes]]:
        """The root after all this, and the nodes that are new, by their hashes."""
        nodes: dict[bytes, bytes] = {}
        changes: dict[bytes, bytes] = {}
        for address, account in self._accounts.items():
            before, after = account.encoded, account.finish(nodes)
            if before != after:
                changes[keccak(address)] = after
        root, made = self._trie.changed(changes)
        return root, nodes | made


class _Account:
    """One account as it was, and what is to be of it."""

    def __init__(self, read: ReadNode, encoded: bytes) -> None:
        self.encoded = encoded
        nonce, balance, root, code_hash = rlp.decode(encoded) if encoded else (b"", b"", BLANK_ROOT_HASH, EMPTY_SHA3)
        self.nonce = int.from_bytes(nonce)
        self._balance, self._root, self._code_hash = bytes(balance), bytes(root), bytes(code_hash)
        self._trie = Trie(read, self._root)
        self._read = read
        self._slots_before: dict[int, int] = {}
        self.slots: dict[int, int] = {}
        """Of those that were read or written."""

    @cached_property
    def code(self) -> bytes:
        if self._code_hash == EMPTY_SHA3:
            return b""
        code = self._read(self._code_hash)
        if code is None:
            raise missing(self._code_hash, self._root)
        return code

    def slot(self, slot: int) -> int:
        value = self.slots.get(slot)
        if value is None:
            found = self._trie.get(_slot_key(slot))
            value = self.slots[slot] = self._slots_before[slot] = int.from_bytes(rlp.decode(found)) if found else 0
        return value

    def finish(self, nodes: dict[bytes, bytes]) -> bytes:
        """Its encoding after all this; the nodes of its storage that are new go into `nodes`."""
        changes = {
            _slot_key(slot): rlp.encode(value) if value else b""
            for slot, value in self.slots.items()
            if value != self._slots_before.get(slot)
        }
        root, made = self._trie.changed(changes)
        nodes.update(made)
        if not self.encoded and not self.nonce and not changes:
            return b""
        return bytes(rlp.encode([self.nonce, self._balance, root, self._code_hash]))


def _slot_key(slot: int) -> bytes:
    return bytes(keccak(slot.to_bytes(SLOT_SIZE)))
