"""Final blocks read back: what is told of a block is what its header commits to, and no log is missed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rlp
from eth.db.trie import make_trie_root_and_nodes
from eth.vm.forks.cancun.blocks import CancunBlock
from eth_account import Account
from eth_bloom import BloomFilter

from contracts.addresses import ADDRESSES
from contracts.calls import Call, GrantTier
from contracts.events import decode_log
from contracts.types import Address
from ledger.chain import Chain
from ledger.history import Criteria, FoundLog, History, may_hold
from ledger.keys import Key
from tests.ledger.world import ADMIN, CONFIG, OPERATOR, Builder, address, enrol, join, open_chain, raw_call, register

FAR = 1 << 40


def legacy_call(key: Key, nonce: int, call: Call) -> bytes:
    """The same as raw_call, as a legacy transaction (EIP-155)."""
    signed = Account.sign_transaction(
        {
            "chainId": CONFIG.network.chain_id,
            "nonce": nonce,
            "to": call.to,
            "value": 0,
            "gas": 2_000_000,
            "gasPrice": 0,
            "data": call.encode(),
        },
        key.secret,
    )
    return bytes(signed.raw_transaction)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    """Three blocks: two transactions of both kinds, one that was refused beside one that was not, one of many logs."""
    with open_chain(tmp_path / "ledger") as opened:
        builder = Builder(opened)
        builder.grow(legacy_call(ADMIN, 0, register("a", core=True)), raw_call(OPERATOR, 0, join()))
        builder.grow(raw_call(OPERATOR, 1, register("b")), raw_call(ADMIN, 1, enrol(address(1))))
        builder.grow(
            raw_call(ADMIN, 2, enrol(*(address(number) for number in range(2, 20)))),
            raw_call(ADMIN, 3, GrantTier(address(1), "pro", FAR)),
        )
        yield opened


@pytest.fixture
def history(chain: Chain) -> History:
    return History(chain, lambda: 0)


def everything(history: History) -> list[FoundLog]:
    return [log for logs in history.logs(Criteria(), 0, 4) for log in logs]


def test_receipts_are_what_the_header_commits_to(chain: Chain, history: History) -> None:
    for number in range(1, 4):
        header, receipts, record = history.header(number), history.receipts(number), chain.store.record(number)
        root, _ = make_trie_root_and_nodes([_Encoded(data) for data in chain.store.receipts(number)])
        assert root == header.receipt_root
        assert receipts[-1].gas_used_after == header.gas_used
        for receipt, ended in zip(receipts, record.transactions, strict=True):
            assert receipt.gas_used_after - receipt.gas_used_before == ended.gas_used
            assert receipt.succeeded == (ended.reason is None)
            events = [decode_log(log.address, list(log.topics), log.data) for log in receipt.logs]
            assert tuple(events) == ended.events
        together = 0
        for receipt in receipts:
            together |= int.from_bytes(receipt.bloom, "big")
        assert together == header.bloom


class _Encoded:
    """Bytes where py-evm wants something to encode."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def encode(self) -> bytes:
        return self._data


def test_kinds_and_outcomes(history: History) -> None:
    assert [receipt.type for receipt in history.receipts(1)] == [0, 2]
    # The pool takes accounts in the order of their calls here: the operator's was refused, the admin's was not.
    assert [receipt.succeeded for receipt in history.receipts(2)] == [False, True]


def test_logs_are_counted_over_the_block(history: History) -> None:
    for number in range(1, 4):
        logs = [log for receipt in history.receipts(number) for log in receipt.logs]
        assert [log.index for log in logs] == list(range(len(logs)))
    first, second = history.receipts(1)
    assert {log.transaction_index for log in first.logs} == {0}
    assert {log.transaction_index for log in second.logs} == {1}


def test_size_is_that_of_ethereums_encoding(history: History) -> None:
    for number in range(4):
        block = history.block(number)
        signed = [history.transaction(block, index).signed for index in range(len(block.raw_transactions))]
        assert block.size_bytes == len(rlp.encode(CancunBlock(block.header, signed, (), ()))), number


def test_every_log_is_found_by_what_is_in_it(history: History) -> None:
    logs = everything(history)
    assert len(logs) > 20
    for wanted in logs:
        by_topics = tuple(frozenset({topic}) for topic in wanted.log.topics)
        criteria = Criteria(frozenset({wanted.log.address}), by_topics)
        found = [log for logs in history.logs(criteria, wanted.block_number, wanted.block_number + 1) for log in logs]
        assert wanted in found
        assert all(criteria.match(log.log) for log in found)


def test_conditions(history: History) -> None:
    logs = everything(history)
    models, members = ADDRESSES["Models"], ADDRESSES["Members"]

    def count(criteria: Criteria) -> int:
        return sum(len(found) for found in history.logs(criteria, 0, 4))

    def among(*addresses: Address) -> int:
        return sum(log.log.address in addresses for log in logs)

    assert count(Criteria(frozenset({models}))) == among(models) > 0
    assert count(Criteria(frozenset({models, members}))) == among(models, members)
    name = logs[0].log.topics[0]
    same = sum(log.log.topics[0] == name for log in logs)
    assert count(Criteria(topics=(frozenset({name}),))) == same
    assert count(Criteria(topics=(None,))) == len(logs), "any topic"
    assert count(Criteria(topics=(None,) * 4)) == sum(len(log.log.topics) >= 4 for log in logs), "but there it must be"
    assert count(Criteria(topics=(frozenset({bytes(32)}),))) == 0
    assert count(Criteria(frozenset({address(99)}))) == 0


def test_blocks_without_the_bloom_are_not_looked_at(
    chain: Chain, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    receipts = chain.store.receipts
    monkeypatch.setattr(chain.store, "receipts", lambda number: looked.append(number) or receipts(number))
    criteria = Criteria(frozenset({ADDRESSES["Models"]}))
    assert [len(found) for found in history.logs(criteria, 0, 4)] == [0, 2, 0, 0]
    assert looked == [1]


def test_bits_of_the_bloom_filter() -> None:
    """Three of 2,048, as py-evm sets them when it executes."""
    values = [bytes(20), bytes(32), address(1), b"\xff" * 32]
    for value in values:
        ((bits,),) = Criteria(frozenset({Address(value)})).blooms()
        assert bits == int(BloomFilter.from_iterable([value]))
        assert may_hold(bits, ((bits,),))
        assert not may_hold(bits ^ (bits & -bits), ((bits,),)), "one bit is missing"
    assert may_hold(0, ())


def test_a_transaction_is_read_back(chain: Chain, history: History) -> None:
    block = history.block(2)
    for index, record in enumerate(block.record.transactions):
        transaction = history.transaction(block, index)
        assert transaction.hash == record.hash
        assert transaction.sender == record.sender
        assert history.place_of(transaction.hash) == (2, index)
