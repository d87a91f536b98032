"""The chain comes in from all peers at once, in order, whatever some of them do instead. No sockets; virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from contracts.errors import BadPeer, Busy, Refused
from node.network.messages import BLOCKS_MAX
from node.network.sync import CLAIMS_MAX, LANES, OVERTAKE_S, Sync
from tests.node.network.fakes import NODES, FakeLedger, block, receipts

FAST = 1_000
BLOCKS = 10 * BLOCKS_MAX + 3
ANSWER_S = 0.1
"""How long an honest peer takes to answer."""


class Peer:
    """A source over a ledger of its own; `behave` comes before each answer."""

    def __init__(self, blocks: int = BLOCKS, answer_s: float = ANSWER_S, bytes_max: int = 1 << 20) -> None:
        self.ledger = FakeLedger(blocks)
        self.head_number = blocks
        self.answer_s = answer_s
        self.bytes_max = bytes_max
        self.asked: list[tuple[int, int]] = []
        self.nodes_sent = 0
        self.answering = 0
        self.behave: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def _answer(self) -> None:
        self.answering += 1
        assert self.answering <= LANES
        await trio.sleep(self.answer_s)
        await self.behave()
        self.answering -= 1

    async def fetch_blocks(self, start: int, count: int, with_receipts: bool) -> Sequence[tuple[bytes, bytes]]:
        assert 1 <= count <= BLOCKS_MAX
        assert start + count - 1 <= self.head_number
        self.asked.append((start, count))
        await self._answer()
        history = self.ledger.history
        if with_receipts:
            return history.parcels(start, count, self.bytes_max)
        return [(data, b"") for data in history.sealed_blocks(start, count, self.bytes_max)]

    async def fetch_nodes(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        await self._answer()
        found = self.ledger.history.state_nodes(keys, 1 << 20)
        self.nodes_sent += len(found)
        return found

    async def wait_for_more(self, number: int) -> None:
        with trio.move_on_after(20):
            await self.ledger.wait_head(number)
        self.head_number = self.ledger.head.number


class Joiner:
    """A node that is behind, and how each of its sessions ended."""

    def __init__(self, *peers: Peer, fast: int | None = None, blocks: int = 0) -> None:
        self.ledger = FakeLedger(blocks)
        self.peers = list(peers)
        self.sync = Sync(self.ledger, lambda: self.peers, fast)
        self.ended: dict[Peer, Refused] = {}
        self.most_claims = 0

    async def session(self, peer: Peer) -> None:
        try:
            while peer.head_number > self.ledger.head.number:
                await self.sync.follow(peer)
        except Refused as error:
            self.ended[peer] = error
            self.peers.remove(peer)
            self.sync.stir()

    async def run(self, until: int = BLOCKS) -> float:
        """The seconds until block `until` is here."""
        began = trio.current_time()
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                for peer in list(self.peers):
                    nursery.start_soon(self.session, peer)
                await self.ledger.wait_head(until - 1)
                nursery.cancel_scope.cancel()
        assert self.ledger.blocks == [block(number) for number in range(1, len(self.ledger.blocks) + 1)]
        return trio.current_time() - began


@pytest.fixture(params=[None, FAST], ids=["executing", "joining"])
def fast(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


def asked_in_all(peers: list[Peer]) -> int:
    return sum(count for peer in peers for _, count in peer.asked)


async def test_all_peers_are_used_and_nothing_is_fetched_twice(autojump_clock: MockClock, fast: int | None) -> None:
    peers = [Peer() for _ in range(3)]
    joiner = Joiner(*peers, fast=fast)
    took_s = await joiner.run()
    assert asked_in_all(peers) == BLOCKS
    assert all(len(peer.asked) >= 3 for peer in peers), "each served about a third"
    alone = Joiner(Peer(), fast=fast)
    assert took_s < 0.6 * await alone.run()
    assert joiner.ended == {}
    assert alone.ledger.fast_sync.staged == ([] if fast is None else joiner.ledger.blocks)


async def test_nothing_is_fetched_twice_however_long_executing_takes(autojump_clock: MockClock) -> None:
    """Then it is not the peers that all wait for."""
    peers = [Peer() for _ in range(3)]
    joiner = Joiner(*peers)
    joiner.ledger.import_s = 2 * OVERTAKE_S / BLOCKS_MAX
    await joiner.run()
    assert asked_in_all(peers) == BLOCKS


async def test_answers_may_be_shorter_than_what_was_asked_for(autojump_clock: MockClock, fast: int | None) -> None:
    peers = [Peer(bytes_max=17 * len(block(1))) for _ in range(2)]
    joiner = Joiner(*peers, fast=fast)
    await joiner.run()
    assert sum(len(peer.asked) for peer in peers) >= BLOCKS // 17
    assert joiner.ended == {}


async def test_what_is_held_in_memory_is_bounded(autojump_clock: MockClock, fast: int | None) -> None:
    """One peer keeps all from going on; the others fetch no more than may wait."""
    slow, others = Peer(answer_s=60), [Peer() for _ in range(20)]
    joiner = Joiner(slow, *others, fast=fast)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(joiner.session, slow)
        await wait_all_tasks_blocked()
        for peer in others:
            nursery.start_soon(joiner.session, peer)
        await trio.sleep(OVERTAKE_S / 2)
        assert len(joiner.sync._claims) == CLAIMS_MAX
        assert sum(len(peer.asked) for peer in [slow, *others]) == CLAIMS_MAX
        nursery.cancel_scope.cancel()


async def test_a_peer_that_stalls_costs_seconds(autojump_clock: MockClock, fast: int | None) -> None:
    stalled = Peer(answer_s=10_000)
    joiner = Joiner(stalled, Peer(), Peer(), fast=fast)
    assert await joiner.run() < 4 * OVERTAKE_S
    assert len(stalled.asked) <= LANES


@pytest.mark.parametrize("error", [BadPeer("lies"), Busy("is gone")])
async def test_a_peer_that_fails_ends_its_own_session_only(
    autojump_clock: MockClock, fast: int | None, error: Refused
) -> None:
    async def fail() -> None:
        raise error

    bad, good = Peer(), Peer()
    bad.behave = fail
    joiner = Joiner(bad, good, fast=fast)
    await joiner.run()
    assert joiner.ended == {bad: error}


@pytest.mark.parametrize("blocks", [[b"garbage"], [], [block(1)]], ids=["garbage", "none", "an old one"])
async def test_a_peer_that_sends_other_blocks_is_the_one_that_is_blamed(
    autojump_clock: MockClock, fast: int | None, blocks: list[bytes]
) -> None:
    class Liar(Peer):
        async def fetch_blocks(self, start: int, count: int, with_receipts: bool) -> list[tuple[bytes, bytes]]:
            await super().fetch_blocks(start, count, with_receipts)
            if start < BLOCKS_MAX:
                return [(block(start), receipts(start))]
            if not blocks:
                raise BadPeer("says that it has more")
            return [(data, receipts(1)) for data in blocks]

    bad, good = Liar(), Peer()
    joiner = Joiner(bad, good, fast=fast)
    await joiner.run()
    assert isinstance(joiner.ended.pop(bad), BadPeer)
    assert joiner.ended == {}


async def test_a_chain_that_is_short_is_executed(autojump_clock: MockClock) -> None:
    joiner = Joiner(Peer(FAST - 1), fast=FAST)
    await joiner.run(FAST - 1)
    assert (joiner.ledger.imported, joiner.ledger.fast_sync.staged) == (FAST - 1, [])
    assert joiner.sync.statistics().mode == "idle"


async def test_a_node_that_has_executed_goes_on_so(autojump_clock: MockClock) -> None:
    joiner = Joiner(Peer(), fast=FAST, blocks=1)
    await joiner.run()
    assert (joiner.ledger.imported, joiner.ledger.fast_sync.staged) == (BLOCKS - 1, [])


# The state


async def test_the_state_comes_from_all_peers_and_none_of_it_twice(autojump_clock: MockClock) -> None:
    peers = [Peer() for _ in range(3)]
    joiner = Joiner(*peers, fast=FAST)
    await joiner.run()
    assert sum(peer.nodes_sent for peer in peers) == NODES
    assert min(peer.nodes_sent for peer in peers) > NODES / 6
    assert (joiner.ledger.imported, len(joiner.ledger.fast_sync.staged)) == (0, BLOCKS)


async def test_it_waits_for_the_peer_that_has_the_newest_block(autojump_clock: MockClock) -> None:
    """Others that are behind have not the state after it, and are asked again when they have it."""
    ahead, behind = Peer(), Peer(BLOCKS - 300)
    joiner = Joiner(ahead, behind, fast=FAST)
    await joiner.run()
    assert (ahead.nodes_sent, behind.nodes_sent, joiner.ledger.imported) == (NODES, 0, 0)
    assert joiner.ended == {}


async def test_when_nobody_has_the_state_any_more_a_newer_one_is_taken(autojump_clock: MockClock) -> None:
    """As when all peers joined in the same way, after this one began."""
    peers = [Peer(), Peer()]
    for peer in peers:
        peer.ledger.history.state_start = BLOCKS + 5
    joiner = Joiner(*peers, fast=FAST)

    async def grow() -> None:
        for _ in range(10):
            await trio.sleep(30)
            for peer in peers:
                peer.ledger.grow(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(grow)
        await joiner.run(BLOCKS + 5)
        nursery.cancel_scope.cancel()
    assert joiner.ledger.imported == 0
    assert joiner.ended == {}


async def test_blocks_made_meanwhile_do_not_begin_the_walk_anew(autojump_clock: MockClock) -> None:
    """One peer joined later than this one began: it has blocks, but not the state. The other one has."""
    late, early = Peer(BLOCKS + 50), Peer(answer_s=3)
    late.ledger.history.state_start = 10**9
    joiner = Joiner(late, early, fast=FAST)
    late.head_number = BLOCKS

    async def learn() -> None:
        await trio.sleep(60)
        late.head_number = BLOCKS + 50

    async with trio.open_nursery() as nursery:
        nursery.start_soon(learn)
        await joiner.run(BLOCKS + 50)
        nursery.cancel_scope.cancel()
    assert len(joiner.ledger.fast_sync.staged) == BLOCKS
    assert early.nodes_sent == NODES


async def test_progress_is_told(autojump_clock: MockClock) -> None:
    peer = Peer()
    joiner = Joiner(peer, fast=FAST)
    seen: list[str] = []

    async def look() -> None:
        while True:
            seen.append(str(joiner.sync.statistics()))
            await trio.sleep(ANSWER_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await joiner.run()
        nursery.cancel_scope.cancel()
    assert str(joiner.sync.statistics()) == "block 2,563"
    assert "block 512 of 2,563 (19 %), taking in blocks" in seen
    assert any(s.startswith("block 2,563 of 2,563 (100 %), fetching the state, 1,024 nodes") for s in seen)


# Everything at once


@pytest.mark.parametrize("seed", range(40))
async def test_one_honest_peer_is_enough(seed: int, autojump_clock: MockClock) -> None:
    """Beside peers that stall, fail, come late, know less, answer in bits, or have no state."""
    random = Random(seed)
    honest = Peer(answer_s=random.uniform(0.01, 2))
    peers = [honest]
    for _ in range(random.randrange(6)):
        peer = Peer(random.randint(1, BLOCKS), random.choice([0.01, 1, 60]), random.choice([1, 5_000, 1 << 20]))
        peer.ledger.history.state_start = random.choice([1, 10**9])
        fails_after = random.choice([3, 10, 10**9])

        async def behave(left: list[int] = [fails_after]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise Busy("is gone")

        peer.behave = behave
        peers.append(peer)
    random.shuffle(peers)
    joiner = Joiner(*peers, fast=random.choice([None, 1]))
    await joiner.run()
    assert honest not in joiner.ended
