"""State with less done twice: each block is what plain py-evm makes of the same calls, its hashes what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rlp
from eth.constants import BLANK_ROOT_HASH
from eth.db.account import AccountDB
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.vm.forks.cancun.state import CancunState
from eth_hash.auto import keccak
from hypothesis import example, given
from hypothesis import strategies as st
from trie import HexaryTrie
from trie.exceptions import MissingTrieNode

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
from ledger.execution import Executed, LedgerVM
from ledger.keys import Key
from ledger.state import Nodes, _Accounts, _Trie
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


def test_every_block_is_what_plain_py_evm_makes_of_it(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = set()
    for block in BLOCKS:
        raws = signed(chain, block)
        ours = executed(chain, raws)
        with monkeypatch.context() as patch:
            patch.setattr(LedgerVM, "_state_class", CancunState)
            plain = executed(chain, raws)
        assert ours.header == plain.header
        assert ours.records == plain.records
        assert [r.encode() for r in ours.receipts] == [r.encode() for r in plain.receipts]
        # py-evm also writes again what it leaves as it was.
        assert ours.state_nodes.items() <= plain.state_nodes.items()
        for key in plain.state_nodes.keys() - ours.state_nodes.keys():
            assert chain.store.state_node(key) == plain.state_nodes[key]
        reasons |= {record.reason for record in ours.records}
        Builder(chain).grow(*raws)
    assert len(reasons) > 3
    assert {None, "the call failed: OutOfGas"} < reasons


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


def test_trie_reads_what_py_evms_does() -> None:
    """Of many shapes: empty, one leaf, extensions, branches with values, nodes that stand in their parent."""
    for size in (0, 1, 2, 3, 17, 300):
        nodes: dict[bytes, bytes] = {}
        plain = HexaryTrie(nodes)
        keys = [keccak(bytes([i % 256, i // 256]))[: 1 + i % 5] for i in range(size)]
        for i, key in enumerate(keys):
            plain[key] = b"v" * (1 + i % 40)
        ours = _Trie(nodes, plain.root_hash)
        for key in (*keys, b"", b"\0", *(key + b"\1" for key in keys), *(key[:-1] for key in keys)):
            assert ours[key] == plain[key]
        for key in keys[::2]:
            del ours[key]
            del plain[key]
            assert ours.root_hash == plain.root_hash
        if nodes and size > 100:
            state._decoded.cache_clear()
            del nodes[plain.root_hash]
            for trie in (ours, plain):
                with pytest.raises(MissingTrieNode):
                    trie[keys[1]]


def test_a_node_handed_out_is_the_callers_own() -> None:
    """py-evm's trie changes nodes in place, also those that stand in their parent."""
    nodes: dict[bytes, bytes] = {}
    plain = HexaryTrie(nodes)
    for key in (b"\x10", b"\x11", b"\x20"):
        plain[key] = b"v" * 10
    ours = _Trie(nodes, plain.root_hash)
    handed_out = ours.get_node(plain.root_hash)
    before = repr(handed_out)
    (inside,) = (part for part in handed_out if isinstance(part, list) and len(part) == 2)
    inside[1] = handed_out[0] = b"changed"
    assert repr(ours.get_node(plain.root_hash)) == before


slots = st.integers(0, 3)
whom = st.sampled_from([address(number) for number in range(4)])
operations = st.one_of(
    st.tuples(st.just("set_balance"), whom, st.integers(0, 2)),
    st.tuples(st.just("set_nonce"), whom, st.integers(0, 2)),
    st.tuples(st.just("set_storage"), whom, slots, st.integers(0, 2)),
    st.tuples(st.just("set_code"), whom, st.sampled_from([b"", b"code"])),
    st.tuples(st.just("touch_account"), whom),
    st.tuples(st.just("delete_account"), whom),
    st.tuples(st.sampled_from(["record", "commit", "discard", "lock_changes"])),
    st.just(("persist",)),
)


def do(both: list[AccountDB], checkpoints: list[list[Any]], name: str, arguments: list[Any]) -> None:
    """One operation on both; what has nothing to take back, or cannot be with something to take back, is left out."""
    if name == "record":
        checkpoints.append([accounts.record() for accounts in both])
    elif name in {"commit", "discard"}:
        for accounts, checkpoint in zip(both, checkpoints.pop() if checkpoints else (), strict=False):
            getattr(accounts, name)(checkpoint)
    elif not checkpoints or name not in {"lock_changes", "persist"}:
        for accounts in both:
            getattr(accounts, name)(*arguments)


def answers(accounts: AccountDB) -> list[Any]:
    questions = ("account_exists", "account_is_empty", "get_nonce", "get_balance", "get_code")
    found: list[Any] = [getattr(accounts, name)(address(number)) for name in questions for number in range(4)]
    return found + [accounts.get_storage(address(number), slot) for slot in range(4) for number in range(4)]


@given(done=st.lists(operations, max_size=40))
@example(done=[("set_nonce", address(1), 1), ("persist",), ("delete_account", address(1))])
def test_accounts_go_the_way_of_py_evms(done: list[tuple[Any, ...]]) -> None:
    """Any changes, some taken back, over several blocks: the same answers, the same roots, every node they need."""
    stores: list[dict[bytes, bytes]] = [{}, {}]
    both = [
        kind(AtomicDB(MemoryDB(store)), BLANK_ROOT_HASH)
        for kind, store in zip((AccountDB, _Accounts), stores, strict=True)
    ]
    checkpoints: list[list[Any]] = []
    for name, *arguments in [*done, *[("commit",)] * len(done), ("persist",)]:
        do(both, checkpoints, name, arguments)
        plain, ours = both
        assert plain.state_root == ours.state_root
        if name != "commit":
            assert answers(plain) == answers(ours)
    assert answers(AccountDB(AtomicDB(MemoryDB(stores[1])), ours.state_root)) == answers(plain)


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
