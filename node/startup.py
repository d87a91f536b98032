"""The start sequence, readable as the sequence it is.

replay the ledger -> join the network -> check core model metadata -> locate its shards -> fetch what is missing
-> verify SHA-256 -> load the core model and pin it -> announce the shards -> ready for inference
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Awaitable, Callable

import trio

from contracts.calls import JoinNode
from contracts.errors import Busy, Conflict, NotFound, Refused
from ledger.keys import Key
from node.assembly import DataDirectory, Parts, assemble, open_ledger
from node.config import Config
from node.network.fetching.progress import FetchProgress
from node.network.identity import NodeIdentity
from node.registry import Model
from node.replication import RETRY_S
from node.rpc.values import StepState
from node.service import STEP_NAMES
from node.storage.files import DirectoryLock

RECURSION_LIMIT = 1000
"""Python's own. Importing py-evm and py_ecc raises it to 100,000, and then a few kilobytes of nested brackets from
outside, handed to any recursive decoder, overflow the C stack and end the process. The contracts call one another
three deep at the most, which needs a fraction of this."""

CONNECT_S = 5.0
"""How long a node waits for its first peer before it goes on alone; a peer that comes later is as welcome."""

CATCH_UP_S = 15.0
"""How long a connected node waits for anything new from its peers before it goes on with the ledger it has."""

LOOK_S = 0.5
"""How often the progress is looked at meanwhile."""

TELL_S = 10.0
"""How often it is logged."""

log = logging.getLogger(__name__)


async def run(directory: DataDirectory, config: Config, operator: Key) -> None:
    """Run the node until cancelled. Raises Refused for what keeps it from starting or going on."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    identity = NodeIdentity.load(directory.identity)
    with DirectoryLock(directory.path), open_ledger(directory) as ledger:
        async with trio.open_nursery() as nursery:
            parts = await assemble(directory, config, operator, identity, ledger, nursery)
            await Sequence(parts, nursery).run()
            await trio.sleep_forever()


class Sequence:
    """One start of a node. What goes on for ever is left running in `nursery`."""

    def __init__(self, parts: Parts, nursery: trio.Nursery) -> None:
        self.config = parts.config
        self.ledger = parts.ledger
        self.replay = parts.replay
        self.control = parts.control
        self.replication = parts.replication
        self.service = parts.service
        self.nursery = nursery
        self._replicating = False
        self._core_is_up = trio.Event()

    async def run(self) -> None:
        """From a replayed ledger to ready for inference."""
        steps = self.service.steps
        with steps.running("replay the ledger", steps.steps["replay the ledger"].detail):
            await self._catch_up()
        with steps.running("join the network"):
            await self._join()
        storage = self.config.storage
        self.nursery.start_soon(self.replication.scrubbing.run, storage.scrub_interval_s, storage.scrub_rate)
        if self.config.node.role == "worker":
            await self._preload_core()
        else:
            await self._hold_share()
        self._replicate()
        steps.status = "ready"
        log.info("ready for inference")

    async def _catch_up(self) -> None:
        """Take the blocks that peers have and we lack; a node without peers goes on with what it has."""
        others = set(self.replay.state.members.members) - {self.service.node_id}
        if self.config.network.bootstrap or others:
            with trio.move_on_after(CONNECT_S) as connecting:
                await self.control.wait_peers()
            if connecting.cancelled_caught or not await self._follow_peers():
                trouble = self.service.peer_trouble() or "no peer answered in time"
                log.warning("going on from block %d: %s", self.ledger.head.number, trouble)
        self.replay.catch_up()
        self.service.steps.note("replay the ledger", f"block {self.replay.number}")

    async def _follow_peers(self) -> bool:
        """Whether the ledger is as far as the connected peers'; False when nothing new came for a while."""
        reached, patience, told_at = (-1, -1), float("inf"), trio.current_time()
        while (now := trio.current_time()) < patience:
            sync = self.control.statistics().sync
            self.service.steps.note("replay the ledger", str(sync))
            if (sync.number, sync.nodes) != reached:
                reached, patience = (sync.number, sync.nodes), now + CATCH_UP_S
            if now >= told_at + TELL_S:
                told_at = now
                log.info("%s", sync)
            with trio.move_on_after(LOOK_S):
                await self.control.wait_caught_up()
                return True
        return False

    async def _join(self) -> None:
        """Be a member with today's role and endpoints, by a signed transaction when the ledger does not say so yet."""
        node_id, operator, steps = self.service.node_id, self.service.operator, self.service.steps
        while not self.ledger.account(operator).enrolled:
            detail = f"waiting for an admin to enrol this node's operator: aigen account enrol 0x{operator.hex()}"
            steps.note("join the network", detail)
            log.warning("%s", detail)
            await self.ledger.wait_head(self.ledger.head.number)
        self.replay.catch_up()
        role, endpoints = self.config.node.role, self.service.endpoints
        while not self._is_member(role, endpoints):
            steps.note("join the network", "waiting for its transaction to enter a block")
            try:
                await self.replication.send(JoinNode(node_id, role, endpoints))
            except (Busy, Conflict) as error:
                steps.set("join the network", "failed", str(error))
                log.warning("joining the network: %s; trying again in %.0f s", error, RETRY_S)
                await self.replication.pause()
        steps.set("join the network", "running", f"{role} {node_id}")
        log.info("member of %s as %s %s", self.ledger.config.network.name, role, node_id)

    def _is_member(self, role: str, endpoints: tuple[str, ...]) -> bool:
        member = self.replay.state.members.members.get(self.service.node_id)
        return member is not None and (member.role, member.endpoints) == (role, endpoints)

    def _replicate(self) -> None:
        """Keep this node's share from now on, beside whatever it does."""
        if not self._replicating:
            self._replicating = True
            self.nursery.start_soon(self.replication.run, self._report_share)

    def _report_share(self) -> None:
        """A ready node's step says how its share stands: what it lacks, and why."""
        steps = self.service.steps
        if steps.status == "ready":
            self._show_share()

    def _show_share(self) -> None:
        now = self.replication.statistics()
        state: StepState = "failed" if now.failures else "done" if now.shards_held == now.shards_wanted else "running"
        short = (f"{now.shards_short} of the network have too few copies",) if now.shards_short else ()
        detail = "; ".join((f"{now.shards_held} of {now.shards_wanted} held", *short, *now.failures))
        self.service.steps.set("fetch missing shards", state, detail)

    async def _insist(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Try until it succeeds; the step that failed shows why, and the node does its other duties meanwhile."""
        last = ""
        while True:
            try:
                return await attempt()
            except Refused as error:
                if str(error) != last:
                    log.warning("%s; trying again every %.0f s", error, RETRY_S)
                last = str(error)
            self._replicate()
            await self.replication.pause()

    # Without a core model

    async def _hold_share(self) -> None:
        """A storage node or gateway has no core model: it holds its share of every model, as far as it can be had."""
        steps, role = self.service.steps, self.config.node.role
        for name in ("check the core model", "locate its shards", "load and pin the core model"):
            steps.set(name, "done", f"not for a {role} node")
        await self._insist(self._verify_held)
        steps.set("fetch missing shards", "running")
        await self.replication.fetch_share()
        self._show_share()
        self._replicate()  # announcing may have to wait for the authority, repairing must not
        await self._insist(self._announce_all)

    async def _verify_held(self) -> None:
        with self.service.steps.running("verify SHA-256"):
            checked = await self.replication.scrubbing.scrub()
            whole = sum(not result.bad_pieces for result in checked)
            self.service.steps.note("verify SHA-256", f"{whole} of the {len(checked)} shards found here are whole")

    async def _announce_all(self) -> None:
        with self.service.steps.running("announce shards"):
            failures = await self.replication.announce_all()
            if failures:
                raise Busy("; ".join(failures))

    # With one

    async def _preload_core(self) -> None:
        """Fetch, verify, load, pin and announce the core model. Without one the node is ready as it is. One that is
        designated later, or instead, is preloaded while the node runs."""
        if self.service.core_model() is None:
            for name in STEP_NAMES[2:]:
                self.service.steps.set(name, "done", "no core model is designated yet")
            self.nursery.start_soon(self._follow_core)
            return
        self.nursery.start_soon(self._follow_core)
        await self._core_is_up.wait()

    async def _follow_core(self) -> None:
        """Whatever model is this node's core model, for as long as it is."""
        while True:
            core = self.service.core_model()
            async with trio.open_nursery() as nursery:
                if core is not None:
                    nursery.start_soon(self._switch_core)
                while self.service.core_model() == core:
                    await self.replay.wait_change(self.replay.number)
                nursery.cancel_scope.cancel()  # nothing is insisted on that was designated before

    async def _switch_core(self) -> None:
        model = await self._core_model()
        await self._insist(lambda: self._bring_up(model))
        self._core_is_up.set()

    async def _core_model(self) -> Model:
        """This node's core model, once it is registered."""
        steps = self.service.steps
        core = self.service.core_model()
        assert core is not None, "a core model is never taken back, only replaced"
        with steps.running("check the core model"):
            while (model := self._registered()) is None:
                detail = f"waiting until an admin registers {core[0]}: aigen model publish {core[0]}"
                if steps.steps["check the core model"].detail != detail:
                    steps.note("check the core model", detail)
                    log.warning("%s", detail)
                self._replicate()
                await self.replay.wait_change(self.replay.number)
            described = f"{model.model_id} version {model.version}, {model.shard_count} shards"
            steps.note("check the core model", described)
        log.info("core model %s", described)
        return model

    def _registered(self) -> Model | None:
        core = self.service.core_model()
        assert core is not None
        try:
            return self.replay.state.registry.find(*core)
        except NotFound:
            return None

    async def _bring_up(self, model: Model) -> None:
        steps, replication = self.service.steps, self.replication
        with steps.running("locate its shards"):
            places = sum(len(replication.sources(model, index)) for index in range(model.shard_count))
            steps.note("locate its shards", f"{places} locations elsewhere")
        with steps.running("verify SHA-256"):
            # What is fetched is proved as it arrives; here it is what lay on the disk before.
            await replication.scrubbing.prove(model)
        with steps.running("fetch missing shards"):
            here = sum(replication.store.held(shard_hash) for shard_hash in model.shard_hashes)
            await replication.hold_all(model, FetchProgress())
            steps.note("fetch missing shards", f"{model.shard_count - here} of {model.shard_count}")
        steps.set("verify SHA-256", "done", f"{model.shard_count} of {model.shard_count} shards are whole")
        with steps.running("load and pin the core model"):
            # One that was pinned before is so no more, and goes when this one or another needs its room.
            self.service.loading.pin_only(model)
            await self.service.loading.wait(model, pin=True)
        log.info("%s is loaded and pinned", model.model_id)
        self._replicate()  # announcing may have to wait for the authority, repairing must not
        with steps.running("announce shards"):
            await replication.announce(model)
