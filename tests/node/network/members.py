"""Nodes' control planes over the stand-ins of `fakes`, on real libp2p hosts on loopback; and strangers to them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from contracts.types import NodeId
from node.network import session
from node.network.addresses import ControlAddress, control_address
from node.network.control import ControlPlane
from node.network.host import Host, open_host
from node.network.identity import NodeIdentity
from node.network.messages import (
    REQUEST_BYTES_MAX,
    Blocks,
    GetBlocks,
    Hello,
    Submitted,
    SubmitTransactions,
    Welcome,
    decode_request,
    encode,
)
from node.network.session import SyncLimits
from node.network.statistics import GossipStatistics
from tests.node.network.fakes import FakeConsensus, FakeLedger, FakeState

DEADLINE_S = 30.0
FAST = SyncLimits(long_poll_s=1.0, answer_s_max=3.0, redial_s_max=0.1)


class Member:
    """A node's identity, ledger and control plane."""

    def __init__(self, ledger: FakeLedger, *bootstrap: ControlAddress, port: int = 0, **more: object) -> None:
        self.identity: NodeIdentity = more.pop("identity", None) or NodeIdentity.generate()  # type: ignore[assignment]
        self.ledger = ledger
        more.setdefault("limits", FAST)
        self.consensus, self.state = FakeConsensus(), FakeState()
        self.control = ControlPlane(
            self.identity,
            ledger,
            self.consensus,
            self.state,
            listen_host="127.0.0.1",
            listen_port=port,
            bootstrap=bootstrap,
            **more,  # type: ignore[arg-type]
        )
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()

    @property
    def node_id(self) -> NodeId:
        return self.identity.node_id

    @property
    def address(self) -> ControlAddress:
        return control_address(self.node_id, "127.0.0.1", self.control.port)

    def peers(self) -> list[NodeId]:
        return [peer.node_id for peer in self.control.statistics().peers]

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        with self.scope:
            await self.control.run(task_status=task_status)
        self.stopped.set()


Answering = Callable[[NodeId, bytes], Awaitable[bytes]]


@asynccontextmanager
async def stranger(serve: Answering, identity: NodeIdentity | None = None) -> AsyncIterator[Host]:
    """A libp2p host of whoever likes to do something else than a node does."""
    async with open_host(
        identity or NodeIdentity.generate(), "127.0.0.1", 0, serve=serve, request_bytes_max=REQUEST_BYTES_MAX
    ) as host:
        yield host


async def polite(_node_id: NodeId, frame: bytes) -> bytes:
    """Answers as a node of this network without blocks."""
    match decode_request(frame):
        case Hello():
            return encode(Welcome(0, None))
        case GetBlocks() as request:
            await trio.sleep(request.wait_s)
            return encode(Blocks(0, ()))
        case SubmitTransactions() as request:
            return encode(Submitted(tuple("" for _ in request.transactions)))


def host_address(host: Host) -> ControlAddress:
    return control_address(host.node_id, "127.0.0.1", host.port)


class Lost:
    """A mesh that says all hear it, and none does."""

    def __init__(self, *_: object) -> None:
        self.lost = 0

    async def run(self) -> None:
        await trio.sleep_forever()

    def reaches(self, _node_id: NodeId) -> bool:
        return True

    async def tell(self, _data: bytes) -> None:
        self.lost += 1

    def statistics(self) -> GossipStatistics:
        return GossipStatistics(0, self.lost, 0, 0)


def lose_gossip(monkeypatch: pytest.MonkeyPatch, told_s: float) -> None:
    """Nodes made from now on take it that all hear what they tell, within `told_s`."""
    monkeypatch.setattr(Host, "mesh", Lost)
    monkeypatch.setattr(session, "TOLD_S", told_s)


@asynccontextmanager
async def network() -> AsyncIterator[trio.Nursery]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
