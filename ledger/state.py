"""py-evm's state over our store: the same accounts, storage and tries, with less done twice.

What is left out, and no root depends on: reading a node again that was just read or written, decoding it again, writing
an account or putting it back into the trie when it is as it was, and spelling out a trace that is off.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import rlp
from eth.constants import EMPTY_SHA3
from eth.db.account import AccountDB
from eth.db.diff import DELETED, DBDiff
from eth.db.storage import AccountStorageDB, StorageLookup
from eth.vm.forks.cancun.state import CancunState, CancunTransactionExecutor
from eth.vm.message import Message
from trie.exceptions import MissingTraversalNode
from trie.hexary import HexaryTrie
from trie.utils.nibbles import decode_nibbles, is_nibbles_terminated, remove_nibbles_terminator

from ledger.computation import LedgerComputation

ReadNode = Callable[[bytes], bytes | None]

NODES_MAX: Final = 8_192
"""State nodes remembered, encoded and decoded: about 2 MB and 8 MB."""

HASH_SIZE: Final = 32
BRANCH_SIZE: Final = 17


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


@lru_cache(NODES_MAX)
def _decoded(encoded: bytes) -> tuple[Any, ...]:
    return tuple(rlp.decode(encoded))


@lru_cache(NODES_MAX)
def _path(encoded: bytes) -> tuple[tuple[int, ...], bool]:
    """The nibbles of a leaf's or an extension's path, and whether it is a leaf's (hex-prefix, Yellow Paper C)."""
    nibbles = decode_nibbles(encoded)
    is_leaf = is_nibbles_terminated(nibbles)
    return tuple(remove_nibbles_terminator(nibbles)), is_leaf


def _copy(node: Any) -> Any:
    """Bytes as they are, lists anew: py-evm's trie changes nodes in place."""
    return node if isinstance(node, bytes) else [_copy(part) for part in node]


class _Trie(HexaryTrie):
    """A trie that decodes each node once."""

    __slots__ = ()

    def get_node(self, node_hash: Any) -> Any:
        if len(node_hash) != HASH_SIZE or node_hash == self.BLANK_NODE_HASH:
            return super().get_node(node_hash)  # type: ignore[no-untyped-call]
        return _copy(_decoded(self.db[node_hash]))

    def _get(self, root_hash: Any, trie_key: Any) -> bytes:
        """The value at a key, b"" for none. py-evm's own finds out at each node again what kind it is."""
        node = self._look_up(root_hash, trie_key, 0)
        at = 0
        while node:
            if len(node) == BRANCH_SIZE:
                if at == len(trie_key):
                    return node[-1]
                child, at = node[trie_key[at]], at + 1
            else:
                path, is_leaf = _path(node[0])
                if is_leaf:
                    return node[1] if path == trie_key[at:] else b""
                if path != trie_key[at : at + len(path)]:
                    return b""
                child, at = node[1], at + len(path)
            node = self._look_up(child, trie_key, at)
        return b""

    def _look_up(self, child: Any, trie_key: Any, at: int) -> Any:
        """The node that a node's part stands for: a short one is there itself, of others the hash is."""
        if not isinstance(child, bytes) or child in (b"", self.BLANK_NODE_HASH):
            return b"" if child == self.BLANK_NODE_HASH else child
        try:
            return _decoded(self.db[child])
        except KeyError as error:
            raise MissingTraversalNode(error.args[0], trie_key[:at]) from error


class _StorageLookup(StorageLookup):
    _write_trie: Any

    def _get_write_trie(self) -> HexaryTrie:
        fresh = self._write_trie is None
        trie = super()._get_write_trie()
        if fresh:
            trie = self._write_trie = _Trie(self._trie_nodes_batch, self._starting_root_hash, prune=True)
        return trie

    def _get_read_trie(self) -> HexaryTrie:
        if self._write_trie is not None:
            return self._write_trie
        return _Trie(self._db, self._starting_root_hash)


class _Storage(AccountStorageDB):
    def __init__(self, db: Any, storage_root: Any, address: Any) -> None:
        super().__init__(db, storage_root, address)
        self._storage_lookup = self._storage_cache._db = _StorageLookup(db, storage_root, address)


class _Accounts(AccountDB):
    def __init__(self, db: Any, state_root: Any) -> None:
        super().__init__(db, state_root)
        self._trie._db = _Trie(self._batchtrie, state_root, prune=True)

    def _get_address_store(self, address: Any) -> Any:
        if address not in self._account_stores:
            root = self._get_storage_root(address)
            self._account_stores[address] = _Storage(self._raw_store_db, root, address)
        return self._account_stores[address]

    def set_balance(self, address: Any, balance: int) -> None:
        """Without a copy when it is the balance already, as it is wherever no coin moves."""
        account = self._get_account(address)
        if account.balance == balance:
            self._set_account(address, account)
        else:
            super().set_balance(address, balance)

    def _set_account(self, address: Any, account: Any) -> None:
        """Without writing what is there already. An account that does not exist looks like an empty one: writing that
        makes it exist (EIP-161), so it is written."""
        known = self._account_cache.get(address) is account
        if not known or (account.nonce == 0 and account.balance == 0 and account.code_hash == EMPTY_SHA3):
            super()._set_account(address, account)

    def _apply_account_diff_without_proof(self, diff: DBDiff, trie: Any) -> None:
        """Apply what differs from the accounts at the root before."""
        before = self._trie_cache
        changed: dict[bytes, Any] = {key: value for key, value in diff.pending_items() if before[key] != value}
        gone = {key: DELETED for key in diff.deleted_keys() if before[key]}
        super()._apply_account_diff_without_proof(DBDiff(changed | gone), trie)


class _Executor(CancunTransactionExecutor):
    def build_evm_message(self, transaction: Any) -> Any:
        """py-evm's for a call without blobs, and this ledger takes nothing else. py-evm's spells out call data and code
        for its trace whether or not it is on."""
        state = self.vm_state
        state.delta_balance(transaction.sender, -transaction.gas * state.get_gas_price(transaction))
        state.increment_nonce(transaction.sender)
        code, _ = self.get_code_at_address(transaction.to)
        return Message(
            gas=transaction.gas - transaction.intrinsic_gas,
            to=transaction.to,
            sender=transaction.sender,
            value=transaction.value,
            data=transaction.data,
            code=code,
            refund=self.calc_message_refund(transaction),
        )


class LedgerState(CancunState):
    """Cancun's state, and the transactions on it. ledger.transactions has seen to it that each is a call."""

    account_db_class = _Accounts
    computation_class = LedgerComputation
    transaction_executor_class = _Executor
