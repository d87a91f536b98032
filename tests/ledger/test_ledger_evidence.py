"""Evidence among connected nodes: checked against the chain, kept, told to every peer once; what proves nothing is an
offence. The node under test is a follower: nothing here needs the key of an authority."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import rlp
import trio

from contracts.calls import AddAuthority, RemoveAuthority
from contracts.types import EvidenceHash
from ledger import peers, seal
from ledger.block import SealedBlock, child_header, earliest_timestamp
from ledger.consensus import Consensus
from ledger.exchange import decode, encode
from ledger.history import History
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.peers import EVIDENCE_MAX, Outbox
from ledger.resync import LostVotes, note_path
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes, liar, sign
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    DEADLINE_S,
    EPOCH,
    GENESIS,
    OPERATOR,
    STRANGER,
    address,
    enrol,
    import_block,
    open_chain,
    open_ledger,
    raw_call,
)

NO_REASON = EvidenceHash(bytes(32))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The authorities are A, then A and B, then, after a block that changes none, B."""
    a_and_b = [AUTHORITY, OPERATOR]
    calls = (
        (AddAuthority(OPERATOR.address), [AUTHORITY]),
        (enrol(address(1)), a_and_b),
        (RemoveAuthority(AUTHORITY.address, NO_REASON), a_and_b),
    )
    made = []
    with open_chain(tmp_path_factory.mktemp("chain") / "ledger") as chain:
        for nonce, (call, keys) in enumerate(calls):
            raw = raw_call(ADMIN, nonce, call)
            executed, _ = chain.propose(
                keys[0], [chain.decode(raw)], earliest_timestamp(chain.tip.header, chain.config)
            )
            certificate = seal.certify(chain.tip.epoch, executed.header, keys)
            made.append(SealedBlock(rlp.encode(executed.header), (raw,), certificate).encode())
            import_block(chain, made[-1])
    return made


def hash_of(block: bytes) -> bytes:
    return bytes(msgspec.msgpack.decode(block, type=SealedBlock).header().hash)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_ledger(tmp_path / "ledger") as ledger:
        yield ledger


@asynccontextmanager
async def running(consensus: Consensus) -> AsyncIterator[None]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(consensus.run)
            yield
            nursery.cancel_scope.cancel()


def vote(key: Key, epoch: bytes, kind: Kind, block_hash: bytes, iteration: int = 1) -> Votes:
    return Votes(kind, iteration, block_hash, (sign(key, epoch, kind, iteration, block_hash),))


def two_blocks(key: Key, epoch: bytes, iteration: int = 1) -> Evidence:
    """A key notarised two blocks of an iteration."""
    first, second = (vote(key, epoch, Kind.NOTARISE, mark * 32, iteration) for mark in (b"\x21", b"\x22"))
    return Evidence(epoch, first, second)


def two_headers(key: Key, epoch: bytes) -> Evidence:
    """A key proposed two blocks in an iteration."""
    unsealed = [
        child_header(GENESIS.header, EPOCH + at, key.address, seal.unsealed_extra_data(epoch, 1)) for at in (5, 6)
    ]
    return Evidence(epoch, *(rlp.encode(seal.seal(header, key)) for header in unsealed))


async def told(outbox: Outbox) -> list[Evidence]:
    """The evidence in the next batch a peer is sent."""
    messages = [decode(data).message for data in await outbox.take(1 << 20, 100)]
    assert all(isinstance(message, Evidence) for message in messages), "a follower says nothing else"
    return messages  # type: ignore[return-value]


async def left(outbox: Outbox) -> list[Evidence]:
    """What a peer is to be sent at this moment."""
    with trio.move_on_after(0):
        return await told(outbox)
    return []


@pytest.mark.parametrize("make", [two_blocks, two_headers])
async def test_a_follower_keeps_it_and_tells_all_but_who_told_it(
    ledger: Ledger, make: Callable[[Key, bytes], Evidence]
) -> None:
    evidence = make(AUTHORITY, GENESIS.hash)
    consensus = Consensus(ledger, None)
    one, two, three = (consensus.attach(name) for name in ("one", "two", "three"))
    async with running(consensus):
        consensus.receive("one", encode(b"\x77" * 32, evidence))
        assert await told(two) == await told(three) == [evidence]
        assert ledger.evidence == {AUTHORITY.address: evidence}
        late = consensus.attach("late")
        assert await told(late) == [evidence], "whoever connects later"
        consensus.receive("two", encode(GENESIS.hash, two_blocks(AUTHORITY, GENESIS.hash, iteration=9)))
        consensus.detach("late")
        assert await told(consensus.attach("late")) == [evidence], "the first proof stays"
        assert [await left(outbox) for outbox in (one, two, three)] == [[], [], []], "to each it is told once"
    assert not consensus.statistics().messages_dropped


async def test_it_is_there_after_a_restart(tmp_path: Path) -> None:
    evidence = two_blocks(AUTHORITY, GENESIS.hash)
    with open_ledger(tmp_path / "ledger") as ledger:
        await ledger.keep_evidence(AUTHORITY.address, evidence)
        await ledger.keep_evidence(AUTHORITY.address, two_headers(AUTHORITY, GENESIS.hash))
    with open_ledger(tmp_path / "ledger") as ledger:
        assert ledger.evidence == {AUTHORITY.address: evidence}
        consensus = Consensus(ledger, None)
        async with running(consensus):
            assert await told(consensus.attach("one")) == [evidence]


async def test_of_every_epoch_that_the_liar_was_an_authority_of(ledger: Ledger, blocks: list[bytes]) -> None:
    for block in blocks:
        await ledger.import_blocks([block])
    first, second, third = GENESIS.hash, hash_of(blocks[0]), hash_of(blocks[2])
    assert ledger.tip.epoch == third
    a, b = AUTHORITY.address, OPERATOR.address
    found = [ledger.history.authorities_of(epoch) for epoch in (first, second, third)]
    assert found == [{a}, {a, b}, {b}]
    assert ledger.history.authorities_of(hash_of(blocks[1])) == frozenset(), "no epoch began with that block"
    assert ledger.history.authorities_of(b"\x77" * 32) is None
    consensus = Consensus(ledger, None)
    sender, other = consensus.attach("sender"), consensus.attach("other")
    async with running(consensus):
        for evidence in (two_blocks(AUTHORITY, second), two_blocks(OPERATOR, third)):
            consensus.receive("sender", encode(third, evidence))
            assert await told(other) == [evidence]
    assert ledger.evidence.keys() == {a, b}
    assert await left(sender) == []


async def test_an_epoch_begins_when_its_block_is_the_head(tmp_path: Path, blocks: list[bytes]) -> None:
    with open_chain(tmp_path / "ledger") as chain:
        history = History(chain, lambda: EPOCH)
        tip = chain.write(*chain.execute_sealed(deque([blocks[0]]), EPOCH + 1_000_000))
        assert history.authorities_of(hash_of(blocks[0])) is None, "it is on disk, and the head is still genesis"
        chain.tip = tip
        assert history.authorities_of(hash_of(blocks[0])) == {AUTHORITY.address, OPERATOR.address}


async def test_one_whose_own_votes_are_lost_keeps_it_too(ledger: Ledger) -> None:
    note_path(ledger.path).write_bytes(msgspec.json.encode(LostVotes(number=100)))
    evidence = two_blocks(AUTHORITY, GENESIS.hash)
    consensus = Consensus(ledger, AUTHORITY)
    consensus.attach("sender")
    async with running(consensus):
        consensus.receive("sender", encode(GENESIS.hash, evidence))
        other = consensus.attach("other")
        while not isinstance(message := decode((await other.take(1 << 20, 1))[0]).message, Evidence):
            pass
    assert message == evidence


HONEST = Evidence(
    GENESIS.hash,
    vote(AUTHORITY, GENESIS.hash, Kind.NOTARISE, b"\x21" * 32),
    vote(AUTHORITY, GENESIS.hash, Kind.DUMMY, NO_BLOCK),
)


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (HONEST, "an honest authority may say both"),
        (two_blocks(STRANGER, GENESIS.hash), "no authority of the epoch"),
        (Evidence(GENESIS.hash, b"", b""), "header"),
        (msgspec.structs.replace(two_blocks(AUTHORITY, GENESIS.hash), epoch=b"\x77" * 32), "signed one statement"),
    ],
)
async def test_what_proves_nothing_is_an_offence(ledger: Ledger, evidence: Evidence, reason: str) -> None:
    blamed: list[tuple[str, str]] = []
    send, receive = trio.open_memory_channel[None](1)
    consensus = Consensus(ledger, None, on_offence=lambda *words: (blamed.append(words), send.send_nowait(None))[1])
    other = consensus.attach("other")
    consensus.attach("sender")
    async with running(consensus):
        consensus.receive("sender", encode(GENESIS.hash, evidence))
        await receive.receive()
    assert [name for name, _ in blamed] == ["sender"]
    assert reason in blamed[0][1]
    assert not ledger.evidence
    assert await left(other) == []


async def test_what_is_of_an_epoch_to_come_waits_for_it(ledger: Ledger, blocks: list[bytes]) -> None:
    blamed: list[tuple[str, str]] = []
    consensus = Consensus(ledger, None, on_offence=lambda *words: blamed.append(words))
    other = consensus.attach("other")
    consensus.attach("sender")
    early, known = two_blocks(OPERATOR, hash_of(blocks[0])), two_blocks(AUTHORITY, GENESIS.hash)
    async with running(consensus):
        consensus.receive("sender", encode(GENESIS.hash, early))
        consensus.receive("sender", encode(GENESIS.hash, known))
        assert await told(other) == [known]
        assert ledger.evidence.keys() == {AUTHORITY.address}
        await ledger.import_blocks([blocks[0]])
        assert await told(other) == [early]
    assert ledger.evidence.keys() == {AUTHORITY.address, OPERATOR.address}
    assert not blamed


async def test_one_peer_sends_so_much_and_no_more(ledger: Ledger) -> None:
    consensus = Consensus(ledger, None)
    flooded, other = consensus.attach("flooding"), consensus.attach("other")
    unknown = [encode(GENESIS.hash, two_blocks(STRANGER, bytes([n]) * 32)) for n in range(1, EVIDENCE_MAX + 1)]
    evidence = encode(GENESIS.hash, two_blocks(AUTHORITY, GENESIS.hash))
    async with running(consensus):
        for data in (*unknown, evidence):
            consensus.receive("flooding", data)
        assert consensus.statistics().messages_dropped == 1
        consensus.receive("other", evidence)
        assert [liar(found) for found in await told(flooded)] == [AUTHORITY.address], "others are heard all the same"
    assert await left(other) == []


async def test_a_full_outbox_gets_it_when_there_is_room(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = two_blocks(AUTHORITY, GENESIS.hash)
    consensus = Consensus(ledger, None)
    slow, _, other = (consensus.attach(name) for name in ("slow", "sender", "other"))
    monkeypatch.setattr(peers, "OUTBOX_MAX", 1)
    slow.put(encode(GENESIS.hash, HONEST))
    async with running(consensus):
        consensus.receive("sender", encode(GENESIS.hash, evidence))
        assert await told(other) == [evidence]
        assert await told(slow) == [HONEST]
        consensus.attach("another")
        assert await told(slow) == [evidence]
