"""A node's lease, what it does when another's is over, and giving shards up without leaving too few copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from contracts import events
from contracts.calls import Call, RenewLease, WithdrawShards
from contracts.errors import NotAllowed
from contracts.types import Address, NodeId
from node.leases import GRACE
from node.network.fetching.progress import FetchProgress
from node.registry import Model
from node.replication import RETRY_S
from tests.node.fakes import LEASE_S, OURS, THEIRS, Surroundings, surroundings

OTHERS = [NodeId(f"12D3KooWother{letter}") for letter in "abcdefgh"]
HALF_S = LEASE_S // 2


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    return surroundings(tmp_path)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not holds():
            await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


def joined(node_id: NodeId) -> events.NodeJoined:
    operator = Address(node_id.encode()[-20:].rjust(20, b"\0"))
    return events.NodeJoined(node_id, operator, "storage", (f"aigen+tls://10.0.0.{ord(node_id[-1])}:9946",))


def renewals(around: Surroundings) -> list[RenewLease]:
    return [call for call in around.wallet.sent if isinstance(call, RenewLease)]


# The lease


async def test_it_is_renewed_halfway_with_the_room_there_is(around: Surroundings) -> None:
    await around.replication.announce_all()
    assert renewals(around) == []
    around.replay.add(time=HALF_S)
    await around.replication.announce_all()
    await around.replication.announce_all()
    (renewal,) = renewals(around)
    assert renewal.node_id == OURS
    assert renewal.room == pytest.approx(around.store.room_bytes(), rel=0.1)
    assert around.replay.state.members.members[OURS].seen_at == HALF_S


async def test_one_that_has_not_said_its_room_says_it_at_once(around: Surroundings) -> None:
    around.replay.add(events.NodeLeft(OURS), joined(OURS))
    await around.replication.announce_all()
    assert len(renewals(around)) == 1


async def test_a_disk_that_fills_up_is_told_of_before_it_is_time(
    around: Surroundings, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(around.store, "room_bytes", lambda: 5)
    await around.replication.announce_all()
    await around.replication.announce_all()
    assert renewals(around) == [RenewLease(OURS, 5)]
    monkeypatch.setattr(around.store, "room_bytes", lambda: 1 << 40)
    await around.replication.announce_all()
    assert len(renewals(around)) == 1, "not with every block"
    await trio.sleep(LEASE_S * GRACE)
    await around.replication.announce_all()
    assert renewals(around)[1:] == [RenewLease(OURS, 1 << 40)]


async def test_a_gateway_renews_only_what_it_announced(tmp_path: Path) -> None:
    around = surroundings(tmp_path, role="gateway")
    around.replay.add(time=5 * LEASE_S)
    await around.replication.announce_all()
    assert around.wallet.sent == []
    around.replay.add(events.ShardsAnnounced(OURS, "m", "1", (0,)))
    await around.replication.announce_all()
    assert len(renewals(around)) == 1


async def test_it_is_renewed_though_no_block_comes(
    around: Surroundings, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    around.replication.clock = trio.current_time
    begun = trio.current_time()
    nursery.start_soon(around.replication.run)
    await until(lambda: around.announced() == {0, 1, 2, 3})
    await trio.sleep(HALF_S + 1)
    await until(lambda: len(renewals(around)) == 1)
    assert trio.current_time() - begun < LEASE_S
    nursery.cancel_scope.cancel()


async def test_a_clock_that_is_ahead_of_the_ledgers_renews_no_end_of_times(
    around: Surroundings, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """Whatever it sends, the block's time stays behind what it thinks is due."""
    around.replication.clock = lambda: 10.0 * LEASE_S
    nursery.start_soon(around.replication.run)
    await until(lambda: around.announced() == {0, 1, 2, 3})
    await trio.sleep(LEASE_S - 1)
    assert 1 <= len(renewals(around)) <= 1 / GRACE
    nursery.cancel_scope.cancel()


async def test_a_refused_renewal_is_a_failure_and_no_shard_waits_for_it(around: Surroundings) -> None:
    around.replay.add(time=HALF_S)
    await around.replication.fetch_share()
    around.wallet.failures = [NotAllowed("the operator was expelled")]
    (failure,) = await around.replication.announce_all()
    assert "expelled" in failure
    assert around.announced() == {0, 1, 2, 3}


# When another's is over


async def test_the_copies_of_a_silent_node_are_made_here(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """Six nodes; those that hold a shard fall silent one after the other, until it is this one's turn."""
    around = surroundings(tmp_path, shard_count=12)
    around.replay.add(*map(joined, OTHERS[:4]))
    before = {index for _, index in around.replication.wanted()}
    assert 0 < len(before) < 12
    nursery.start_soon(around.replication.run)
    await until(lambda: around.held() == before)
    alive = [OURS, THEIRS, OTHERS[0]]
    around.replay.add(*(events.LeaseRenewed(node_id, 1 << 40) for node_id in alive), time=LEASE_S + 1)
    await until(lambda: around.replication.statistics().shards_wanted == len(before))
    assert around.held() == before, "three are late, and nobody is gone yet"
    await trio.sleep(LEASE_S * GRACE + RETRY_S)
    await until(lambda: around.held() == set(range(12)))
    assert around.replication.live() == set(alive)
    nursery.cancel_scope.cancel()


async def test_too_few_copies_are_warned_of_once(around: Surroundings, caplog: pytest.LogCaptureFixture) -> None:
    await around.replication.fetch_share()
    await around.replication.fetch_share()
    warnings = [record.message for record in caplog.records if "fewer than 3 copies" in record.message]
    assert warnings == ["4 shards have fewer than 3 copies on nodes that are there"]
    assert around.replication.statistics().shards_short == 4
    around.replay.add(*map(joined, OTHERS[:3]))
    around.replay.add(*(events.ShardsAnnounced(node_id, "m", "1", (0, 1, 2, 3)) for node_id in OTHERS[:3]))
    assert around.replication.statistics().shards_short == 0


# Giving shards up


@pytest.fixture
async def full(around: Surroundings) -> Surroundings:
    """Everything is here and announced; of the others, all but one have everything as well."""
    around.replay.add(*map(joined, OTHERS))
    await around.replication.hold_all(around.model, FetchProgress())
    await around.replication.announce_all()
    around.replay.add(*(events.ShardsAnnounced(node_id, "m", "1", (0, 1, 2, 3)) for node_id in OTHERS[:2]))
    return around


def spare(around: Surroundings) -> set[int]:
    """What this node need not hold."""
    share, hashes = around.replication.share, around.model.shard_hashes
    free = share.spare(around.replay.state, set(hashes), trio.current_time())
    return {index for index in range(4) if hashes[index] in free}


def freed(found: list[tuple[Model, int]]) -> set[int]:
    return {index for _, index in found}


def nothing(model: Model) -> bool:
    return False


async def test_only_what_enough_others_hold_is_given_up(full: Surroundings) -> None:
    free = spare(full)
    assert 0 < len(free) < 4
    assert freed(await full.replication.free(1 << 40, nothing)) == free
    assert full.held() == full.announced() == set(range(4)) - free
    await full.replication.fetch_share()
    await full.replication.announce_all()
    assert full.held() == full.announced() == set(range(4)) - free, "nothing comes back"


async def test_what_was_made_of_shards_goes_with_the_first_of_them(full: Surroundings) -> None:
    made = [full.store.quantised_stem(full.model.manifest_hash).with_suffix(f".{name}") for name in ("int8", "int4")]
    other = made[0].with_name("ab" * 32 + ".int8")
    for path in (*made, other):
        path.write_bytes(b"weights")
    assert await full.replication.free(1, lambda model: True) == []
    assert all(path.exists() for path in made)
    assert await full.replication.free(1, nothing)
    assert [path.exists() for path in (*made, other)] == [False, False, True]


async def test_nothing_is_given_up_that_leaves_two(full: Surroundings) -> None:
    full.replay.add(events.ShardsWithdrawn(OTHERS[0], "m", "1", (0, 1, 2, 3)))
    assert await full.replication.free(1 << 40, nothing) == []
    assert full.held() == full.announced() == {0, 1, 2, 3}


async def test_one_that_only_says_it_has_a_shard_does_not_count(full: Surroundings) -> None:
    full.fetcher.liars = {OTHERS[0]}
    assert await full.replication.free(1 << 40, nothing) == []
    full.replay.add(events.ShardsAnnounced(OTHERS[2], "m", "1", (0, 1, 2, 3)))
    assert await full.replication.free(1 << 40, nothing)


async def test_a_silent_holder_does_not_count(full: Surroundings, autojump_clock: trio.testing.MockClock) -> None:
    alive = (OURS, THEIRS, *OTHERS[1:])
    full.replay.add(*(events.LeaseRenewed(node_id, 1 << 40) for node_id in alive), time=LEASE_S + 1)
    full.replication.live()
    await trio.sleep(LEASE_S * GRACE)
    assert await full.replication.free(1 << 40, nothing) == []


async def test_no_more_is_given_up_than_was_asked_for(full: Surroundings) -> None:
    assert len(await full.replication.free(1, nothing)) == 1


async def test_what_is_in_use_is_kept(full: Surroundings) -> None:
    assert await full.replication.free(1 << 40, lambda model: model.model_id == "m") == []


async def test_of_a_retired_model_everything_may_go(full: Surroundings) -> None:
    full.replay.add(events.ModelRetired("m", "1"))
    assert freed(await full.replication.free(1 << 40, nothing)) == {0, 1, 2, 3}
    assert full.held() == full.announced() == set()


async def test_a_refused_withdrawal_leaves_everything(full: Surroundings) -> None:
    full.wallet.failures = [NotAllowed("the operator was expelled")]
    with pytest.raises(NotAllowed):
        await full.replication.free(1 << 40, nothing)
    assert full.held() == full.announced() == {0, 1, 2, 3}
    await full.replication.announce_all()
    assert full.announced() == {0, 1, 2, 3}


async def test_of_two_that_give_up_the_same_shard_one_keeps_it(
    full: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw three others; the other one's withdrawal comes first on the ledger."""
    send, free = full.wallet.send, spare(full)

    async def second(call: Call) -> object:
        if isinstance(call, WithdrawShards):
            full.replay.add(events.ShardsWithdrawn(OTHERS[0], "m", "1", call.shard_indices))
        return await send(call)

    monkeypatch.setattr(full.wallet, "send", second)
    assert await full.replication.free(1 << 40, nothing) == []
    assert full.held() == {0, 1, 2, 3}
    assert full.announced() == set(range(4)) - free
    await full.replication.announce_all()
    assert full.announced() == {0, 1, 2, 3}, "its copy is needed after all"


async def test_while_it_is_withdrawn_no_pass_announces_it_again(
    full: Surroundings, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    send = full.wallet.send

    async def with_a_pass(call: Call) -> object:
        receipt = await send(call)
        nursery.start_soon(full.replication.announce_all)
        await trio.testing.wait_all_tasks_blocked()
        return receipt

    monkeypatch.setattr(full.wallet, "send", with_a_pass)
    assert await full.replication.free(1 << 40, nothing)
    await trio.testing.wait_all_tasks_blocked()
    assert full.held() == full.announced()
    nursery.cancel_scope.cancel()
