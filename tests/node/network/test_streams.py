"""Streams between two hosts: one request at a time on each, kept for the next, none kept that may be out of step."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.lowlevel

from contracts.errors import BadPeer, Busy
from contracts.types import NodeId
from node.network import streams
from node.network.addresses import control_address
from node.network.host import STREAMS_PER_PEER_MAX, Host, open_host
from node.network.identity import NodeIdentity
from tests.node.network.fakes import until

DEADLINE_S = 30.0
FRAME_MAX = 1_000

Serve = Callable[[NodeId, bytes], Awaitable[bytes]]


async def echo(_node_id: NodeId, frame: bytes) -> bytes:
    return frame


@asynccontextmanager
async def hosts(serve: Serve = echo, frame_s_max: float = 20.0) -> AsyncIterator[tuple[Host, Host]]:
    """One that asks, connected to one that answers."""

    def opened(serve: Serve) -> Any:
        identity = NodeIdentity.generate()
        return open_host(identity, "127.0.0.1", 0, serve=serve, request_bytes_max=FRAME_MAX, frame_s_max=frame_s_max)

    with trio.fail_after(DEADLINE_S):
        async with opened(serve) as answering, opened(echo) as asking:
            await asking.dial(control_address(answering.node_id, "127.0.0.1", answering.port))
            yield asking, answering


def open_streams(asking: Host) -> list[Any]:
    (connection,) = asking._network.connections.values()
    return [stream for each in connection for stream in each.get_streams()]


async def ask(asking: Host, answering: Host, frame: bytes = b"?", answer_s_max: float = DEADLINE_S) -> bytes:
    return await asking.request(answering.node_id, frame, FRAME_MAX, answer_s_max)


async def test_a_hundred_requests_take_one_stream() -> None:
    async with hosts() as (asking, answering):
        for number in range(100):
            assert await ask(asking, answering, str(number).encode()) == str(number).encode()
        assert len(open_streams(asking)) == 1


async def test_requests_at_the_same_time_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one's answer does not come to the quick one; of those that are idle then, only so many are kept."""
    monkeypatch.setattr(streams, "IDLE_STREAMS_MAX", 2)
    release = trio.Event()
    waiting: list[bytes] = []

    async def serve(_node_id: NodeId, frame: bytes) -> bytes:
        if frame != b"quick":
            waiting.append(frame)
            await release.wait()
        return frame

    async with hosts(serve) as (asking, answering):
        answers: list[bytes] = []

        async def one(frame: bytes) -> None:
            answers.append(await ask(asking, answering, frame))

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(one, str(number).encode())
            await until(lambda: len(waiting) == 4)
            assert await ask(asking, answering, b"quick") == b"quick"
            release.set()
        assert sorted(answers) == [b"0", b"1", b"2", b"3"]
        await until(lambda: len(open_streams(asking)) == 2)


async def test_a_late_answer_is_not_taken_for_the_next_ones() -> None:
    release = trio.Event()

    async def serve(_node_id: NodeId, frame: bytes) -> bytes:
        if frame == b"slow":
            await release.wait()
        return frame

    async with hosts(serve) as (asking, answering):
        await ask(asking, answering)
        with pytest.raises(Busy, match="did not answer"):
            await ask(asking, answering, b"slow", answer_s_max=0.05)
        release.set()
        assert await ask(asking, answering, b"next") == b"next"


async def test_a_stream_of_a_closed_connection_is_not_used() -> None:
    async with hosts() as (asking, answering):
        await ask(asking, answering)
        await answering.disconnect(asking.node_id)
        await until(lambda: not asking.is_connected(answering.node_id))
        await asking.dial(control_address(answering.node_id, "127.0.0.1", answering.port))
        assert await ask(asking, answering) == b"?"


async def test_a_stream_that_the_peer_broke_is_told_of_once() -> None:
    async def serve(_node_id: NodeId, frame: bytes) -> bytes:
        if frame == b"bad":
            raise BadPeer("no request")
        return frame

    async with hosts(serve) as (asking, answering):
        await ask(asking, answering)
        with pytest.raises(Busy, match="broke"):
            await ask(asking, answering, b"bad")
        assert await ask(asking, answering) == b"?"


async def test_a_frame_that_stops_midway_ends_its_stream_and_an_idle_one_stays() -> None:
    async with hosts(frame_s_max=0.2) as (asking, answering):
        await ask(asking, answering)
        (idle,) = open_streams(asking)
        half = await asking._host.new_stream(idle.muxed_conn.peer_id, ["/aigen/sync/1"])
        await half.write(b"\0\0\0\5ab")
        with pytest.raises(streams.STREAM_ERRORS):
            await half.read(1)
        await trio.lowlevel.checkpoint()
        assert await ask(asking, answering) == b"?"
        assert idle in open_streams(asking)


def test_of_two_connections_to_a_peer_one_may_be_gone() -> None:
    idle, peer = streams.IdleStreams(), NodeId("peer")
    live, dead = (SimpleNamespace(muxed_conn=SimpleNamespace(is_closed=is_closed)) for is_closed in (False, True))
    assert idle.keep(peer, live)
    assert idle.keep(peer, dead)
    assert idle.take(peer) is live
    assert idle.take(peer) is None


def test_idle_streams_leave_room_for_more() -> None:
    assert 2 * streams.IDLE_STREAMS_MAX <= STREAMS_PER_PEER_MAX
