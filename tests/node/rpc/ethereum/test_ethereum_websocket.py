"""JSON-RPC on a WebSocket of the same port: calls, subscriptions, and the same doors and limits as over HTTP."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypercorn.protocol.ws_stream import FrameTooLargeError
from wsproto.events import CloseConnection, TextMessage

from contracts.addresses import ADDRESSES
from node.config import RpcSettings
from node.rpc import token, upgrade
from node.rpc.following import Threads
from node.rpc.limits import RpcLimits
from node.rpc.subscriptions import Subscriptions
from tests.ledger.world import ADMIN, address, enrol, raw_call, register
from tests.node.rpc.fake import BASIC, CHAIN_ID, NOW, FakeNode

from . import shapes
from .client import Client, Refused
from .served import Served, serving

MODELS = f"0x{ADDRESSES['Models'].hex()}"
HEALTH = {"jsonrpc": "2.0", "id": 7, "method": "health"}


async def until_no_connections(served: Served) -> None:
    while served.server.statistics().connections:
        await trio.lowlevel.checkpoint()


def chat(words: str) -> dict[str, Any]:
    return {"model_id": "mistral-7b", "messages": [{"role": "user", "content": words}]}


# Calls


async def test_calls(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        assert await client.ask("eth_blockNumber") == "0x0"
        assert (await client.ask("health"))["ready"] is True, "not only Ethereum's"
        await client.send([HEALTH, {"jsonrpc": "2.0", "id": 8, "method": "eth_chainId"}])
        assert [answer["id"] for answer in await client.message()] == [7, 8]
        await client.send_text("{")
        assert (await client.message())["error"]["code"] == -32700
        await client.send({"jsonrpc": "2.0", "method": "health"})  # a notification: no answer
        assert (await client.answer("foobar"))["error"] == {"code": -32601, "message": "Method not found"}
        await client.ping()
        await client.close()
        await until_no_connections(served)


async def test_a_server_without_a_ledger_answers_calls_too(tmp_path: Path) -> None:
    from tests.node.rpc.wire import serving as serving_without

    async with serving_without() as served:
        client = await Client.connect(served)  # type: ignore[arg-type]
        assert (await client.ask("health"))["ready"] is True
        assert (await client.answer("eth_subscribe", "newHeads"))["error"]["code"] == -32601
        await client.close()


async def test_a_slow_call_does_not_hold_up_the_next(tmp_path: Path) -> None:
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(tmp_path, node=node) as served:
        client = await Client.connect(served)
        slow = await client.request("chatCompletion", chat("hello"))
        await node.chats_begun.wait()
        assert await client.ask("eth_blockNumber") == "0x0"
        node.words.release()
        assert (await client.message())["id"] == slow
        await client.close()


async def test_calls_under_way_are_bounded(tmp_path: Path) -> None:
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(tmp_path, limits=RpcLimits(websocket_calls=1), node=node) as served:
        client = await Client.connect(served)
        first = await client.request("chatCompletion", chat("hello"))
        await node.chats_begun.wait()
        second = await client.request("health")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert served.server.statistics().requests_active == 1
        node.words.release()
        assert [(await client.message())["id"] for _ in range(2)] == [first, second]
        await client.close()


async def test_transactions_are_taken_in_the_order_they_were_sent(tmp_path: Path) -> None:
    """Alone and in batches, which take longer to begin with."""
    raws = [raw_call(ADMIN, nonce, register(f"model-{nonce}")) for nonce in range(20)]
    async with serving(tmp_path, sealing=False) as served:
        client = await Client.connect(served)
        calls = [
            {"jsonrpc": "2.0", "id": nonce, "method": "eth_sendRawTransaction", "params": [f"0x{raw.hex()}"]}
            for nonce, raw in enumerate(raws)
        ]
        await client.send_at_once([call if nonce % 2 else [call] for nonce, call in enumerate(calls)])
        for _ in raws:
            answer = await client.message()
            assert "result" in (answer[0] if isinstance(answer, list) else answer), answer
        assert served.ledger.pending() == raws
        await client.close()


async def test_who_leaves_is_no_longer_worked_for(tmp_path: Path) -> None:
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(tmp_path, node=node) as served:
        client = await Client.connect(served)
        await client.request("chatCompletion", chat("hello"))
        await node.chats_begun.wait()
        await client.stream.aclose()
        await until_no_connections(served)
    assert node.chats_cancelled == 1


async def test_a_stream_needs_http(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        error = (await client.answer("chatCompletion", {**chat("hello"), "stream": True}))["error"]
        assert "not in a batch or a WebSocket" in error["message"]
        await client.close()


# The door


async def test_the_same_names_and_origins_as_over_http(tmp_path: Path) -> None:
    settings = RpcSettings(port=0, allowed_origins=("https://panel.example",))
    async with serving(tmp_path, settings) as served:
        for headers, host in (
            ({"origin": "https://evil.example"}, "localhost"),
            ({"origin": f"http://localhost.evil.example:{served.port}"}, "localhost"),
            ({"origin": f"ws://localhost:{served.port}"}, f"localhost:{served.port}"),
            ({"sec-fetch-site": "cross-site"}, "localhost"),
            ({}, "rebound.example"),
        ):
            with pytest.raises(Refused) as refused:
                await Client.connect(served, headers, host=host)
            assert refused.value.status == 403
            assert json.loads(refused.value.body)["error"]["code"] == -32003
        for headers, host in (
            ({"origin": "https://panel.example"}, "localhost"),
            ({"origin": f"http://localhost:{served.port}"}, f"localhost:{served.port}"),
            ({}, f"127.0.0.1:{served.port}"),
        ):
            client = await Client.connect(served, headers, host=host)
            assert await client.ask("eth_blockNumber") == "0x0"
            await client.close()
        with pytest.raises(Refused) as refused:
            await Client.connect(served, path="/elsewhere")
        assert refused.value.status == 403


async def test_a_token_is_good_until_it_expires(tmp_path: Path) -> None:
    now = [float(NOW)]
    bearer = token.mint(BASIC, CHAIN_ID, NOW + 100)
    async with serving(tmp_path, clock=lambda: now[0]) as served:
        with pytest.raises(Refused) as refused:
            await Client.connect(served, {"authorization": "Bearer aigen_nonsense"})
        assert refused.value.status == 401
        client = await Client.connect(served, {"authorization": f"Bearer {bearer}"})
        assert (await client.ask("getAccount"))["account"] == f"0x{BASIC.address.hex()}"
        now[0] += 101
        error = (await client.answer("getAccount"))["error"]
        assert "expired" in error["message"]
        await client.close()


async def test_connections_are_few(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=RpcLimits(websockets=2)) as served:
        clients = [await Client.connect(served) for _ in range(2)]
        with pytest.raises(Refused, match="2 WebSocket connections are open already") as refused:
            await Client.connect(served)
        assert refused.value.status == 503
        assert await served.ask("eth_blockNumber") == "0x0", "plain requests have room"
        for client in clients:
            await client.close()
        await until_no_connections(served)
        await (await Client.connect(served)).close()


async def test_nothing_is_compressed(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served, compress=True)
        assert client.accepted is not None
        assert client.accepted.extensions == []
        assert await client.ask("eth_blockNumber") == "0x0"
        await client.close()


async def until_cut_off(client: Client, send: Callable[[], Awaitable[object]]) -> None:
    """Go on sending until the server has closed the connection."""
    try:
        while True:
            await send()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        await client.stream.aclose()


async def test_a_message_that_is_too_large_ends_the_connection(tmp_path: Path) -> None:
    limits = RpcLimits(body_bytes=1000, drain_timeout_s=0.1)
    async with serving(tmp_path, limits=limits) as served:
        client = await Client.connect(served)
        await client.send_text(json.dumps(HEALTH).ljust(1000))
        assert (await client.message())["id"] == 7
        await client.send_text(" " * 600, finished=False)
        await client.send_text(" " * 600, finished=False)
        event = await client.event()
        assert isinstance(event, CloseConnection)
        assert event.code == 1009
        # One that goes on all the same is not listened to, and cut off.
        more = b"\x00\x84\0\0\0\0    "
        await until_cut_off(client, lambda: client.stream.send_all(more))
        await until_no_connections(served)


async def test_who_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=RpcLimits(write_timeout_s=0.2)) as served:
        for name in range(3):
            await served.send(register(f"m-{name}", shards=400))
        client = await Client.connect(served)
        await until_cut_off(client, lambda: client.request("eth_getLogs", {"fromBlock": "0x0"}))
        await until_no_connections(served)


def test_no_more_than_one_message_is_ever_kept() -> None:
    """However much comes after one that was too large."""
    overflow = upgrade.Overflow()
    buffer = upgrade.BoundedBuffer(1000, overflow)
    buffer.extend(TextMessage("x" * 1000))
    for _ in range(10):
        with pytest.raises(FrameTooLargeError):
            buffer.extend(TextMessage("x" * 600 if buffer.length else "x" * 1001))
        assert buffer.length == 0
        assert overflow.noted


# Subscriptions


async def test_new_heads(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        await served.send(register("before"))
        name = await client.ask("eth_subscribe", "newHeads")
        assert shapes.QUANTITY(name)
        for model in ("a", "b"):
            await served.send(register(model))
        for number in ("0x2", "0x3"):
            told = await client.told()
            assert told["subscription"] == name
            assert shapes.HEADER(told["result"])
            block = await served.ask("eth_getBlockByNumber", number, False)
            assert told["result"].items() <= block.items()
        await client.close()


async def test_logs(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        models = await client.ask("eth_subscribe", "logs", {"address": MODELS})
        everything = await client.ask("eth_subscribe", "logs")
        assert models != everything
        await served.send(enrol(address(1)))
        await served.send(register("a"))
        expected = await served.ask("eth_getLogs", {"fromBlock": "0x1"})
        told = [await client.told() for _ in range(3)]
        assert [entry["result"] for entry in told if entry["subscription"] == everything] == expected
        assert [entry["result"] for entry in told if entry["subscription"] == models] == expected[1:]
        await client.close()


async def test_unsubscribe(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        other = await Client.connect(served)
        name = await client.ask("eth_subscribe", "newHeads")
        assert await other.ask("eth_unsubscribe", name) is False, "it is not this connection's"
        assert await client.ask("eth_unsubscribe", name) is True
        assert await client.ask("eth_unsubscribe", name) is False
        await served.send(register("a"))
        kept = await client.ask("eth_subscribe", "newHeads")
        await served.send(register("b"))
        assert (await client.told())["subscription"] == kept
        await client.close()
        await other.close()


async def test_who_reads_late_misses_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        await client.ask("eth_subscribe", "newHeads")
        for number in range(30):
            await served.send(register(f"model-{number}"))
        told = [int((await client.told())["result"]["number"], 16) for _ in range(30)]
        assert told == list(range(1, 31))
        await client.close()


async def test_a_subscription_begins_when_its_name_has_been_told(tmp_path: Path) -> None:
    """Nothing of it is told before, and no block of the time between is missed."""
    async with serving(tmp_path) as served, trio.open_nursery() as nursery:
        subscriptions = Subscriptions(served.ledger, Threads(1), RpcLimits())
        told, news = [], trio.Event()

        async def tell(_method: str, params: dict[str, Any]) -> None:
            told.append(int(params["result"]["number"], 16))
            news.set()

        nursery.start_soon(subscriptions.run, tell)
        await served.send(register("a"))
        opened = subscriptions.open(None)
        await served.send(register("b"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told == []
        subscriptions.begin(opened)
        await news.wait()
        assert told == [2]
        unwanted = subscriptions.open(None)
        assert subscriptions.close(unwanted.name)
        subscriptions.begin(unwanted)
        await served.send(register("c"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told == [2, 3], "and nothing of the one that was closed first"
        nursery.cancel_scope.cancel()


async def test_subscriptions_are_few(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=RpcLimits(subscriptions=2)) as served:
        client = await Client.connect(served)
        names = [await client.ask("eth_subscribe", "newHeads") for _ in range(2)]
        error = (await client.answer("eth_subscribe", "newHeads"))["error"]
        assert error["code"] == -32008
        assert "2 subscriptions already" in error["message"]
        await client.ask("eth_unsubscribe", names[0])
        await client.ask("eth_subscribe", "logs", {})
        await client.close()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["newPendingTransactions"], "there is no subscription to 'newPendingTransactions'"),
        (["newHeads", {"address": MODELS}], "newHeads with a filter"),
        (["logs", {"fromBlock": "0x0"}], "has 'fromBlock'"),
        ([], "subscription is missing"),
    ],
)
async def test_what_cannot_be_subscribed_to(tmp_path: Path, given: list[Any], why: str) -> None:
    async with serving(tmp_path) as served:
        client = await Client.connect(served)
        error = (await client.answer("eth_subscribe", *given))["error"]
        assert error["code"] == -32602
        assert why in error["message"]
        await client.close()
