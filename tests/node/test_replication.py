"""What a node should hold, made true: fetching, repairing, announcing, scrubbing, and the passes beside each other."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from contracts import events
from contracts.calls import AnnounceShards, WithdrawShards
from contracts.errors import Busy, Conflict, NoSpace, NotAllowed, NotFound
from node import scrubbing
from node.network.addresses import parse_data
from node.network.fetching.progress import FetchProgress
from node.network.sources import GatewaySource, MirrorSource, PeerSource
from node.replication import RETRY_S, peer_sources
from node.storage import proving
from tests.node.cluster import flip
from tests.node.fakes import DATA_ENDPOINT, OURS, THEIRS, Surroundings, surroundings


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    return surroundings(tmp_path)


async def until(around: Surroundings, holds: Callable[[], bool]) -> None:
    """Let the other tasks run until it holds; the store moves in threads, so the clock is of no use here."""
    with trio.fail_after(20):
        while not holds():
            await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


async def test_a_pass_fetches_the_share_and_announces_it_once(around: Surroundings) -> None:
    assert await around.replication.fetch_share() == ()
    assert around.held() == {0, 1, 2, 3}
    assert await around.replication.announce_all() == ()
    assert await around.replication.announce_all() == ()
    assert around.wallet.sent == [AnnounceShards(OURS, "m", "1", (0, 1, 2, 3))]
    statistics = around.replication.statistics()
    assert (statistics.shards_wanted, statistics.shards_held, statistics.failures) == (4, 4, ())


async def test_a_gateway_wants_nothing_unasked(tmp_path: Path) -> None:
    around = surroundings(tmp_path, role="gateway")
    assert await around.replication.fetch_share() == ()
    assert around.held() == set()
    await around.replication.hold_all(around.model, FetchProgress())
    assert around.held() == {0, 1, 2, 3}


async def test_a_shard_that_cannot_be_had_does_not_hold_up_the_others(around: Surroundings) -> None:
    first, second = around.model.shard_hashes[:2]
    around.fetcher.unavailable = {first: Busy("its sources are gone"), second: Busy("gone too")}
    (failure,) = await around.replication.fetch_share()
    assert "its sources are gone (and 1 more of its shards)" in failure
    assert around.held() == {2, 3}
    around.fetcher.unavailable.clear()
    assert await around.replication.fetch_share() == ()
    assert around.held() == {0, 1, 2, 3}


async def test_without_space_nothing_more_is_tried(around: Surroundings) -> None:
    around.fetcher.unavailable = {around.model.shard_hashes[0]: NoSpace("needs 4 GB, has 1 GB")}
    (failure,) = await around.replication.fetch_share()
    assert "needs 4 GB" in failure
    assert around.held() == set()


async def test_progress_counts_every_byte_once(around: Surroundings) -> None:
    progress = FetchProgress()
    around.fetcher.unavailable = {around.model.shard_hashes[1]: Busy("gone")}
    with pytest.raises(Busy):
        await around.replication.hold_all(around.model, progress)
    assert progress.bytes_done == around.model.total_size - around.model.size_of_shard(1)
    around.fetcher.unavailable.clear()
    await around.replication.hold_all(around.model, progress)
    assert progress.bytes_done == progress.bytes_total == around.model.total_size


async def test_a_damaged_shard_is_repaired_and_its_announcement_stands(around: Surroundings) -> None:
    await around.replication.fetch_share()
    await around.replication.announce_all()
    flip(around.path(1), 5)
    around.fetcher.pieces = 0
    around.replication.scrubbing.note_damage(around.model.shard_hashes[1])
    assert await around.replication.fetch_share() == ()
    assert around.fetcher.pieces == 1
    assert await around.replication.announce_all() == ()
    assert len(around.wallet.sent) == 1, "no withdrawal for what is repaired"


async def test_what_is_lost_for_good_is_withdrawn_and_announced_when_it_is_back(around: Surroundings) -> None:
    await around.replication.fetch_share()
    await around.replication.announce_all()
    around.path(2).unlink()
    lost = around.model.shard_hashes[2]
    around.fetcher.unavailable = {lost: Busy("gone")}
    await around.replication.announce_all()
    assert around.announced() == {0, 1, 2, 3}, "before anybody tried to repair it, it stays"
    assert len(await around.replication.fetch_share()) == 1
    await around.replication.announce_all()
    assert around.wallet.sent[-1] == WithdrawShards(OURS, "m", "1", (2,))
    around.fetcher.unavailable.clear()
    await around.replication.fetch_share()
    await around.replication.announce_all()
    assert around.announced() == {0, 1, 2, 3}


async def test_what_was_announced_is_kept_even_outside_of_the_share(tmp_path: Path) -> None:
    around = surroundings(tmp_path, role="gateway")
    await around.replication.hold_all(around.model, FetchProgress())
    await around.replication.announce_all()
    around.path(0).unlink()
    assert await around.replication.fetch_share() == ()
    assert around.held() == {0, 1, 2, 3}


async def test_a_ledger_that_stands_still_does_not_stop_repair(
    around: Surroundings, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    around.wallet.open = False
    passes: list[None] = []
    nursery.start_soon(around.replication.run, lambda: passes.append(None))
    await until(around, lambda: around.held() == {0, 1, 2, 3})
    flip(around.path(3), 7)
    around.replication.scrubbing.note_damage(around.model.shard_hashes[3])
    await until(around, lambda: around.fetcher.fetched.count(around.model.shard_hashes[3]) == 2)
    assert around.wallet.sent == []
    nursery.cancel_scope.cancel()


async def test_a_failure_is_tried_again_after_a_pause(
    around: Surroundings, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    around.fetcher.unavailable = {around.model.shard_hashes[0]: Busy("gone")}
    nursery.start_soon(around.replication.run)
    await until(around, lambda: around.announced() == {1, 2, 3})
    assert "gone" in around.replication.statistics().failures[0]
    around.fetcher.unavailable.clear()
    await trio.sleep(RETRY_S)
    await until(around, lambda: around.announced() == {0, 1, 2, 3})
    assert around.replication.statistics().failures == ()
    nursery.cancel_scope.cancel()


async def test_a_new_model_is_fetched_when_its_block_comes(
    around: Surroundings, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    around.replay.add(events.ShardsWithdrawn(THEIRS, "m", "1", (0, 1, 2, 3)))
    nursery.start_soon(around.replication.run)
    await until(around, lambda: bool(around.replication.statistics().failures))
    around.replay.add(events.ShardsAnnounced(THEIRS, "m", "1", (0, 1, 2, 3)))
    await until(around, lambda: around.announced() == {0, 1, 2, 3})
    nursery.cancel_scope.cancel()


async def test_a_node_that_is_no_member_announces_nothing(around: Surroundings) -> None:
    await around.replication.fetch_share()
    around.replay.add(events.NodeLeft(OURS))
    assert await around.replication.announce_all() == ()
    assert around.wallet.sent == []


async def test_a_refused_announcement_is_a_failure_not_the_end(around: Surroundings) -> None:
    await around.replication.fetch_share()
    around.wallet.failures = [NotAllowed("the operator was expelled")]
    (failure,) = await around.replication.announce_all()
    assert "expelled" in failure


async def test_a_nonce_that_was_taken_meanwhile_is_taken_anew(around: Surroundings) -> None:
    await around.replication.fetch_share()
    around.wallet.failures = [Conflict("nonce 3 is used"), Conflict("nonce 4 is used")]
    assert await around.replication.announce_all() == ()
    around.wallet.failures = [Conflict("used")] * 5
    with pytest.raises(Conflict):
        await around.replication.send(AnnounceShards(OURS, "m", "1", (0,)))


async def test_a_retired_model_is_neither_fetched_nor_announced(around: Surroundings) -> None:
    around.replay.add(events.ModelRetired("m", "1"))
    assert await around.replication.fetch_share() == ()
    assert around.held() == set()
    assert around.wallet.sent == []


async def test_scrub_tells_what_is_bad_and_takes_it_out_of_service(around: Surroundings) -> None:
    await around.replication.fetch_share()
    flip(around.path(1), 1 << 20)
    results = await around.replication.scrubbing.scrub()
    assert [result.bad_pieces for result in results] == [(), (1,), (), ()]
    assert around.held() == {0, 2, 3}
    assert around.replication.statistics().pieces_damaged == 1


async def test_two_scrubs_at_once_of_one_damaged_shard_are_no_failure(around: Surroundings) -> None:
    await around.replication.fetch_share()
    flip(around.path(1), 3)
    results = []

    async def scrub() -> None:
        results.append(await around.replication.scrubbing.scrub())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(scrub)
    assert len(results) == 3
    assert sum(bool(one.bad_pieces) for result in results for one in result) >= 1
    assert around.held() == {0, 2, 3}


async def test_what_was_proved_is_not_hashed_again_unless_the_file_changed(around: Surroundings) -> None:
    await around.replication.fetch_share()
    assert await around.replication.scrubbing.prove(around.model) == [], "fetching proves"
    flip(around.path(2), 9)
    (result,) = await around.replication.scrubbing.prove(around.model)
    assert (result.shard_index, result.bad_pieces) == (2, (0,))


@pytest.fixture
def provers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that hashed."""
    started: list[subprocess.Popen[bytes]] = []
    start = proving._start
    monkeypatch.setattr(proving, "_start", lambda: started.append(start()) or started[-1])
    return started


async def test_shards_are_hashed_by_one_process_that_is_not_the_nodes(
    around: Surroundings, provers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await around.replication.fetch_share()
    monkeypatch.delattr(proving, "sha256")  # in this process
    assert len(await around.replication.scrubbing.scrub()) == 4
    (prover,) = provers
    assert prover.returncode is not None
    around.replication.scrubbing.note_damage(around.model.shard_hashes[1])
    assert await around.replication.scrubbing.scrub_damaged() == []
    assert len(provers) == 2
    assert provers[1].returncode is not None


async def test_hashing_ends_when_nobody_wants_it_any_more(
    around: Surroundings, provers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await around.replication.fetch_share()
    around.replication.scrubbing._proved.clear()
    paced = scrubbing._paced
    with trio.CancelScope() as scope:

        def cancelled_meanwhile(bytes_per_s: float) -> Callable[[int], None]:
            on_bytes = paced(bytes_per_s)
            return lambda count: (trio.from_thread.run_sync(scope.cancel), on_bytes(count))[1]

        monkeypatch.setattr(scrubbing, "_paced", cancelled_meanwhile)
        await around.replication.scrubbing.prove(around.model)
    assert scope.cancelled_caught
    (prover,) = provers
    assert prover.returncode == -signal.SIGKILL
    assert around.replication.scrubbing._proved == {}


async def test_a_prover_that_dies_is_a_failure_and_proves_nothing(
    around: Surroundings, provers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await around.replication.fetch_share()
    around.replication.scrubbing._proved.clear()
    with monkeypatch.context() as patch:
        patch.setattr(scrubbing, "_paced", lambda bytes_per_s: lambda count: provers[-1].kill())
        with pytest.raises(Busy, match="the process that hashes shards ended"):
            await around.replication.scrubbing.prove(around.model)
    assert around.replication.scrubbing._proved == {}
    assert len(await around.replication.scrubbing.prove(around.model)) == 4


async def test_a_truncated_shard_is_found_and_fetched_again(around: Surroundings) -> None:
    await around.replication.fetch_share()
    with around.path(0).open("r+b") as file:
        file.truncate(1000)
    await around.replication.scrubbing.scrub()
    around.fetcher.pieces = 0
    assert await around.replication.fetch_share() == ()
    assert around.held() == {0, 1, 2, 3}
    assert around.fetcher.pieces == 2


async def test_the_periodic_scrub_survives_a_damaged_manifest(
    around: Surroundings,
    nursery: trio.Nursery,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await around.replication.fetch_share()
    manifest = around.store.root / "manifests" / around.model.manifest_hash.hex()
    flip(manifest, 3)
    nursery.start_soon(around.replication.scrubbing.run, 100.0, 0)
    await trio.sleep(150)
    await until(around, lambda: "manifest" in caplog.text)
    flip(manifest, 3)
    flip(around.path(1), 3)
    assert around.held() == {0, 1, 2, 3}
    await trio.sleep(100)
    await until(around, lambda: around.replication.statistics().pieces_damaged == 1)
    assert around.held() == {0, 2, 3}
    nursery.cancel_scope.cancel()


async def test_sources_are_the_other_holders_and_the_models_mirrors(around: Surroundings) -> None:
    around.replay.add(
        events.MirrorAdded("m", "1", "http", "https://example.org/models/"),
        events.MirrorAdded("m", "1", "ipfs", "http://127.0.0.1:8080"),
        events.MirrorAdded("m", "1", "ipfs", "bafy-no-address"),
        events.ShardsAnnounced(OURS, "m", "1", (0,)),
    )
    peer = PeerSource(THEIRS, parse_data(DATA_ENDPOINT))
    mirrors = [MirrorSource("https://example.org/models"), GatewaySource("http://127.0.0.1:8080")]
    assert around.replication.sources(around.model, 0) == [peer, *mirrors]
    around.replay.add(events.ShardsWithdrawn(THEIRS, "m", "1", (0,)))
    assert around.replication.sources(around.model, 0) == mirrors
    around.replay.add(events.NodeLeft(THEIRS))
    assert peer_sources(around.replay.state.members, THEIRS) == []


async def test_nobody_has_it(around: Surroundings) -> None:
    around.replay.add(events.ShardsWithdrawn(THEIRS, "m", "1", (0, 1, 2, 3)))
    with pytest.raises(NotFound, match="nobody has announced a shard of m version 1"):
        await around.replication.hold_all(around.model, FetchProgress())
