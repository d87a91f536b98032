"""The ledger as the node uses it: submitting, sealing, importing, waiting; what survives closing and failing."""

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import plyvel
import pytest
import trio
import trio.testing

from contracts.calls import AddAuthority, ExpelAccount
from contracts.errors import BadInput, BadPeer, Conflict, Corrupt, NoSpace, NotAllowed, NotFound
from contracts.types import TransactionHash
from ledger.consensus import Consensus
from ledger.ledger import Ledger
from ledger.simplex import Ballot
from tests.ledger.test_ledger_store import FailingDb
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    DEADLINE_S,
    EPOCH,
    GENESIS,
    OPERATOR,
    STRANGER,
    address,
    announce,
    enrol,
    join,
    missing_blocks,
    open_ledger,
    raw_call,
    register,
    sealing,
    virtual_clock,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger") as ledger:
        yield ledger


async def final(ledger: Ledger, *raws: bytes) -> None:
    """Submit and wait until all are final."""
    async with sealing(ledger):
        for name in [await ledger.submit(raw) for raw in raws]:
            await ledger.wait_receipt(name)


# Submitting


async def test_submitted_transaction_is_sealed_and_has_a_receipt(ledger: Ledger) -> None:
    raw = raw_call(ADMIN, 0, register())
    name = await ledger.submit(raw)
    assert (ledger.is_pending(name), ledger.receipt(name), ledger.pending()) == (True, None, [raw])
    assert ledger.account(ADMIN.address).next_nonce == 1
    await final(ledger, raw)
    receipt = ledger.receipt(name)
    assert receipt is not None
    assert (receipt.block_number, receipt.block_hash, receipt.index) == (1, ledger.head.hash, 0)
    assert receipt.transaction.reason is None
    assert (ledger.is_pending(name), ledger.pending()) == (False, [])
    assert ledger.statistics().blocks_decided == 1


async def test_submitting_again_changes_nothing(ledger: Ledger) -> None:
    raw = raw_call(ADMIN, 0, register())
    assert await ledger.submit(raw) == await ledger.submit(raw)
    assert ledger.statistics().pool_transactions == 1
    await final(ledger, raw)
    assert await ledger.submit(raw)
    assert ledger.statistics().pool_transactions == 0
    assert not ledger._chain.store.journal()


@pytest.mark.parametrize(
    ("raw", "error", "match"),
    [
        (b"nonsense", BadInput, "not a signed"),
        (raw_call(STRANGER, 0, join()), NotAllowed, "not enrolled"),
        (raw_call(OPERATOR, 1, join()), Conflict, "leaves a gap"),
        (raw_call(OPERATOR, 0, join(), chain_id=1), BadInput, "chain id"),
        (raw_call(OPERATOR, 0, register()), NotAllowed, "sender is not an admin"),
        (raw_call(OPERATOR, 0, join(), gas=60_000), NotAllowed, "OutOfGas"),
    ],
)
async def test_refused_transaction_leaves_nothing(
    ledger: Ledger, raw: bytes, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        await ledger.submit(raw)
    assert not ledger.pending()
    assert not ledger._chain.store.journal()


async def test_used_nonce_is_refused(ledger: Ledger) -> None:
    await final(ledger, raw_call(OPERATOR, 0, join()))
    with pytest.raises(Conflict, match=r"is used: the next of .* is 1"):
        await ledger.submit(raw_call(OPERATOR, 0, join("12D3Kother")))


async def test_many_at_once_all_become_final(ledger: Ledger) -> None:
    """Several submitters, the sealer, and readers of the pool on trio's thread meanwhile."""
    count = 20

    async def submit_all(key: Any, call: Any) -> None:
        for nonce in range(count):
            name = await ledger.submit(raw_call(key, nonce, call(nonce)))
            ledger.pending()
            if nonce == count - 1:
                await ledger.wait_receipt(name)

    async with sealing(ledger), trio.open_nursery() as nursery:
        nursery.start_soon(submit_all, ADMIN, lambda n: enrol(address(n)))
        nursery.start_soon(submit_all, OPERATOR, lambda n: join(f"12D3Kn{n + 1}".replace("0", "z")))
        nursery.start_soon(submit_all, AUTHORITY, lambda n: join(f"12D3Ka{n + 1}".replace("0", "z")))
    records = list(ledger.records(1))
    assert sum(len(record.transactions) for record in records) == 3 * count
    assert all(t.reason is None for record in records for t in record.transactions)
    assert [record.number for record in records] == list(range(1, ledger.head.number + 1))
    assert ledger.statistics().pool_transactions == 0


# The journal


async def test_acknowledged_transactions_survive_closing(tmp_path: Path) -> None:
    raws = [raw_call(OPERATOR, n, join()) for n in range(3)] + [raw_call(ADMIN, 0, register())]
    with open_ledger(tmp_path / "ledger") as ledger:
        for raw in raws:
            await ledger.submit(raw)
    with open_ledger(tmp_path / "ledger") as ledger:
        assert ledger.pending() == raws
        assert ledger.account(OPERATOR.address).next_nonce == 3
        more = raw_call(OPERATOR, 3, join())
        await final(ledger, more)
        assert not ledger._chain.store.journal()
    with open_ledger(tmp_path / "ledger") as ledger:
        assert not ledger.pending()
        assert ledger._chain.nonce(OPERATOR.address) == 4


async def test_journal_loses_what_can_no_longer_enter(tmp_path: Path) -> None:
    """Another node's block used the nonce, or expelled the account."""
    mine, others = raw_call(OPERATOR, 0, join("12D3Kmine")), raw_call(OPERATOR, 0, join("12D3Kother"))
    with open_ledger(tmp_path / "a") as first, open_ledger(tmp_path / "b") as second:
        await final(first, others)
        await second.submit(mine)
        await second.submit(raw_call(OPERATOR, 1, join()))
        (block,) = missing_blocks(first, second)
        await second.import_blocks([block])
        assert [t.nonce for t in map(second.decode, second.pending())] == [1]
        await final(first, raw_call(ADMIN, 0, ExpelAccount(OPERATOR.address)))
        (block,) = missing_blocks(first, second)
        await second.import_blocks([block])
        assert not second.pending()
        assert not second._chain.store.journal()


async def test_damaged_journal_is_reported(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        ledger._chain.store.append_journal(1, b"nonsense")
    with pytest.raises(Corrupt, match="number 1 of its accepted transactions"), open_ledger(tmp_path / "ledger"):
        pass


async def test_transaction_that_lost_its_nonce_is_not_waited_for(tmp_path: Path) -> None:
    mine, others = raw_call(OPERATOR, 0, join("12D3Kmine")), raw_call(OPERATOR, 0, join("12D3Kother"))
    failures: list[Conflict] = []
    with open_ledger(tmp_path / "a") as first, open_ledger(tmp_path / "b") as second:
        await final(first, others)
        name = await second.submit(mine)

        async def wait() -> None:
            with pytest.raises(Conflict, match="can no longer enter") as caught:
                await second.wait_receipt(name)
            failures.append(caught.value)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                await second.import_blocks([missing_blocks(first, second)[0]])
    assert failures


# Importing


async def test_imported_chain_is_the_same(ledger: Ledger, tmp_path: Path) -> None:
    await final(
        ledger, raw_call(ADMIN, 0, register()), raw_call(OPERATOR, 0, join()), raw_call(OPERATOR, 1, announce())
    )
    with open_ledger(tmp_path / "other") as other:
        blocks = missing_blocks(ledger, other)
        for block in (*blocks, blocks[0]):
            await other.import_blocks([block])
        assert other.head == ledger.head
        assert list(other.records(0)) == list(ledger.records(0))
        assert other.statistics().blocks_imported == len(blocks)
        assert missing_blocks(ledger, other) == []


async def test_bad_block_changes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    await final(ledger, raw_call(ADMIN, 0, register()))
    with open_ledger(tmp_path / "other") as other:
        (block,) = missing_blocks(ledger, other)
        with pytest.raises(BadPeer):
            await other.import_blocks([block[:-1] + bytes([block[-1] ^ 1])])
        assert other.head.hash == GENESIS.hash
        await other.import_blocks([block])


async def test_blocks_are_served_within_bounds(ledger: Ledger) -> None:
    for nonce in range(4):
        await final(ledger, raw_call(OPERATOR, nonce, join()))
    blocks = ledger.history.sealed_blocks(0, 100, 1 << 30)
    assert len(blocks) == 4, "genesis is never sent"
    assert ledger.history.sealed_blocks(2, 2, 1 << 30) == blocks[1:3]
    assert ledger.history.sealed_blocks(1, 100, 0) == blocks[:1], "one block always goes"
    assert ledger.history.sealed_blocks(1, 100, len(blocks[0]) + len(blocks[1])) == blocks[:2]
    assert ledger.history.sealed_blocks(5, 100, 1 << 30) == []


# Waiting and cancelling


async def test_waiters_wake(ledger: Ledger) -> None:
    woken: list[object] = []

    async def wait(what: Any, *arguments: Any) -> None:
        woken.append(await what(*arguments))

    raw = raw_call(OPERATOR, 0, join())
    name = ledger.decode(raw).hash
    async with sealing(ledger), trio.open_nursery() as nursery:
        nursery.start_soon(wait, ledger.wait_head, 0)
        nursery.start_soon(wait, ledger.wait_pending, 0)
        nursery.start_soon(wait, ledger.wait_receipt, name)
        await trio.testing.wait_all_tasks_blocked()
        assert not woken
        await ledger.submit(raw)
    assert {type(value) for value in woken} == {type(ledger.head), int, type(ledger.receipt(name))}
    assert await ledger.wait_head(0) == ledger.head
    assert await ledger.wait_pending(0) == 1


@asynccontextmanager
async def cancelled_in(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, name: str) -> AsyncIterator[trio.CancelScope]:
    """Cancel the body's scope while a worker thread is inside the store's method `name`, and then let it go on."""
    inside, go_on = threading.Event(), threading.Event()
    original = getattr(ledger._chain.store, name)

    def held(*arguments: Any) -> None:
        inside.set()
        assert go_on.wait(DEADLINE_S)
        original(*arguments)

    with trio.fail_after(DEADLINE_S), monkeypatch.context() as patched:
        patched.setattr(ledger._chain.store, name, held)
        scope = trio.CancelScope()

        async def cancel() -> None:
            await trio.to_thread.run_sync(inside.wait, abandon_on_cancel=True)
            scope.cancel()
            go_on.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel)
            yield scope


async def test_cancelled_submit_is_all_or_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_call(OPERATOR, 0, join())
    async with cancelled_in(ledger, monkeypatch, "append_journal") as scope:
        with scope:
            await ledger.submit(raw)
    assert ledger.pending() == [raw] == [raw for _, raw in ledger._chain.store.journal()]
    await final(ledger, raw_call(OPERATOR, 1, join()))
    assert ledger._chain.nonce(OPERATOR.address) == 2


async def test_cancelled_import_is_all_or_nothing(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await final(ledger, raw_call(ADMIN, 0, register()))
    with open_ledger(tmp_path / "other") as other:
        async with cancelled_in(other, monkeypatch, "commit") as scope:
            with scope:
                await other.import_blocks([missing_blocks(ledger, other)[0]])
        assert other.head == ledger.head
        assert other._chain.store.head() == (1, ledger.head.hash)


async def test_cancelled_sealer_goes_on_where_it_was(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    await ledger.submit(raw_call(OPERATOR, 0, join()))
    async with cancelled_in(ledger, monkeypatch, "commit") as scope:
        with scope:
            await Consensus(ledger, AUTHORITY).run()
    assert (ledger.head.number, ledger.pending()) == (1, [])
    await final(ledger, raw_call(OPERATOR, 1, join()))
    assert ledger.head.number == 2


# Sealing


async def test_head_moves_on_trios_thread_only(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the worker has written and not yet returned, readers still see the old head, whole."""
    await ledger.submit(raw_call(OPERATOR, 0, join()))
    written, go_on = threading.Event(), threading.Event()
    commit = ledger._chain.store.commit

    def held(*arguments: Any) -> None:
        commit(*arguments)
        written.set()
        assert go_on.wait(DEADLINE_S)

    monkeypatch.setattr(ledger._chain.store, "commit", held)
    name = ledger.decode(ledger.pending()[0]).hash
    async with sealing(ledger):
        await trio.to_thread.run_sync(written.wait, abandon_on_cancel=True)
        assert (ledger.head.number, len(ledger.pending()), ledger.receipt(name)) == (0, 1, None)
        assert len(list(ledger.records(0))) == 1
        go_on.set()
        await ledger.wait_head(0)
        assert ledger.receipt(name) is not None


async def test_blocks_are_a_second_apart_and_never_ahead_of_the_clock(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with open_ledger(tmp_path / "ledger", clock=virtual_clock) as ledger:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Consensus(ledger, AUTHORITY).run)
            for nonce in range(3):
                name = await ledger.submit(raw_call(OPERATOR, nonce, join()))
                receipt = await ledger.wait_receipt(name)
                assert receipt.timestamp <= virtual_clock()
            nursery.cancel_scope.cancel()
        assert [record.timestamp - EPOCH for record in ledger.records(1)] == [10, 11, 12]


async def test_sealer_waits_when_the_clock_was_set_back_and_notices_when_it_is_right_again(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    behind = [3600.0]
    with open_ledger(tmp_path / "ledger", clock=lambda: virtual_clock() - behind[0]) as ledger:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Consensus(ledger, AUTHORITY).run)
            await ledger.submit(raw_call(OPERATOR, 0, join()))
            await trio.sleep(30)
            assert ledger.head.number == 0
            behind[0] = 0
            await ledger.wait_head(0)
            assert trio.current_time() < 60
            nursery.cancel_scope.cancel()


async def test_who_is_no_authority_makes_no_blocks(ledger: Ledger, autojump_clock: trio.testing.MockClock) -> None:
    await ledger.submit(raw_call(OPERATOR, 0, join()))
    for key in (STRANGER, None):
        with trio.move_on_after(100):
            await Consensus(ledger, key).run()
    assert (ledger.head.number, len(ledger.pending())) == (0, 1)


async def test_votes_of_an_epoch_that_is_over_are_not_journalled(ledger: Ledger) -> None:
    """They would come back after a restart as if they had been said of the next epoch's iterations."""
    epoch = ledger.tip.epoch
    assert await ledger.cast({1: Ballot(timed_out=True)}, epoch)
    assert ledger.ballots == {1: Ballot(timed_out=True)} == ledger._chain.store.ballots()
    await final(ledger, raw_call(ADMIN, 0, AddAuthority(STRANGER.address)))
    assert ledger.tip.epoch == ledger.head.hash != epoch
    assert ledger.ballots == {} == ledger._chain.store.ballots()
    assert not await ledger.cast({2: Ballot(timed_out=True)}, epoch)
    assert ledger.ballots == {} == ledger._chain.store.ballots()


async def test_what_a_node_has_acknowledged_is_taken_though_it_would_fail_by_now(ledger: Ledger) -> None:
    """Refused at the authority, it would stay in the other node's pool, and its account could never send again."""
    await ledger.submit(raw_call(ADMIN, 0, register("one")))
    late = raw_call(OPERATOR, 0, register("one"))
    with pytest.raises(NotAllowed, match="sender is not an admin"):
        await ledger.submit(late)
    await ledger.submit(late, simulate=False)
    async with sealing(ledger):
        with trio.fail_after(DEADLINE_S):
            receipt = await ledger.wait_receipt(ledger.decode(late).hash)
    assert receipt.transaction.reason == "sender is not an admin"
    assert ledger.account(OPERATOR.address).next_nonce == 1


async def test_full_disk_ends_sealing_and_tells_the_node(ledger: Ledger) -> None:
    raw = raw_call(OPERATOR, 0, join())
    await ledger.submit(raw)
    store = ledger._chain.store
    error = plyvel.IOError(b"IO error: x/000003.log: No space left on device")
    store._db, db = FailingDb(store._db, error), store._db
    told: list[NoSpace] = []

    async def watch() -> None:
        with pytest.raises(NoSpace, match="No space left") as caught:
            await ledger.watch_disk()
        told.append(caught.value)

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            with pytest.RaisesGroup(pytest.RaisesExc(NoSpace, match="No space left")):
                await Consensus(ledger, AUTHORITY).run()
        store._db = db
        with pytest.raises(NoSpace, match="No space left"):
            await ledger.submit(raw_call(OPERATOR, 1, join()))
    assert told
    assert (ledger.head.number, ledger.pending()) == (0, [raw])


# Reading


async def test_reading_what_is_not_there(ledger: Ledger) -> None:
    for number in (-1, 1):
        with pytest.raises(NotFound, match="the head is 0"):
            ledger.record(number)
    with pytest.raises(NotFound, match="no final block"):
        ledger.number_of(b"\1" * 32)
    assert ledger.receipt(TransactionHash(b"\1" * 32)) is None


async def test_reading_blocks(ledger: Ledger) -> None:
    await final(ledger, raw_call(ADMIN, 0, register()))
    assert ledger.history.header(1).hash == ledger.head.hash == ledger.record(1).hash
    assert (ledger.number_of(ledger.head.hash), ledger.number_of(GENESIS.hash)) == (1, 0)
    assert ledger.history.signers(1) == (AUTHORITY.address,)
    assert ledger.history.signers(0) == ()
    assert (ledger.chain_id, ledger.genesis_hash) == (19944, GENESIS.hash)


async def test_accounts(ledger: Ledger) -> None:
    admin, authority, operator, stranger = (ledger.account(k.address) for k in (ADMIN, AUTHORITY, OPERATOR, STRANGER))
    assert (admin.admin, admin.authority, admin.enrolled) == (True, False, True)
    assert (authority.admin, authority.authority, authority.enrolled) == (False, True, True)
    assert (operator.admin, operator.authority, operator.enrolled) == (False, False, True)
    assert (stranger.admin, stranger.authority, stranger.enrolled, stranger.next_nonce) == (False, False, False, 0)
    assert ledger.admins == {ADMIN.address}
