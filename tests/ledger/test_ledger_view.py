"""The state after a final block: read at any block, called without trace, estimated, and proved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rlp
from eth.exceptions import Revert
from eth.rlp.accounts import Account as StateAccount
from eth_hash.auto import keccak
from trie.hexary import HexaryTrie

from contracts.abi import decode_result, encode_function
from contracts.addresses import ADDRESSES
from contracts.calls import Call, GrantTier
from contracts.errors import BadInput, Corrupt, Reverted
from contracts.types import Address
from ledger.ledger import Ledger
from ledger.view import CallRequest, View, _Outcome
from tests.ledger.world import (
    ADMIN,
    CONFIG,
    EPOCH,
    MODEL,
    OPERATOR,
    STRANGER,
    address,
    open_ledger,
    raw_call,
    register,
    sealing,
)

MODELS = ADDRESSES["Models"]
GAS = 8_000_000
CORE_MODEL_SLOTS = range(6)
"""Where the Models contract keeps its few plain variables."""


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger") as opened:
        yield opened


async def send(ledger: Ledger, *calls: Call) -> None:
    """Make the admin's calls final, a block for each."""
    async with sealing(ledger):
        for call in calls:
            nonce = ledger.account(ADMIN.address).next_nonce
            await ledger.wait_receipt(await ledger.submit(raw_call(ADMIN, nonce, call)))


def ask_model(view: View, model_id: str = MODEL) -> Any:
    request = CallRequest(STRANGER.address, MODELS, encode_function("Models", "model", [model_id, "1"]), GAS)
    return decode_result("Models", "model", view.call(request))[0]


def request(call: Call, sender: Address = ADMIN.address, gas: int = GAS) -> CallRequest:
    return CallRequest(sender, call.to, call.encode(), gas)


async def test_every_block_has_its_state(ledger: Ledger) -> None:
    await send(ledger, register("a"), register("b"))
    views = [ledger.history.view(number) for number in range(3)]
    assert [view.nonce(ADMIN.address) for view in views] == [0, 1, 2]
    assert [ask_model(view, "a")[0] for view in views] == [0, 3, 3]
    assert [ask_model(view, "b")[0] for view in views] == [0, 0, 3]


async def test_accounts_and_code(ledger: Ledger) -> None:
    view = ledger.history.view(0)
    assert view.balance(ADMIN.address) == 0
    assert view.code(address(1)) == b""
    code = view.code(MODELS)
    assert keccak(code) == view.proof(MODELS, []).code_hash
    assert view.nonce(address(1)) == 0
    assert view.storage(address(1), 0) == 0


async def test_a_call_leaves_no_trace(ledger: Ledger) -> None:
    view = ledger.history.view(0)
    assert view.call(request(register())) == b""
    assert ask_model(view)[0] == 0
    assert ask_model(ledger.history.view_ahead())[0] == 0


async def test_a_call_that_is_refused_says_why(ledger: Ledger) -> None:
    view = ledger.history.view(0)
    with pytest.raises(Reverted, match=r"^execution reverted: sender is not an admin$") as refusal:
        view.call(request(register(), STRANGER.address))
    assert b"sender is not an admin" in refusal.value.data
    with pytest.raises(Reverted, match=r"^execution reverted$"):
        view.call(CallRequest(ADMIN.address, MODELS, b"\xff\xff\xff\xff", GAS))
    with pytest.raises(BadInput, match="out of gas: the call needs more than its 40000 gas"):
        view.call(request(register(), gas=40_000))
    with pytest.raises(BadInput, match="intrinsic gas too low: the call has 1000 gas and needs"):
        view.call(request(register(), gas=1_000))


async def test_what_has_no_code_returns_nothing_and_precompiles_are_not_run(ledger: Ledger) -> None:
    view = ledger.history.view(0)
    assert view.call(CallRequest(ADMIN.address, address(1), b"\1", GAS)) == b""
    with pytest.raises(BadInput, match="is a precompiled contract"):
        view.call(CallRequest(ADMIN.address, Address((8).to_bytes(20)), bytes(192), GAS))


async def test_a_call_sees_the_time_of_its_block(tmp_path: Path) -> None:
    """A tier that has run out since the head is still held there, and no longer in a block made now."""
    now = [EPOCH + 1000.0]
    with open_ledger(tmp_path / "timed", clock=lambda: now[0]) as ledger:
        await send(ledger, GrantTier(OPERATOR.address, "pro", EPOCH + 2000))
        held = encode_function("Tiers", "held", [OPERATOR.address])
        question = CallRequest(STRANGER.address, ADDRESSES["Tiers"], held, GAS)
        now[0] = EPOCH + 3000.0
        at_head = ledger.history.view(ledger.head.number).call(question)
        ahead = ledger.history.view_ahead().call(question)
    assert decode_result("Tiers", "held", at_head)[0] == "pro"
    assert decode_result("Tiers", "held", ahead)[0] != "pro"


@pytest.mark.parametrize("shards", [1, 40])
async def test_an_estimate_suffices_and_is_not_much_more_than_that(ledger: Ledger, shards: int) -> None:
    call = register(shards=shards)
    estimate = ledger.history.view_ahead().estimate_gas(request(call))
    with pytest.raises(BadInput, match="out of gas"):
        ledger.history.view_ahead().call(request(call, gas=estimate - estimate // 32))
    async with sealing(ledger):
        sent = await ledger.submit(raw_call(ADMIN, 0, call, gas=estimate))
        receipt = await ledger.wait_receipt(sent)
    assert receipt.transaction.reason is None
    assert receipt.transaction.gas_used <= estimate


@pytest.mark.parametrize("needed", [100_000, 103_900, 104_500, 250_000, 3_999_999, 8_000_000])
async def test_an_estimate_of_a_call_that_looks_at_its_gas(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, needed: int
) -> None:
    """It uses 100,000 whatever it has, and fails with less than it wants to see; none of our contracts does so."""
    tried: list[int] = []

    def run(self: View, request: CallRequest, gas: int) -> _Outcome:
        tried.append(gas)
        return _Outcome(b"", None if gas >= needed else Revert(), 100_000)

    monkeypatch.setattr(View, "_run", run)
    estimate = ledger.history.view_ahead().estimate_gas(request(register()))
    assert needed <= estimate <= needed + needed // 32
    assert len(tried) <= 20, "each halves what is left"


async def test_an_estimate_says_why_there_is_none(ledger: Ledger) -> None:
    view = ledger.history.view_ahead()
    with pytest.raises(Reverted, match="sender is not an admin"):
        view.estimate_gas(request(register(), STRANGER.address))
    with pytest.raises(BadInput, match="out of gas"):
        view.estimate_gas(request(register(), gas=50_000))
    with pytest.raises(BadInput, match="none of this ledger's contracts"):
        view.estimate_gas(CallRequest(ADMIN.address, address(1), b"", GAS))


# Proofs, checked by the trie library's own verification against the state root of the header


def prove(root: bytes, key: bytes, nodes: tuple[bytes, ...]) -> bytes:
    return bytes(HexaryTrie.get_from_proof(root, keccak(key), [rlp.decode(node) for node in nodes]))


async def test_an_account_and_its_storage_are_proved_at_every_block(ledger: Ledger) -> None:
    await send(ledger, register("a", core=True), register("b", core=True))
    found = []
    for number in range(3):
        header = ledger.history.header(number)
        proof = ledger.history.view(number).proof(MODELS, CORE_MODEL_SLOTS)
        account = rlp.decode(prove(header.state_root, MODELS, proof.nodes), StateAccount)
        assert (account.nonce, account.balance) == (proof.nonce, proof.balance)
        assert (account.storage_root, account.code_hash) == (proof.storage_root, proof.code_hash)
        for slot in proof.storage:
            value = prove(proof.storage_root, slot.slot.to_bytes(32), slot.nodes) if slot.nodes else b""
            assert slot.value == (int.from_bytes(rlp.decode(value), "big") if value else 0)
            assert slot.value == ledger.history.view(number).storage(MODELS, slot.slot)
        found.append([slot.value for slot in proof.storage])
    assert found[0] != found[1] != found[2], "the core model changed twice"
    assert any(found[2])


async def test_what_is_not_there_is_proved_too(ledger: Ledger) -> None:
    root = ledger.history.header(0).state_root
    proof = ledger.history.view(0).proof(address(7), [0])
    assert prove(root, address(7), proof.nodes) == b""
    assert (proof.nonce, proof.balance, proof.code_hash) == (0, 0, keccak(b""))
    assert proof.storage[0].value == 0
    assert proof.storage[0].nodes == ()
    with_storage = ledger.history.view(0).proof(MODELS, [1 << 200])
    assert prove(with_storage.storage_root, (1 << 200).to_bytes(32), with_storage.storage[0].nodes) == b""


async def test_a_state_that_lacks_a_node_is_reported_as_damage(ledger: Ledger) -> None:
    view = View(ledger._chain.store, CONFIG.network.chain_id, b"\1" * 32, ledger.history.header(0))
    for read in (lambda: view.nonce(ADMIN.address), lambda: view.proof(MODELS, [0]), lambda: ask_model(view)):
        with pytest.raises(Corrupt, match="its state lacks a node"):
            read()
