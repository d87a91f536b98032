"""The chain: good blocks are taken by every other node, tampered ones of every kind refused with nothing written."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import rlp
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.calls import ExpelAccount
from contracts.errors import BadPeer, Busy, Conflict, Corrupt, NotAllowed, Refused
from ledger import block as blocks
from ledger import chain as chains
from ledger import seal
from ledger.block import CLOCK_DRIFT_S_MAX, SealedBlock
from ledger.chain import Chain
from ledger.keys import Key
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    CONFIG,
    EPOCH,
    GENESIS,
    OPERATOR,
    STRANGER,
    Builder,
    address,
    announce,
    decode_sealed,
    enrol,
    import_block,
    join,
    make_config,
    open_chain,
    raw_call,
    register,
)


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with open_chain(tmp_path / "ledger") as chain:
        yield chain


@pytest.fixture
def block(chain: Chain) -> bytes:
    """A good next block: a registration and a failed announcement."""
    return Builder(chain).make(raw_call(ADMIN, 0, register()), raw_call(OPERATOR, 0, announce()))


def contents(chain: Chain) -> dict[bytes, bytes]:
    return dict(chain.store._db.iterator())


def refused(
    chain: Chain, data: bytes, match: str = ".", now: float = EPOCH + 1_000_000, kind: type[Refused] = BadPeer
) -> None:
    """A peer that sent this is bad, and nothing changed."""
    before, tip = contents(chain), chain.tip
    with pytest.raises(kind, match=match):
        import_block(chain, data, now)
    assert contents(chain) == before
    assert chain.tip is tip


def test_empty_folder_begins_with_genesis(chain: Chain) -> None:
    assert (chain.tip.number, chain.tip.hash) == (0, GENESIS.hash)
    assert chain.tip.accounts.admins == {ADMIN.address}
    assert chain.tip.accounts.authorities == {AUTHORITY.address}
    assert chain.tip.accounts.enrolled == {ADMIN.address, AUTHORITY.address, OPERATOR.address}
    assert chain.store.record(0).hash == GENESIS.hash


def test_another_genesis_is_refused(tmp_path: Path) -> None:
    with open_chain(tmp_path / "ledger"):
        pass
    with pytest.raises(Conflict, match="genesis"), open_chain(tmp_path / "ledger", make_config(accounts=())):
        pass


def test_block_is_taken_by_another_node_and_kept(chain: Chain, tmp_path: Path) -> None:
    first = Builder(chain).grow(raw_call(ADMIN, 0, register()), raw_call(OPERATOR, 0, join()))
    second = Builder(chain).grow(raw_call(OPERATOR, 1, announce()))
    with open_chain(tmp_path / "other") as other:
        assert import_block(other, first)
        assert import_block(other, second)
        assert not import_block(other, first), "what is known changes nothing"
        assert other.tip == chain.tip
        assert contents(other) == contents(chain)
    with open_chain(tmp_path / "other") as again:
        assert again.tip == chain.tip
        assert [record.number for record in again.store.records(0, 3)] == [0, 1, 2]


def test_failed_call_is_recorded_with_its_reason(chain: Chain, block: bytes) -> None:
    import_block(chain, block)
    done, failed = chain.store.record(1).transactions
    assert (done.reason, failed.reason) == (None, "unknown node")
    assert len(done.events) == 1
    assert not failed.events
    assert chain.nonce(OPERATOR.address) == 1, "a failed call uses its nonce"


def test_blocks_ahead_ask_for_those_before(chain: Chain, block: bytes, tmp_path: Path) -> None:
    import_block(chain, block)
    ahead = Builder(chain).make(raw_call(OPERATOR, 1, join()))
    with open_chain(tmp_path / "other") as other, pytest.raises(Conflict, match="does not follow on block 0"):
        import_block(other, ahead)


def test_other_block_of_a_known_number(chain: Chain, block: bytes) -> None:
    other = Builder(chain).make(raw_call(OPERATOR, 0, join()))
    import_block(chain, block)
    refused(chain, other, "is final as")


Change = dict[str, Any]


def resealed(data: bytes, change: Change, key: Key = AUTHORITY) -> bytes:
    """The block with other header fields, sealed and certified by `key` as if they were right."""
    block = decode_sealed(data)
    header = block.header().copy(**change)
    header = header.copy(extra_data=change.get("extra_data", header.extra_data)[: seal.UNSEALED_SIZE])
    header = seal.seal(header, key)
    certificate = seal.certify(GENESIS.hash, header, [key])
    return SealedBlock(rlp.encode(header), block.transactions, certificate).encode()


def test_resealing_alone_changes_nothing(chain: Chain, block: bytes) -> None:
    assert resealed(block, {}) == block


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parent_hash": b"\1" * 32}, "parent"),
        ({"uncles_hash": b"\1" * 32}, "header field"),
        ({"coinbase": STRANGER.address}, "header field"),
        ({"state_root": b"\1" * 32}, "executing it"),
        ({"transaction_root": b"\1" * 32}, "executing it"),
        ({"receipt_root": b"\1" * 32}, "executing it"),
        ({"bloom": 1}, "executing it"),
        ({"difficulty": 1}, "header field"),
        ({"gas_limit": 1}, "header field"),
        ({"gas_used": 1}, "executing it"),
        ({"timestamp": EPOCH}, "before"),
        ({"timestamp": 1 << 70}, "above"),
        ({"timestamp": 1 << 2000}, "above"),
        ({"block_number": 1 << 2000}, "above"),
        ({"extra_data": seal.unsealed_extra_data(GENESIS.hash, 0)}, "not after its parent's"),
        ({"extra_data": b"another ledger".ljust(32)}, "extra_data"),
        ({"mix_hash": b"\1" * 32}, "header field"),
        ({"nonce": b"\1" * 8}, "header field"),
        ({"base_fee_per_gas": 1}, "header field"),
        ({"withdrawals_root": b"\1" * 32}, "header field"),
        ({"blob_gas_used": 1}, "header field"),
        ({"excess_blob_gas": 1}, "header field"),
        ({"parent_beacon_block_root": b"\1" * 32}, "header field"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_header_field_even_of_the_authority(chain: Chain, block: bytes, change: Change, match: str) -> None:
    refused(chain, resealed(block, change), match)


def test_every_header_field_is_tried() -> None:
    marks = test_wrong_header_field_even_of_the_authority.pytestmark
    tried = {name for mark in marks for change, _ in mark.args[1] for name in change}
    assert tried == {name for name, _ in CancunBlockHeader._meta.fields}


def test_block_of_a_stranger(chain: Chain, block: bytes) -> None:
    refused(chain, resealed(block, {"coinbase": STRANGER.address}, STRANGER), "sealed by")


def with_list_for_zero(header_rlp: bytes) -> bytes:
    fields = rlp.decode(header_rlp)
    fields[fields.index(b"")] = []
    return rlp.encode(fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {"certificate": msgspec.structs.replace(b.certificate, votes=())},
        lambda b: {"certificate": seal.certify(b"\1" * 32, b.header(), [AUTHORITY])},
        lambda b: {"certificate": seal.certify(GENESIS.hash, b.header(), [STRANGER])},
        lambda b: {"certificate": seal.certify(GENESIS.hash, b.header(), [AUTHORITY, STRANGER])},
        lambda b: {"certificate": msgspec.structs.replace(b.certificate, votes=(b"\xff" * 65,))},
        lambda b: {"transactions": ()},
        lambda b: {"transactions": b.transactions[:1]},
        lambda b: {"transactions": b.transactions[::-1]},
        lambda b: {"transactions": b.transactions * 2},
        lambda b: {"transactions": (*b.transactions, b"")},
        lambda b: {"transactions": (*b.transactions, raw_call(OPERATOR, 5, join()))},
        lambda b: {"transactions": (*b.transactions, raw_call(OPERATOR, 1, join(), chain_id=1))},
        lambda b: {"transactions": (*b.transactions, raw_call(STRANGER, 0, join()))},
        lambda b: {"transactions": (b.transactions[0][:-1] + b"\0", b.transactions[1])},
        lambda b: {"header_rlp": b.header_rlp + b"\0"},
        lambda b: {"header_rlp": b.header_rlp[:-1]},
        lambda b: {"header_rlp": b""},
        lambda b: {"header_rlp": with_list_for_zero(b.header_rlp)},
        lambda b: {"header_rlp": rlp.encode(b"")},
        lambda b: {"header_rlp": rlp.encode([b""] * 20)},
        lambda b: {"header_rlp": bytes(5000)},
    ],
)
def test_wrong_part(chain: Chain, block: bytes, change: Callable[[SealedBlock], Change]) -> None:
    sealed = decode_sealed(block)
    refused(chain, msgspec.structs.replace(sealed, **change(sealed)).encode())


@pytest.mark.parametrize("extra", [raw_call(STRANGER, 0, join()), raw_call(OPERATOR, 9, join())])
def test_transaction_that_may_not_be_there_even_of_the_authority(chain: Chain, block: bytes, extra: bytes) -> None:
    sealed = decode_sealed(block)
    refused(chain, resealed(msgspec.structs.replace(sealed, transactions=(extra,)).encode(), {}))


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\x93", b"\x94\xc4\0\x90\x93\xc4\0\0\x90\0", bytes(blocks.BLOCK_BYTES_MAX + 1)]
)
def test_no_block(chain: Chain, data: bytes) -> None:
    refused(chain, data)


def test_any_altered_byte(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_chain(tmp_path_factory.mktemp("chain") / "ledger") as chain:
        good = Builder(chain).make(raw_call(OPERATOR, 0, join()))
        tip = chain.tip

        @settings(max_examples=150)
        @given(place=st.integers(0, len(good) - 1), change=st.integers(1, 255), cut=st.booleans())
        def altered(place: int, change: int, cut: bool) -> None:
            data = bytearray(good)
            data[place] ^= change
            with pytest.raises((BadPeer, Conflict)):
                import_block(chain, bytes(data[:place] if cut else data))
            assert chain.tip is tip

        altered()
        assert import_block(chain, good)


def test_clock_bound(chain: Chain) -> None:
    now = EPOCH + 100
    late = Builder(chain).make(raw_call(OPERATOR, 0, join()), timestamp=now + CLOCK_DRIFT_S_MAX + 1)
    refused(chain, late, "ahead of our clock", now, Busy)  # our own clock may be the wrong one
    import_block(chain, late, now + 1)


def test_expelled_account_is_out_from_the_next_block_on(chain: Chain) -> None:
    builder = Builder(chain)
    builder.grow(raw_call(ADMIN, 0, ExpelAccount(OPERATOR.address)), raw_call(OPERATOR, 0, join()))
    executed, stuck = chain.propose(AUTHORITY, builder.decode([raw_call(OPERATOR, 1, join())]), EPOCH + 99)
    assert executed.transactions == ()
    assert stuck == {OPERATOR.address}


# Limits of a block made here


def test_share_of_one_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SENDER_TRANSACTIONS_MAX", 2)
    with open_chain(tmp_path / "ledger") as chain:
        builder = Builder(chain)
        waiting = builder.decode([*(raw_call(OPERATOR, n, join()) for n in range(3)), raw_call(ADMIN, 0, register())])
        executed, stuck = chain.propose(AUTHORITY, waiting, EPOCH + 9)
        assert [(t.sender, t.nonce) for t in executed.transactions] == [
            (OPERATOR.address, 0),
            (OPERATOR.address, 1),
            (ADMIN.address, 0),
        ]
        assert not stuck
        monkeypatch.setattr(blocks, "BLOCK_SENDER_TRANSACTIONS_MAX", 3)
        greedy = builder.make(*(raw_call(OPERATOR, n, join()) for n in range(3)))
        monkeypatch.setattr(blocks, "BLOCK_SENDER_TRANSACTIONS_MAX", 2)
        refused(chain, greedy, "in one block")


@pytest.mark.parametrize(("name", "value"), [("BLOCK_TRANSACTIONS_MAX", 2), ("PROPOSED_TRANSACTIONS_BYTES_MAX", 1_000)])
def test_count_and_size(chain: Chain, monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(blocks, name, value)
    raws = [raw_call(OPERATOR, n, join()) for n in range(5)]
    executed, stuck = chain.propose(AUTHORITY, Builder(chain).decode(raws), EPOCH + 9)
    assert executed is not None
    assert 0 < len(executed.transactions) < 5
    assert not stuck


def test_gas(chain: Chain) -> None:
    most = CONFIG.network.gas_limit - 100_000
    raws = [raw_call(OPERATOR, n, join(), gas=most) for n in range(4)]
    executed, _ = chain.propose(AUTHORITY, Builder(chain).decode(raws), EPOCH + 9)
    assert executed is not None
    assert 0 < len(executed.transactions) < 4, "what a transaction may use has to be left, whatever it uses"


def test_limits_hold_for_others_too(chain: Chain, block: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_TRANSACTIONS_MAX", 1)
    refused(chain, block, "2 transactions")
    monkeypatch.setattr(blocks, "BLOCK_BYTES_MAX", 100)
    refused(chain, block, "at most 100")


def test_only_an_authority_proposes(chain: Chain) -> None:
    with pytest.raises(NotAllowed, match="no authority"):
        chain.propose(STRANGER, Builder(chain).decode([raw_call(OPERATOR, 0, join())]), EPOCH + 9)


def test_three_authorities_take_turns_and_two_make_a_block_final(tmp_path: Path) -> None:
    keys = [AUTHORITY, STRANGER, OPERATOR]
    config = make_config(keys)
    with open_chain(tmp_path / "ledger", config) as chain:
        for nonce, key in enumerate(keys * 2):
            waiting = Builder(chain).decode([raw_call(ADMIN, nonce, enrol(address(nonce)))])
            executed, _ = chain.propose(key, waiting, EPOCH + 9 + nonce)
            assert executed is not None
            raws = tuple(t.raw for t in executed.transactions)
            for voters in ([key], keys[:2], keys):
                certificate = seal.certify(chain.genesis_hash, executed.header, voters)
                data = SealedBlock(rlp.encode(executed.header), raws, certificate).encode()
                if len(voters) == 1:
                    refused(chain, data, "make it final")
                elif len(voters) == 2:
                    import_block(chain, data)
            assert chain.tip.hash == executed.header.hash


def test_missing_state_is_damage_of_ours_not_the_peers(chain: Chain, block: bytes) -> None:
    for key, _ in chain.store._db.iterator(prefix=b"s"):
        chain.store._db.delete(key)
    after_a_restart = Chain(chain.store, chain.config, GENESIS)  # the running chain remembers what it read
    with pytest.raises(Corrupt, match="state"):
        import_block(after_a_restart, block)
    with pytest.raises(Corrupt, match="state"):
        after_a_restart.nonce(ADMIN.address)


def test_ancestors_are_read_from_the_newest(chain: Chain, block: bytes) -> None:
    import_block(chain, block)
    assert list(chain._ancestors(chain.tip)) == [chain.tip.hash, GENESIS.hash]
    assert chains.ANCESTORS_MAX == 256
