"""The state after one final block, read only: accounts, code, storage, calls, estimates and proofs.

Nodes of old states are never deleted, so every final block has its view. Nothing is kept of what a call does. Knows no
pool and no clock, and may be used from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rlp
from eth.consensus.context import ConsensusContext
from eth.constants import BLANK_ROOT_HASH, EMPTY_SHA3
from eth.db.atomic import AtomicDB
from eth.db.chain import ChainDB
from eth.exceptions import OutOfGas, Revert
from eth.rlp.accounts import Account as StateAccount
from eth.vm.chain_context import ChainContext
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.forks.cancun.transactions import CancunTransactionBuilder
from eth.vm.interrupt import EVMMissingData
from eth.vm.spoof import SpoofTransaction
from eth_hash.auto import keccak
from trie.exceptions import MissingTraversalNode, MissingTrieNode
from trie.hexary import HexaryTrie

from contracts.addresses import CONTRACT_AT
from contracts.calls import revert_reason
from contracts.errors import BadInput, Corrupt, Reverted
from contracts.types import Address
from ledger.chain import ANCESTORS_MAX
from ledger.execution import LedgerVM, Overlay
from ledger.store import Store

HASH_SIZE = 32
"""Bytes of a Keccak hash; a trie node whose encoding is shorter stands inside its parent."""

ESTIMATE_TOLERANCE = 64
"""An estimate is found when it is less than one part in this many above what is known to be too little."""

CALL_STIPEND = 2_300
"""What the EVM may hold back on top of EIP-150's 64th part; an estimate leaves room for both."""

AccessList = tuple[tuple[Address, tuple[int, ...]], ...]


@dataclass(frozen=True)
class CallRequest:
    """A call that is tried and not sent. `gas` is the most it may use."""

    sender: Address
    to: Address
    data: bytes
    gas: int
    access_list: AccessList = ()


@dataclass(frozen=True)
class StorageProof:
    """One storage slot with the trie nodes from the account's storage root to it, or to where it would be."""

    slot: int
    value: int
    nodes: tuple[bytes, ...]


@dataclass(frozen=True)
class AccountProof:
    """An account with the trie nodes from the state root to it, or to where it would be (EIP-1186)."""

    address: Address
    nonce: int
    balance: int
    code_hash: bytes
    storage_root: bytes
    nodes: tuple[bytes, ...]
    storage: tuple[StorageProof, ...]


@dataclass(frozen=True)
class _Outcome:
    output: bytes
    error: Exception | None
    gas_reserved: int
    """What it used before refunds: with less than this it fails."""


class View:
    """`root` is the state's; calls run as if in the block of `environment`."""

    def __init__(self, store: Store, chain_id: int, root: bytes, environment: CancunBlockHeader) -> None:
        self._store = store
        self._chain_id = chain_id
        self._root = root
        self._environment = environment.copy(state_root=root, gas_used=0)

    # Accounts

    def balance(self, account: Address) -> int:
        return int(self._account(account).balance)

    def nonce(self, account: Address) -> int:
        return int(self._account(account).nonce)

    def code(self, account: Address) -> bytes:
        return self._code(bytes(self._account(account).code_hash))

    def storage(self, account: Address, slot: int) -> int:
        with self._complete(), self._trie(bytes(self._account(account).storage_root)) as trie:
            return _storage_value(trie.get(_slot_key(slot)))

    def proof(self, account: Address, slots: Iterable[int]) -> AccountProof:
        """The account and these slots of its storage, with what proves them to whoever trusts the state root."""
        state = self._account(account)
        with self._complete(), self._trie(self._root) as trie:
            nodes = _proof_nodes(trie, keccak(account))
        with self._complete(), self._trie(bytes(state.storage_root)) as trie:
            storage = tuple(
                StorageProof(slot, _storage_value(trie.get(_slot_key(slot))), _proof_nodes(trie, _slot_key(slot)))
                for slot in slots
            )
        return AccountProof(
            account,
            int(state.nonce),
            int(state.balance),
            bytes(state.code_hash),
            bytes(state.storage_root),
            nodes,
            storage,
        )

    def _account(self, account: Address) -> Any:
        with self._complete(), self._trie(self._root) as trie:
            found = trie.get(keccak(account))
        return rlp.decode(found, StateAccount) if found else StateAccount()

    def _code(self, code_hash: bytes) -> bytes:
        if code_hash == EMPTY_SHA3:
            return b""
        code = self._store.state_node(code_hash)
        if code is None:
            raise self._store.corrupt(f"the code 0x{code_hash.hex()} is missing")
        return code

    @contextmanager
    def _trie(self, root: bytes) -> Iterator[Any]:
        overlay = Overlay(self._store.state_node)
        try:
            yield HexaryTrie(overlay, root)
        finally:
            overlay.close()

    @contextmanager
    def _complete(self) -> Iterator[None]:
        """Raise Corrupt when a node of the state is not there."""
        try:
            yield
        except (EVMMissingData, MissingTrieNode, MissingTraversalNode) as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> Corrupt:
        return self._store.corrupt(f"its state lacks a node: {error}")

    # Calls

    def call(self, request: CallRequest) -> bytes:
        """What the call returns. Raises Reverted when the contract refuses it, BadInput when it cannot be run."""
        outcome = self._run(request, request.gas)
        _check_success(outcome, request.gas)
        return outcome.output

    def estimate_gas(self, request: CallRequest) -> int:
        """Gas with which a transaction of this call succeeds, little above the least. Raises as `call` does.

        The least is searched for by halving, after a guess that is right unless a contract looks at the gas it has.
        """
        if request.to not in CONTRACT_AT:
            raise BadInput(f"the destination 0x{request.to.hex()} is none of this ledger's contracts")
        outcome = self._run(request, request.gas)
        _check_success(outcome, request.gas)
        too_little, enough = outcome.gas_reserved - 1, request.gas
        guess = (outcome.gas_reserved + CALL_STIPEND) * 64 // 63
        while enough - too_little > enough // ESTIMATE_TOLERANCE:
            tried = guess if too_little < guess < enough else (too_little + enough) // 2
            guess = 0
            if self._run(request, tried).error is None:
                enough = tried
            else:
                too_little = tried
        return enough

    def _run(self, request: CallRequest, gas: int) -> _Outcome:
        with self._complete(), self._state() as state:
            if request.to in state.computation_class.get_precompiles():
                raise BadInput(f"0x{request.to.hex()} is a precompiled contract: it is not called from outside here")
            unsigned = CancunTransactionBuilder.new_unsigned_dynamic_fee_transaction(
                self._chain_id,
                state.get_nonce(request.sender),
                0,
                0,
                gas,
                request.to,
                0,
                request.data,
                request.access_list,
            )
            transaction = SpoofTransaction(unsigned, from_=request.sender)
            if gas < transaction.intrinsic_gas:
                raise BadInput(f"intrinsic gas too low: the call has {gas} gas and needs {transaction.intrinsic_gas}")
            # What py-evm does with a transaction, without the checks that only a signed one can pass.
            executor = state.get_transaction_executor()
            computation = executor.build_computation(executor.build_evm_message(transaction), transaction)
            error = computation.error if computation.is_error else None
            return _Outcome(bytes(computation.output), error, gas - computation.get_gas_remaining())

    @contextmanager
    def _state(self) -> Iterator[Any]:
        overlay = Overlay(self._store.state_node)
        try:
            database = AtomicDB(overlay)
            vm = LedgerVM(
                self._environment, ChainDB(database), ChainContext(self._chain_id), ConsensusContext(database)
            )
            vm.ancestors = self._ancestors()
            yield vm.state
        finally:
            overlay.close()

    def _ancestors(self) -> Iterator[bytes]:
        """Hashes of the blocks before the environment's, newest first, as far as BLOCKHASH sees."""
        newest = int(self._environment.block_number) - 1
        for number in range(newest, max(-1, newest - ANCESTORS_MAX), -1):
            yield self._store.record(number).hash


def _check_success(outcome: _Outcome, gas: int) -> None:
    """Raise why a call failed, in the words of execution clients, which libraries look for."""
    match outcome.error:
        case None:
            return
        case Revert():
            reason = f": {revert_reason(outcome.output)}" if outcome.output else ""
            raise Reverted(f"execution reverted{reason}", outcome.output)
        case OutOfGas():
            raise BadInput(f"out of gas: the call needs more than its {gas} gas")
        case error:
            raise BadInput(f"the call failed: {type(error).__name__}")


def _slot_key(slot: int) -> bytes:
    return bytes(keccak(slot.to_bytes(32, "big")))


def _storage_value(found: bytes) -> int:
    return int.from_bytes(rlp.decode(found), "big") if found else 0


def _proof_nodes(trie: Any, key: bytes) -> tuple[bytes, ...]:
    """The encoded nodes on the way to `key`, without those that stand inside their parent; none of an empty trie."""
    if trie.root_hash == BLANK_ROOT_HASH:
        return ()
    root, *below = (rlp.encode(node) for node in trie.get_proof(key))
    return (root, *(node for node in below if len(node) >= HASH_SIZE))
