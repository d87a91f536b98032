"""The shortcut: each block is what py-evm makes of the same calls; what differs is executed by py-evm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rlp
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
    SetPublic,
    WithdrawShards,
)
from contracts.errors import BadPeer
from ledger import seal, shortcut, state
from ledger.block import EXECUTION_DECIDES, SealedBlock, child_header
from ledger.chain import Chain, Shortcut
from ledger.execution import Executed
from ledger.keys import Key
from ledger.runs import HandOver
from ledger.state import Nodes
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
    decode_sealed,
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
        (ADMIN, SetPublic(MODEL, VERSION, True), ENOUGH),
        (ADMIN, SetPublic(MODEL, VERSION, True), ENOUGH),  # refused: it is so already
        (ADMIN, SetCoreModel(MODEL, VERSION), ENOUGH),
        (ADMIN, RetireModel(MODEL, VERSION), ENOUGH),  # refused: it is the core model
    ],
    [(OPERATOR, LeaveNode(NODE), ENOUGH), (OPERATOR, LeaveNode(NODE), ENOUGH), (OPERATOR, join(), ENOUGH)],
    [(ADMIN, AddAuthority(STRANGER.address), ENOUGH), (ADMIN, RemoveAuthority(STRANGER.address), ENOUGH)],
]

ROOTS = "0x8ec276c53c5f4514b9e22b8a0e0d7689f12f7a8d54e3d245fa8fb937ad6be11f"
"""Keccak of what execution decides of all headers of the chain with these blocks, as py-evm alone makes it of the
contracts of today."""

RECEIPTS = "0x5a33eaeea4f017939256b52df32ccc1be5952dda9752839c7bf9ea42a039fd13"
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
    return shortcut.execute(header, [chain.decode(raw) for raw in raws], chain.store.state_node)


def made_by_py_evm(chain: Chain, raws: list[bytes]) -> Executed:
    header = child_header(chain.tip.header, chain.tip.header.timestamp + 1, AUTHORITY.address, b"")
    with chain._execution(header, chain.tip) as execution:
        for raw in raws:
            execution.apply(chain.decode(raw))
        return execution.finish()


def test_every_block_is_what_py_evm_makes_of_it(chain: Chain) -> None:
    reasons = set()
    for block in BLOCKS:
        raws = signed(chain, block)
        ours, theirs = executed(chain, raws), made_by_py_evm(chain, raws)
        assert (ours.header, ours.records, ours.transactions) == (theirs.header, theirs.records, theirs.transactions)
        assert [receipt.encode() for receipt in ours.receipts] == [receipt.encode() for receipt in theirs.receipts]
        # py-evm also writes again what it leaves as it was.
        assert ours.state_nodes.items() <= theirs.state_nodes.items()
        for key in theirs.state_nodes.keys() - ours.state_nodes.keys():
            assert chain.store.state_node(key) == theirs.state_nodes[key]
        reasons |= {record.reason for record in ours.records}
        Builder(chain).grow(*raws)
    assert len(reasons) > 3
    assert {None, "the call failed: OutOfGas"} < reasons


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
        ours, theirs = executed(chain, [raw]), made_by_py_evm(chain, [raw])
        assert ours.header == theirs.header
        used.append(int(theirs.header.gas_used))
    assert used[1] < used[0] < used[2]


def test_a_fixed_chain_has_the_roots_it_always_had(chain: Chain) -> None:
    for block in BLOCKS:
        Builder(chain).grow(*signed(chain, block))
    numbers = range(chain.tip.number + 1)
    headers = [chain.store.sealed(number).header().as_dict() for number in numbers]
    roots = rlp.encode([[header[name] for name in sorted(EXECUTION_DECIDES)] for header in headers])
    receipts = b"".join(b"".join(chain.store.receipts(number)) for number in numbers)
    assert (f"0x{keccak(roots).hex()}", f"0x{keccak(receipts).hex()}") == (ROOTS, RECEIPTS)


def test_blocks_from_others_take_it_and_those_made_here_do_not(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(header: Any, transactions: Any, read: Any) -> Executed:
        taken.append(int(header.block_number))
        return shortcut.execute(header, transactions, read)

    monkeypatch.setattr(chain, "_shortcut", count)
    data = Builder(chain).make(*signed(chain, BLOCKS[0]))
    block = decode_sealed(data)
    chain.execute_proposal(block.header(), block.transactions, EPOCH + 1_000_000, chain.tip)
    assert taken == []
    assert import_block(chain, data)
    assert taken == [1]


def wrong_root(header: Any, transactions: Any, read: Any) -> Executed:
    found = shortcut.execute(header, transactions, read)
    return replace(found, header=found.header.copy(state_root=b"\1" * 32), state_nodes={})


def wrong_bloom(header: Any, transactions: Any, read: Any) -> Executed:
    found = shortcut.execute(header, transactions, read)
    return replace(found, header=found.header.copy(bloom=found.header.bloom ^ 1))


def handed_over(header: Any, transactions: Any, read: Any) -> Executed:
    raise HandOver


@pytest.mark.parametrize("broken", [wrong_root, wrong_bloom, handed_over])
def test_what_it_gets_wrong_is_executed_by_py_evm(
    chain: Chain, tmp_path: Path, broken: Shortcut, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_chain(tmp_path / "other") as other:
        monkeypatch.setattr(other, "_shortcut", broken)
        for block in BLOCKS:
            data = Builder(chain).grow(*signed(chain, block))
            assert import_block(other, data)
        assert other.tip == chain.tip
        end = chain.tip.number + 1
        assert list(other.store.records(0, end)) == list(chain.store.records(0, end))


def test_it_saves_no_wrong_block(chain: Chain) -> None:
    """Its seal and its votes are right: its authorities lie together."""
    block = decode_sealed(Builder(chain).make(*signed(chain, BLOCKS[0])))
    header = block.header()
    unsealed = header.copy(extra_data=header.extra_data[: seal.UNSEALED_SIZE], state_root=b"\1" * 32)
    lie = seal.seal(unsealed, AUTHORITY)
    certificate = seal.certify(chain.tip.epoch, lie, [AUTHORITY])
    with pytest.raises(BadPeer, match="are not what executing it gives"):
        import_block(chain, SealedBlock(rlp.encode(lie), block.transactions, certificate).encode())
    assert chain.tip.number == 0


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
