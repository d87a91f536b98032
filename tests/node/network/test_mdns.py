"""Real multicast on loopback: nodes of one network find each other, and nobody else."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256

import pytest
import trio
from zeroconf import Zeroconf

from node.network import mdns as mdns_module
from node.network.addresses import ControlAddress, control_address
from node.network.identity import NodeIdentity
from node.network.mdns import Mdns, announcement, read, service_type

DEADLINE_S = 30.0
LOOPBACK = "127.0.0.1"


@pytest.fixture
def genesis_hash(request: pytest.FixtureRequest) -> bytes:
    """Another network for each test: what one test said may be heard of in the next."""
    return sha256(request.node.nodeid.encode()).digest()


def someone(port: int = 9945) -> ControlAddress:
    return control_address(NodeIdentity.generate().node_id, LOOPBACK, port)


@asynccontextmanager
async def running(*nodes: Mdns) -> AsyncIterator[None]:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                nursery.start_soon(node.run)
            yield
            nursery.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - zeroconf's thread tells nobody
        await trio.sleep(0.02)


async def test_nodes_of_one_network_find_each_other_and_notice_who_goes(genesis_hash: bytes) -> None:
    a, b, c = someone(1001), someone(1002), someone(1003)
    first, second = Mdns(genesis_hash, a, LOOPBACK), Mdns(genesis_hash, b, LOOPBACK)
    stranger = Mdns(sha256(genesis_hash).digest(), c, LOOPBACK)
    async with running(first, stranger):
        async with running(second):
            await until(lambda: first.addresses() and second.addresses())
            assert (first.addresses(), second.addresses()) == ((b,), (a,))
        await until(lambda: not first.addresses())
        assert stranger.addresses() == ()


async def test_what_is_told_wrongly_is_passed_over(genesis_hash: bytes) -> None:
    a, liar, other, honest = someone(), someone(), someone(), someone()
    node = Mdns(genesis_hash, a, LOOPBACK)
    kind = service_type(genesis_hash)
    zeroconf = await trio.to_thread.run_sync(lambda: Zeroconf(interfaces=[LOOPBACK]))
    try:
        lies = {"nobody": b"/ip4/127.0.0.1/tcp/1/p2p/nobody", liar.node_id: str(other).encode(), other.node_id: b"\xff"}
        async with trio.open_nursery() as nursery:
            for name, told in {**lies, honest.node_id: str(honest).encode()}.items():
                info = announcement(kind, name, honest, told)
                nursery.start_soon(trio.to_thread.run_sync, zeroconf.register_service, info)
        async with running(node):
            await until(node.addresses)
            assert node.addresses() == (honest,)
    finally:
        await trio.to_thread.run_sync(zeroconf.close)


def test_only_a_nodes_own_address_is_read() -> None:
    a, b = someone(), someone()
    assert read(str(a).encode(), a.node_id) == a
    for told in (None, b"", b"\xff", str(b).encode(), str(a).encode() + b"/x", b"/ip4/300.0.0.1/tcp/1/p2p/x"):
        assert read(told, a.node_id) is None


async def test_no_more_are_remembered_than_fit(genesis_hash: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdns_module, "FOUND_MAX", 1)
    nodes = [Mdns(genesis_hash, someone(), LOOPBACK) for _ in range(3)]
    async with running(*nodes):
        await until(lambda: all(node.addresses() for node in nodes))
        assert all(len(node.addresses()) == 1 for node in nodes)


async def test_a_machine_without_multicast_goes_on(
    genesis_hash: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This one has it, so that zeroconf's failure is made up."""

    def fail(**options: object) -> None:
        raise OSError("No such device")

    monkeypatch.setattr(mdns_module, "Zeroconf", fail)
    with trio.fail_after(DEADLINE_S):
        await Mdns(genesis_hash, someone(), LOOPBACK).run()
    assert "no mDNS here (No such device)" in caplog.text
