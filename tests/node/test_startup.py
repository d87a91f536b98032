"""The start sequence step by step: what it waits for, what it says meanwhile, and what it does when a step fails."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from contracts import events
from contracts.calls import AnnounceShards, JoinNode
from contracts.errors import Busy, NoSpace, NotAllowed
from contracts.types import ShardHash
from node.assembly import Parts
from node.config import Config, NetworkSettings, NodeSettings, Role
from node.network.sync import SyncStatistics
from node.replication import RETRY_S
from node.service import STEP_NAMES
from node.startup import CATCH_UP_S, CONNECT_S, Sequence
from node.storage.manifest import ManifestShard
from node.storage.scrub import scrub_shard
from node.storage.store import ShardStore
from tests.node.fakes import (
    DATA_ENDPOINT,
    OPERATOR,
    OURS,
    THEIRS,
    FakeControl,
    FakeEngine,
    Surroundings,
    service,
    surroundings,
)


class Start:
    """A node about to start, with everything around it in the test's hands."""

    def __init__(self, path: Path, nursery: trio.Nursery, role: Role = "worker", model: str = "") -> None:
        self.around = surroundings(path, role=role)
        self.engine = FakeEngine()
        self.control = FakeControl()
        network = NetworkSettings(bootstrap=("somebody",))
        self.config = Config(node=NodeSettings(role, model), network=network)
        self.service = service(self.around, self.engine, nursery, self.config, self.control)
        self.ledger: Any = self.service.ledger
        parts = Parts(
            self.config,
            self.ledger,
            self.around.replay,  # type: ignore[arg-type]
            self.control,  # type: ignore[arg-type]
            self.around.replication,
            self.service,
        )
        self.sequence = Sequence(parts, nursery)

    def run_on(self) -> None:
        """The sequence, beside the test."""
        self.sequence.nursery.start_soon(self.sequence.run)

    def states(self) -> list[str]:
        return [step.state for step in self.service.steps.steps.values()]

    def detail(self, number: int) -> str:
        return self.service.steps.steps[STEP_NAMES[number]].detail

    async def until(self, holds: Callable[[], bool]) -> None:
        with trio.fail_after(100_000):
            while not holds():  # noqa: ASYNC110 - many things change; the mock clock jumps, so this takes no time
                await trio.sleep(0.1)


Begin = Callable[..., Start]


@pytest.fixture
async def begin(tmp_path: Path) -> AsyncIterator[Begin]:
    """Makes a Start; what it leaves running ends with the test."""
    async with trio.open_nursery() as nursery:
        yield lambda role="worker", model="": Start(tmp_path, nursery, role, model)
        nursery.cancel_scope.cancel()


def sent(around: Surroundings, kind: type) -> list[Any]:
    return [call for call in around.wallet.sent if isinstance(call, kind)]


async def test_a_worker_goes_from_nothing_to_a_pinned_core_model(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    await start.sequence.run()
    assert start.states() == ["done"] * len(STEP_NAMES)
    assert start.service.steps.status == "ready"
    assert start.engine.loaded()[0].pinned
    assert sent(start.around, AnnounceShards) == [AnnounceShards(OURS, "m", "1", (0, 1, 2, 3))]
    assert start.detail(5) == "4 of 4 shards are whole"


async def test_mirrors_are_counted_among_the_places_of_a_core_model_and_are_no_nodes(
    begin: Begin, autojump_clock: MockClock
) -> None:
    start = begin()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    start.around.replay.add(events.MirrorAdded("m", "1", "ipfs", "http://127.0.0.1:8080"))
    await start.sequence.run()
    assert start.detail(3) == "8 locations elsewhere", "a node and a gateway for each of four shards"


async def test_a_storage_node_holds_its_share_and_loads_nothing(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(role="storage")
    await start.sequence.run()
    assert start.service.steps.status == "ready"
    assert start.around.held() == {0, 1, 2, 3}
    assert start.engine.loaded() == ()
    assert start.detail(6) == "not for a storage node"


async def test_it_joins_once_and_again_only_when_something_changed(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(role="storage")
    await start.sequence._join()
    assert sent(start.around, JoinNode) == [], "the ledger says it all already"
    start.around.replay.add(events.NodeJoined(OURS, OPERATOR, "worker", (DATA_ENDPOINT,)))
    original = start.around.wallet.send

    async def send(call: Any) -> Any:
        if isinstance(call, JoinNode):
            start.around.replay.add(events.NodeJoined(OURS, OPERATOR, call.role, tuple(call.endpoints)))
        return await original(call)

    start.around.wallet.send = send  # type: ignore[method-assign]
    start.around.wallet.failures = []
    await start.sequence._join()
    assert [call.role for call in sent(start.around, JoinNode)] == ["storage"]


async def test_an_operator_who_is_not_enrolled_is_waited_for(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(role="storage")
    start.ledger.enrolled = False
    start.run_on()
    await start.until(lambda: "aigen account enrol" in start.detail(1))
    assert f"0x{OPERATOR.hex()}" in start.detail(1)
    start.ledger.enrolled = True
    start.around.replay.add(events.Enrolled(OPERATOR))
    await start.until(lambda: start.service.steps.status == "ready")


async def test_a_contract_that_refuses_the_node_ends_the_start(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(role="storage")
    start.around.replay.add(events.NodeLeft(OURS))
    start.around.wallet.failures = [NotAllowed("the node is another operator's")]
    with pytest.raises(NotAllowed, match="another operator's"):
        await start.sequence.run()
    assert start.states() == ["done", "failed", *["waiting"] * (len(STEP_NAMES) - 2)]
    assert start.detail(1) == "the node is another operator's"
    assert start.service.steps.status == "starting"


async def test_without_peers_it_goes_on(
    begin: Begin, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    start = begin(role="storage")
    start.control.connected = False
    start.control.unreachable = {THEIRS: "wrong genesis"}
    began = trio.current_time()
    await start.sequence.run()
    assert trio.current_time() - began >= CONNECT_S
    assert "wrong genesis" in caplog.text


async def test_while_blocks_come_in_it_waits_and_says_how_far_it_is(
    begin: Begin, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer than it has patience; that only runs out when nothing comes any more."""
    caplog.set_level(logging.INFO)
    start = begin(role="storage")
    start.run_on()
    for number in range(0, 10_000, 500):
        start.control.sync = SyncStatistics("taking in blocks", 0, number, 20_000, 0)
        await trio.sleep(CATCH_UP_S / 2)
        assert start.detail(0) == f"block {number:,} of 20,000 ({number // 200} %), taking in blocks"
    assert "block 9,000 of 20,000 (45 %), taking in blocks" in caplog.text
    await trio.sleep(CATCH_UP_S / 2 - 1)
    assert start.states()[0] == "running"
    await trio.sleep(2)
    assert start.states()[0] == "done"
    assert "going on from block" in caplog.text


async def test_a_model_that_is_not_registered_is_waited_for(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(model="mine")
    start.run_on()
    await start.until(lambda: "aigen model publish mine" in start.detail(2))
    await start.until(lambda: start.around.announced() == {0, 1, 2, 3})
    assert start.service.steps.status == "starting"
    model = start.around.model
    start.around.replay.add(
        events.ModelRegistered(
            *("mine", "1", model.total_size, model.shard_size, model.shard_count, model.shard_hashes),
            *(model.manifest_hash, "basic", False, "", "", OPERATOR),
        ),
        events.ShardsAnnounced(THEIRS, "mine", "1", (0, 1, 2, 3)),
    )
    await start.until(lambda: start.service.steps.status == "ready")
    assert [(spec.key, pin) for spec, pin in start.engine.specs] == [("mine@1", True)]


async def test_a_step_that_fails_says_why_and_is_tried_again(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    start.around.fetcher.unavailable = {start.around.model.shard_hashes[2]: Busy("its holder is down")}
    start.run_on()
    await start.until(lambda: "its holder is down" in start.detail(4))
    assert start.service.steps.status == "starting"
    assert start.service.health().step == "fetch missing shards"
    await start.until(lambda: start.around.announced() == {0, 1, 3})
    start.around.fetcher.unavailable.clear()
    await trio.sleep(RETRY_S)
    await start.until(lambda: start.service.steps.status == "ready")
    await start.until(lambda: start.around.announced() == {0, 1, 2, 3})


async def test_a_load_that_fails_is_tried_again_without_hashing_again(
    begin: Begin, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[ShardHash] = []

    def counted(store: ShardStore, shard: ManifestShard, *how: Any) -> tuple[int, ...]:
        hashed.append(shard.sha256)
        return scrub_shard(store, shard, *how)

    async def never(interval_s: float, bytes_per_s: float) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr("node.scrubbing.scrub_shard", counted)
    start = begin()
    # The clock jumps while threads hash, past the periodic scrub's interval too.
    monkeypatch.setattr(start.around.replication.scrubbing, "run", never)
    around = start.around
    around.replay.add(events.CoreModelSet("m", "1"))
    # Half of it lies on the disk from an earlier start, which proves nothing to this one.
    await around.fetcher.fetch_manifest(around.model.manifest_hash, ())
    for index in (0, 2):
        sources = around.replication.sources(around.model, index)
        await around.fetcher.fetch_shard(around.manifest.shards[index], sources, lambda size: None)
    start.engine.failures = [Busy("no memory")] * 3
    await start.sequence.run()
    assert start.service.steps.status == "ready"
    assert start.engine.failures == []
    assert len(around.fetcher.fetched) == 4
    assert hashed == [around.model.shard_hashes[index] for index in (0, 2)]


async def test_a_core_model_designated_later_is_preloaded(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin()
    await start.sequence.run()
    assert start.service.steps.status == "ready"
    assert start.engine.loaded() == ()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    await start.until(lambda: bool(start.engine.loaded()) and start.engine.loaded()[0].pinned)


def register(start: Start, version: str) -> None:
    """Another version, of the same shards."""
    model = start.around.model
    start.around.replay.add(
        events.ModelRegistered(
            *("m", version, model.total_size, model.shard_size, model.shard_count, model.shard_hashes),
            *(model.manifest_hash, "basic", False, "", "", OPERATOR),
        )
    )


def pinned(start: Start) -> list[str]:
    return [loaded.key for loaded in start.engine.loaded() if loaded.pinned]


async def test_a_core_model_designated_instead_takes_its_place_without_a_restart(
    begin: Begin, autojump_clock: MockClock
) -> None:
    start = begin()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    await start.sequence.run()
    assert pinned(start) == ["m@1"]
    register(start, "2")
    start.around.replay.add(events.CoreModelSet("m", "2"))
    await start.until(lambda: pinned(start) == ["m@2"])
    assert [loaded.key for loaded in start.engine.loaded()] == ["m@1", "m@2"], "the first one goes when it has to"
    assert start.states() == ["done"] * len(STEP_NAMES)


async def test_a_designation_that_cannot_be_followed_is_dropped_for_the_next(
    begin: Begin, autojump_clock: MockClock
) -> None:
    start = begin()
    start.around.replay.add(events.CoreModelSet("m", "1"))
    await start.sequence.run()
    register(start, "2")
    register(start, "3")
    start.engine.failures = [NoSpace("too large")] * 1000
    start.around.replay.add(events.CoreModelSet("m", "2"))
    await start.until(lambda: len(start.engine.failures) < 998)
    assert pinned(start) == []
    start.engine.failures = []
    start.around.replay.add(events.CoreModelSet("m", "3"))
    await start.until(lambda: pinned(start) == ["m@3"])
    await trio.sleep(100)
    assert [loaded.key for loaded in start.engine.loaded()] == ["m@1", "m@3"], "nobody insists on the second any more"


async def test_a_node_with_a_choice_of_its_own_keeps_it(begin: Begin, autojump_clock: MockClock) -> None:
    start = begin(model="m")
    await start.sequence.run()
    assert pinned(start) == ["m@1"]
    start.around.replay.add(events.CoreModelSet("other", "1"))
    await trio.sleep(100)
    assert pinned(start) == ["m@1"]
