"""State with less done twice: each block is what plain py-evm makes of the same calls, its hashes what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rlp
from eth.consensus.context import ConsensusContext
from eth.db.atomic import AtomicDB
from eth.db.chain import ChainDB
from eth.vm.chain_context import ChainContext
from eth.vm.forks.cancun.state import CancunState
from eth_account import Account
from eth_hash.auto import keccak
from trie import HexaryTrie

from contracts.addresses import ADDRESSES
from contracts.calls import (
    AddAuthority,
    AddMirror,
    Call,
    CheckTier,
    DefineTier,
    ExpelAccount,
    GrantTier,
    LeaveNode,
    RemoveAuthority,
    RemoveMirror,
    RetireModel,
    RevokeTier,
    SetCoreModel,
    WithdrawShards,
)
from ledger import state
from ledger.block import EXECUTION_DECIDES, child_header
from ledger.chain import Chain
from ledger.execution import Executed, Execution, LedgerVM, Overlay
from ledger.keys import Key
from ledger.state import Nodes
from ledger.transactions import Transaction
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    EPOCH,
    MODEL,
    NODE,
    OPERATOR,
    STRANGER,
    VERSION,
    Builder,
    address,
    announce,
    enrol,
    import_block,
    join,
    open_chain,
    raw_call,
    register,
)

Step = tuple[Key, Call, int]
ENOUGH = 8_000_000

BLOCKS: list[list[Step]] = [
    [(ADMIN, register(), ENOUGH), (OPERATOR, join(), ENOUGH), (OPERATOR, announce(), ENOUGH)],
    [(OPERATOR, announce(), ENOUGH)],
    [(ADMIN, register(), ENOUGH), (OPERATOR, register("other"), ENOUGH)],  # both are refused
    # All but the last run out of gas, in different places.
    [(OPERATOR, announce((0, 2)), gas) for gas in (23_200, 26_000, 30_000, 36_000, 45_000, 90_000)],
    [(ADMIN, enrol(STRANGER.address, address(1), address(2)), ENOUGH)],
    [
        (ADMIN, DefineTier("gold", 2, 1 << 34), ENOUGH),
        (ADMIN, GrantTier(STRANGER.address, "pro", EPOCH + 10**6), ENOUGH),
        (STRANGER, CheckTier(STRANGER.address, MODEL, VERSION), ENOUGH),
        (ADMIN, RevokeTier(STRANGER.address), ENOUGH),
        (STRANGER, CheckTier(STRANGER.address, MODEL, VERSION), ENOUGH),
        (ADMIN, ExpelAccount(address(1)), ENOUGH),
    ],
    [
        (ADMIN, register("core", shards=20, core=True), ENOUGH),
        (ADMIN, AddMirror(MODEL, VERSION, "http", "http://192.0.2.1/"), ENOUGH),
        (ADMIN, RemoveMirror(MODEL, VERSION, "http", "http://192.0.2.1/"), ENOUGH),
        (OPERATOR, WithdrawShards(NODE, MODEL, VERSION, (1,)), ENOUGH),
        (ADMIN, SetCoreModel(MODEL, VERSION), ENOUGH),
        (ADMIN, RetireModel(MODEL, VERSION), ENOUGH),  # refused: it is the core model
    ],
    [(OPERATOR, LeaveNode(NODE), ENOUGH), (OPERATOR, LeaveNode(NODE), ENOUGH), (OPERATOR, join(), ENOUGH)],
    [(ADMIN, AddAuthority(STRANGER.address), ENOUGH), (ADMIN, RemoveAuthority(STRANGER.address), ENOUGH)],
]

ROOTS = "0xfe0c92f0fcf75a81f551597a5ea20751cba5e02cb2725babe11bdc97cc4df36b"
"""Keccak of what execution decides of all headers of the chain with these blocks, as it was when every opcode and every
node went through py-evm alone."""

RECEIPTS = "0x8965e6a203a15f641bad3138a1cab238b134e8122fe17262cadf2e58571b38d3"
"""Keccak of all its receipts."""


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with open_chain(tmp_path / "ledger") as chain:
        yield chain


def signed(chain: Chain, block: list[Step]) -> list[bytes]:
    nonces = {key.address: chain.nonce(key.address) for key, _, _ in block}
    raws = []
    for key, call, gas in block:
        raws.append(raw_call(key, nonces[key.address], call, gas))
        nonces[key.address] += 1
    return raws


def executed(chain: Chain, raws: list[bytes]) -> Executed:
    header = child_header(chain.tip.header, chain.tip.header.timestamp + 1, AUTHORITY.address, b"")
    with chain._execution(header, chain.tip) as execution:
        for raw in raws:
            execution.apply(chain.decode(raw))
        return execution.finish()


def made_by_py_evm(chain: Chain, raws: list[bytes]) -> tuple[Any, list[bytes], list[str | None], dict[bytes, bytes]]:
    """Header without the lists' roots, receipts, kinds of errors and state nodes, with nothing of ours in between."""
    header = child_header(chain.tip.header, chain.tip.header.timestamp + 1, AUTHORITY.address, b"")
    overlay = Overlay(chain.store.state_node)
    database = AtomicDB(overlay)
    vm = PlainVM(header, ChainDB(database), ChainContext(chain.chain_id), ConsensusContext(database))
    receipts, errors = [], []
    for raw in raws:
        receipt, computation = vm.apply_transaction(header, chain.decode(raw).signed)
        header = vm.add_receipt_to_header(header, receipt)
        receipts.append(receipt.encode())
        errors.append(type(computation.error).__name__ if computation.is_error else None)
    vm.state.persist()
    return header.copy(state_root=vm.state.state_root), receipts, errors, overlay.written


class PlainVM(LedgerVM):
    _state_class = CancunState


def test_every_block_is_what_plain_py_evm_makes_of_it(chain: Chain) -> None:
    reasons = set()
    for block in BLOCKS:
        raws = signed(chain, block)
        ours = executed(chain, raws)
        header, receipts, errors, nodes = made_by_py_evm(chain, raws)
        roots = {name: getattr(ours.header, name) for name in ("transaction_root", "receipt_root")}
        assert ours.header == header.copy(**roots)
        assert [receipt.encode() for receipt in ours.receipts] == receipts
        for record, error in zip(ours.records, errors, strict=True):
            assert (record.reason is None) == (error is None)
            assert error in {None, "Revert"} or record.reason == f"the call failed: {error}"
        # py-evm also writes again what it leaves as it was.
        assert ours.state_nodes.items() <= nodes.items()
        for key in nodes.keys() - ours.state_nodes.keys():
            assert chain.store.state_node(key) == nodes[key]
        reasons |= {record.reason for record in ours.records}
        Builder(chain).grow(*raws)
    assert len(reasons) > 3
    assert {None, "the call failed: OutOfGas"} < reasons


def test_what_is_py_evms_to_execute_fits_between_what_is_ours(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third transaction, and all of them."""
    ours = Execution._execute

    def all_but_every(n: int) -> Callable[[Execution, Transaction], Any]:
        return lambda self, transaction: None if self.count % n == 0 else ours(self, transaction)

    for block in BLOCKS:
        raws = signed(chain, block)
        whole = executed(chain, raws)
        for n in (1, 3):
            with monkeypatch.context() as patch:
                patch.setattr(Execution, "_execute", all_but_every(n))
                patch.setattr(LedgerVM, "_state_class", CancunState)
                mixed = executed(chain, raws)
            assert (mixed.header, mixed.records, mixed.receipts) == (whole.header, whole.records, whole.receipts)
            assert whole.state_nodes.items() <= mixed.state_nodes.items()
        Builder(chain).grow(*raws)


def test_an_access_list_warms_what_it_names(chain: Chain) -> None:
    """It costs what naming it costs, and what is named costs less."""
    Builder(chain).grow(*signed(chain, BLOCKS[0]))
    call = announce((0, 2))
    fields = {"chainId": chain.chain_id, "nonce": chain.nonce(OPERATOR.address), "to": call.to, "gas": ENOUGH}
    fields |= {"value": 0, "maxFeePerGas": 0, "maxPriorityFeePerGas": 0, "data": call.encode(), "type": 2}
    used = []
    for addresses, slots in (([], []), (["Models", "Members"], []), (["Accounts"], list(range(200)))):
        keys = ["0x" + slot.to_bytes(32).hex() for slot in slots]
        listed = [{"address": "0x" + ADDRESSES[name].hex(), "storageKeys": keys} for name in addresses]
        raw = bytes(Account.sign_transaction({**fields, "accessList": listed}, OPERATOR.secret).raw_transaction)
        ours, (header, receipts, _, _) = executed(chain, [raw]), made_by_py_evm(chain, [raw])
        assert (ours.header.gas_used, [receipt.encode() for receipt in ours.receipts]) == (header.gas_used, receipts)
        used.append(int(header.gas_used))
    assert used[1] < used[0] < used[2]


def test_a_fixed_chain_has_the_roots_it_always_had(chain: Chain) -> None:
    for block in BLOCKS:
        Builder(chain).grow(*signed(chain, block))
    numbers = range(chain.tip.number + 1)
    headers = [chain.store.sealed(number).header().as_dict() for number in numbers]
    roots = rlp.encode([[header[name] for name in sorted(EXECUTION_DECIDES)] for header in headers])
    receipts = b"".join(b"".join(chain.store.receipts(number)) for number in numbers)
    assert (f"0x{keccak(roots).hex()}", f"0x{keccak(receipts).hex()}") == (ROOTS, RECEIPTS)


def test_every_state_of_every_block_can_be_read(chain: Chain) -> None:
    """Nodes that are left out of a block are those of blocks before it."""
    for block in BLOCKS:
        import_block(chain, Builder(chain).make(*signed(chain, block)))
    nodes = {key[1:]: value for key, value in chain.store._db.iterator(prefix=b"s")}
    for number in range(chain.tip.number + 1):
        accounts = HexaryTrie(nodes, chain.store.sealed(number).header().state_root)
        for leaf in leaves(accounts):
            _, _, storage_root, code_hash = rlp.decode(leaf)
            assert list(leaves(HexaryTrie(nodes, storage_root))) or storage_root == HexaryTrie.BLANK_NODE_HASH
            assert code_hash == keccak(b"") or keccak(nodes[code_hash]) == code_hash


def leaves(trie: HexaryTrie, path: tuple[int, ...] = ()) -> Iterator[bytes]:
    node = trie.traverse(path)
    if node.value:
        yield node.value
    for segment in node.sub_segments:
        yield from leaves(trie, path + tuple(segment))


def test_nodes_are_read_once_and_forgotten_above_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "NODES_MAX", 3)
    asked: list[bytes] = []

    def read(key: bytes) -> bytes | None:
        asked.append(key)
        return None if key == b"none" else b"node of " + key

    nodes = Nodes(read)
    for key in (b"a", b"a", b"none", b"none", b"b"):
        assert nodes.get(key) == (None if key == b"none" else b"node of " + key)
    assert asked == [b"a", b"none", b"none", b"b"]
    nodes.keep({b"c": b"C", b"d": b"D"})
    assert [nodes.get(b"c"), nodes.get(b"d"), nodes.get(b"b")] == [b"C", b"D", b"node of b"]
    assert asked == [b"a", b"none", b"none", b"b"]
    nodes.get(b"a")
    assert asked[-1] == b"a"
