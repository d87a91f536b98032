"""A fast sync ends where executing every block ends, believes nobody, and goes on after a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import rlp
import trio
from eth_hash.auto import keccak

from contracts.calls import GrantTier, RevokeTier
from contracts.errors import BadPeer, Conflict, NotFound
from genesis.block import build
from ledger import audit, proof, prover
from ledger.block import SealedBlock
from ledger.chain import Chain
from ledger.history import History
from ledger.record import NOT_EXECUTED, BlockRecord
from ledger.staging import Parcel, Staging
from ledger.store import Store
from tests.ledger.proofs import KEYS, UNTIL, Network, is_announcement, is_grant
from tests.ledger.world import (
    ADMIN,
    DEADLINE_S,
    EPOCH,
    OPERATOR,
    STRANGER,
    announce,
    decode_sealed,
    enrol,
    make_config,
    open_chain,
    open_ledger,
    quick_clock,
    raw_call,
)

CONFIG = make_config(KEYS[:4])
NOW = EPOCH + 1_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Authorities that change twice, calls that fail, and states that grow and shrink."""
    with open_chain(tmp_path_factory.mktemp("source") / "ledger", CONFIG) as chain:
        network = Network(chain)
        network.live()
        network.grow(announce((0, 7)), announce((1,)), sender=OPERATOR)
        network.add(*KEYS[4:7])
        network.grow(GrantTier(OPERATOR.address, "pro", UNTIL), RevokeTier(STRANGER.address))
        network.remove(*KEYS[:2])
        network.grow(*(enrol(key.address) for key in KEYS))
        network.grow()
        yield chain


def history(chain: Chain) -> History:
    return History(chain, lambda: NOW)


def parcels(chain: Chain, start: int = 1, count: int = 1000) -> list[Parcel]:
    return history(chain).parcels(start, count, 1 << 30)


def fetch_state(staging: Staging, source: Chain, count: int = 5) -> int:
    """How many nodes were asked for."""
    fetched = 0
    while not staging.is_whole:
        asked = staging.wanted(count)
        if asked:
            staging.give(asked, history(source).state_nodes(asked, 1 << 20))
        fetched += len(asked)
    return fetched


def without_reasons(record: BlockRecord) -> BlockRecord:
    replaced = (msgspec.structs.replace(t, reason=t.reason and NOT_EXECUTED) for t in record.transactions)
    return msgspec.structs.replace(record, transactions=tuple(replaced))


def check_same(joined: Path, source: Chain) -> None:
    """What was joined in a folder is what executing gave."""
    with open_chain(joined, CONFIG) as chain:
        assert chain.tip == source.tip
        end = source.tip.number + 1
        assert list(chain.store.records(0, end)) == [without_reasons(r) for r in source.store.records(0, end)]
        for number in range(1, end):
            assert chain.store.sealed_bytes(number) == source.store.sealed_bytes(number)
            assert chain.store.receipts(number) == source.store.receipts(number)
            for transaction in chain.store.record(number).transactions:
                assert chain.store.place_of(transaction.hash) == source.store.place_of(transaction.hash)  # type: ignore[arg-type]
        assert chain.store.staged() is None
    assert audit.verify(joined, CONFIG).head_hash == source.tip.hash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def join(path: Path, source: Chain) -> None:
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(parcels(source), NOW)
        fetch_state(staging, source)
        staging.end((), ())


def test_it_ends_where_executing_ends_and_the_chain_goes_on_there(path: Path, source: Chain) -> None:
    assert any(t.reason for r in source.store.records(1, source.tip.number + 1) for t in r.transactions)
    join(path, source)
    check_same(path, source)
    with open_chain(path, CONFIG) as chain:
        Network(chain).grow(announce((2,)), sender=OPERATOR)
        Network(chain).grow(GrantTier(STRANGER.address, "basic", UNTIL))
    assert audit.verify(path, CONFIG).blocks == source.tip.number + 2


def test_until_the_end_the_head_is_genesis_and_nobody_sees_more(path: Path, source: Chain) -> None:
    with open_ledger(path, CONFIG) as ledger:
        staging = Staging(ledger._chain)
        staging.stage(parcels(source), NOW)
        record = source.store.record(1)
        assert ledger.head.number == 0
        assert ledger.receipt(record.transactions[0].hash) is None  # type: ignore[arg-type]
        assert ledger.history.sealed_blocks(1, 100, 1 << 30) == []
        with pytest.raises(NotFound):
            ledger.number_of(record.hash)
        fetch_state(staging, source)
        assert ledger.head.number == 0
    with open_ledger(path, CONFIG) as ledger:
        assert ledger.head.number == 0


def test_states_that_were_passed_by_are_said_not_to_be_here(path: Path, source: Chain) -> None:
    join(path, source)
    with open_chain(path, CONFIG) as chain:
        kept, newest = history(chain), source.tip.number
        assert kept.view(newest).nonce(ADMIN.address) == source.nonce(ADMIN.address)
        assert kept.view(0).nonce(ADMIN.address) == 0
        with pytest.raises(NotFound, match=f"block {newest - 1} is not here: this node joined at block {newest}"):
            kept.view(newest - 1)


def test_what_joined_proves_to_strangers_and_serves_others(path: Path, source: Chain) -> None:
    """Also what lies before the authorities changed, and after."""
    join(path, source)
    with open_chain(path, CONFIG) as chain, open_chain(path.with_name("third"), CONFIG) as third:
        for shows in (is_announcement, is_grant):
            made = prover.prove(chain.store, chain.tip.number, shows)
            assert proof.check(made.encode(), build(CONFIG), CONFIG.network.chain_id)
        staging = Staging(third)
        staging.stage(parcels(chain), NOW)
        fetch_state(staging, chain)
        staging.end((), ())
    check_same(path.with_name("third"), source)


@pytest.mark.parametrize("after_blocks", [0, 1, 4, 9])
def test_it_goes_on_after_a_crash_among_the_blocks(path: Path, source: Chain, after_blocks: int) -> None:
    with open_chain(path, CONFIG) as chain:
        Staging(chain).stage(parcels(source, 1, after_blocks), NOW)
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        assert staging.tip.number == after_blocks
        staging.stage(parcels(source, max(1, after_blocks - 1)), NOW)  # some of them once more
        fetch_state(staging, source)
        staging.end((), ())
    check_same(path, source)


def test_it_goes_on_after_a_crash_among_the_nodes_and_fetches_none_twice(path: Path, source: Chain) -> None:
    with open_chain(path.with_name("whole"), CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(parcels(source), NOW)
        needed = fetch_state(staging, source)
    fetched = 0
    with open_chain(path, CONFIG) as chain:
        Staging(chain).stage(parcels(source), NOW)
    while fetched < needed - 7:
        with open_chain(path, CONFIG) as chain:
            staging = Staging(chain)
            asked = []
            while not asked:
                asked = staging.wanted(7)
            staging.give(asked, history(source).state_nodes(asked, 1 << 20))
            fetched += len(asked)
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        fetched += fetch_state(staging, source)
        staging.end((), ())
    assert fetched == needed
    check_same(path, source)


def test_blocks_may_come_after_the_walk_has_begun(path: Path, source: Chain) -> None:
    """When no peer has the older state any more."""
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(parcels(source, 1, 5), NOW)
        asked = staging.wanted(3)
        staging.give(asked, history(source).state_nodes(asked, 1 << 20))
        staging.stage(parcels(source, 6), NOW)
        fetch_state(staging, source)
        staging.end((), ())
    check_same(path, source)


@pytest.mark.parametrize("late", ["known", "new"])
def test_blocks_may_come_while_nodes_are_on_their_way(path: Path, source: Chain, late: str) -> None:
    """A peer that was slow sends a range that is here already, or one that nobody else had."""
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(parcels(source, 1, source.tip.number if late == "known" else 5), NOW)
        while len(asked := staging.wanted(3)) < 3:
            staging.give(asked, history(source).state_nodes(asked, 1 << 20))
        seen = staging.nodes_seen
        staging.stage(parcels(source, 1 if late == "known" else 6), NOW)
        staging.give(asked, history(source).state_nodes(asked, 1 << 20))
        assert late == "new" or staging.nodes_seen == seen + 3, "the walk went on"
        fetch_state(staging, source)
        staging.end((), ())
    check_same(path, source)


# What a peer may send instead

Forge = Callable[[SealedBlock, list[bytes]], tuple[SealedBlock, bytes]]


def with_receipts(change: Callable[[list[bytes]], object]) -> Forge:
    return lambda block, receipts: (block, rlp.encode(change(receipts)))


def with_block(change: Callable[[SealedBlock], SealedBlock]) -> Forge:
    return lambda block, receipts: (change(block), rlp.encode(receipts))


def failed_as_well(receipts: list[bytes]) -> list[bytes]:
    """The first receipt with its status turned around."""
    first = rlp.decode(receipts[0][1:])
    return [receipts[0][:1] + rlp.encode([b"" if first[0] else b"\1", *first[1:]]), *receipts[1:]]


def without_a_log(receipts: list[bytes]) -> list[bytes]:
    changed = []
    for receipt in receipts:
        fields = rlp.decode(receipt[1:])
        changed.append(receipt[:1] + rlp.encode([*fields[:3], fields[3][1:]]))
    return changed


FORGED: dict[str, tuple[Forge, str]] = {
    "a status": (with_receipts(failed_as_well), "receipts have another root"),
    "a log left out": (with_receipts(without_a_log), "receipts have another root"),
    "a receipt left out": (with_receipts(lambda receipts: receipts[:-1]), "receipts have another root"),
    "a receipt twice": (with_receipts(lambda receipts: [*receipts, receipts[0]]), "receipts have another root"),
    "lists for receipts": (with_receipts(lambda receipts: [[b"x"]]), "no list of byte strings"),
    "a string for receipts": (lambda block, receipts: (block, rlp.encode(b"x")), "no list of byte strings"),
    "half a list": (lambda block, receipts: (block, rlp.encode(receipts)[:-1]), "receipts are no list"),
    "no receipts": (lambda block, receipts: (block, b""), "receipts are no list"),
    "a transaction left out": (
        with_block(lambda block: msgspec.structs.replace(block, transactions=block.transactions[1:])),
        "transactions have another root",
    ),
    "another's transaction": (
        with_block(
            lambda block: msgspec.structs.replace(
                block, transactions=(raw_call(STRANGER, 0, announce()), *block.transactions[1:])
            )
        ),
        "transactions have another root",
    ),
    "too few votes": (
        with_block(
            lambda block: msgspec.structs.replace(
                block,
                certificate=msgspec.structs.replace(block.certificate, votes=block.certificate.votes[:2]),
            )
        ),
        "2 votes",
    ),
    "another header": (
        with_block(lambda block: msgspec.structs.replace(block, header_rlp=block.header_rlp[:-1])),
        "not a Cancun block header",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_block_is_refused_and_nothing_is_written(path: Path, source: Chain, name: str) -> None:
    forge, reason = FORGED[name]
    number = 4
    good = parcels(source)
    block, receipts = decode_sealed(good[number - 1][0]), source.store.receipts(number)
    forged, receipts_rlp = forge(block, receipts)
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(good[: number - 2], NOW)
        with pytest.raises(BadPeer, match=reason):
            staging.stage([good[number - 2], (forged.encode(), receipts_rlp), *good[number:]], NOW)
        assert chain.store.staged() == (number - 2, source.store.record(number - 2).hash)
        staging.stage(good[number - 2 :], NOW)
        assert staging.tip.hash == source.tip.hash


def test_blocks_out_of_order_and_of_another_chain_are_refused(path: Path, source: Chain) -> None:
    good = parcels(source)
    with open_chain(path, CONFIG) as chain, open_chain(path.with_name("fork"), CONFIG) as fork:
        Network(fork).grow(enrol(STRANGER.address))
        staging = Staging(chain)
        with pytest.raises(Conflict, match="block 2 came after block 0"):
            staging.stage(good[1:], NOW)
        staging.stage(good[:2], NOW)
        with pytest.raises(BadPeer, match="block 1 is final as"):
            staging.stage(parcels(fork), NOW)
        with pytest.raises(Conflict, match="block 5 came after block 3"):
            staging.stage([good[2], good[4]], NOW)
        assert staging.tip.number == 2


@pytest.mark.parametrize("lie", ["none", "garbage", "another", "swapped", "more"])
def test_nodes_nobody_asked_for_are_refused(path: Path, source: Chain, lie: str) -> None:
    with open_chain(path, CONFIG) as chain:
        staging = Staging(chain)
        staging.stage(parcels(source), NOW)
        while len(asked := staging.wanted(3)) < 3:
            staging.give(asked, history(source).state_nodes(asked, 1 << 20))
        nodes = history(source).state_nodes(asked, 1 << 20)
        sent = {
            "none": [b""],
            "garbage": [nodes[0][:-1] + b"\0", *nodes[1:]],
            "another": nodes[1:],
            "swapped": [nodes[1], nodes[0], nodes[2]],
            "more": [*nodes, b"\xc0"],
        }[lie]
        with pytest.raises(BadPeer, match=r"asked for 3 state nodes"):
            staging.give(asked, sent)
        assert all(chain.store.state_node(keccak(node)) is None for node in sent if keccak(node) not in asked)
        staging.give(asked, nodes[:1])  # a short answer: what is left is asked for again
        staging.put_back(asked)
        fetch_state(staging, source)
        staging.end((), ())
    check_same(path, source)


# As the node sees it


async def test_the_ledger_moves_its_head_once_and_forgets_what_is_stale(path: Path, source: Chain) -> None:
    """A transaction waits here that is in the chain already; another one is still to come."""
    with open_ledger(path, CONFIG, quick_clock) as ledger:
        (first, _), *_ = parcels(source)
        old = decode_sealed(first).transactions[0]
        await ledger.submit(old)
        heads: list[int] = []
        fast = ledger.fast_sync
        await fast.open()
        assert (fast.is_possible, fast.number) == (True, 0)
        await fast.stage(parcels(source))
        assert (fast.number, ledger.head.number) == (source.tip.number, 0)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    heads.append((await ledger.wait_head(0)).number)

                nursery.start_soon(watch)
                while fast.is_possible:
                    asked = await fast.wanted(50)
                    if asked:
                        await fast.give(asked, history(source).state_nodes(asked, 1 << 20))
        assert heads == [source.tip.number]
        assert (ledger.tip, ledger.pending(), fast.number) == (source.tip, [], source.tip.number)
        with pytest.raises(Conflict, match=f"the head is block {source.tip.number}"):
            await fast.stage([])
        await ledger.submit(raw_call(ADMIN, source.nonce(ADMIN.address), enrol(STRANGER.address)))
    with open_ledger(path, CONFIG, quick_clock) as ledger:
        assert len(ledger.pending()) == 1
    with Store(path) as store:
        assert [raw for _, raw in store.journal()] != [old]


async def test_a_ledger_that_has_executed_is_not_staged_over(path: Path, source: Chain) -> None:
    with open_ledger(path, CONFIG, quick_clock) as ledger:
        await ledger.fast_sync.open()
        await ledger.fast_sync.stage(parcels(source, 1, 3))
        await ledger.import_blocks([parcels(source)[0][0]])
        assert (ledger.fast_sync.is_possible, ledger.head.number) == (False, 1)
        with pytest.raises(Conflict, match="the head is block 1: blocks are executed from here on"):
            await ledger.fast_sync.stage(parcels(source, 4))
        for block, _ in parcels(source, 2):
            await ledger.import_blocks([block])
        assert ledger.tip == source.tip
        assert ledger.record(4) == source.store.record(4), "the reason is there too"
