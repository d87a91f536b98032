"""The command line's client against the real server, and against what is none."""

from functools import partial

import httpx
import pytest
import trio

from contracts.errors import BadInput, BadPeer, Busy, Conflict, NotAllowed, NotFound, Refused
from node.rpc import token
from node.rpc.client import Notification, RpcClient

from .fake import BASIC, CHAIN_ID, NOW, FakeNode, registration, signed
from .wire import serving

MESSAGES = [{"role": "user", "content": "one two"}]


async def with_client(served, work, key=None):
    """Run `work(client)` in a thread, as the command line does without one."""

    def run():
        bearer = None if key is None else token.mint(key, CHAIN_ID, NOW + 60)
        with RpcClient(served.url, bearer, timeout_s=10) as client:
            return work(client)

    return await trio.to_thread.run_sync(run)


async def test_call():
    async with serving() as served:
        info = await with_client(served, lambda client: client.call("getModelInfo", model_id="mistral-7b"))
    assert info["shard_count"] == 4


async def test_token():
    async with serving() as served:
        account = await with_client(served, lambda client: client.call("getAccount"), BASIC)
    assert account["account"] == f"0x{BASIC.address.hex()}"


@pytest.mark.parametrize(
    ("method", "params", "kind"),
    [
        ("getModelInfo", {"model_id": "nothing"}, NotFound),
        ("getModelInfo", {}, BadInput),
        ("unloadModel", {"model_id": "mistral-7b"}, Conflict),
        ("registerModel", {"transaction": f"0x{signed(registration('a'), key=BASIC).hex()}"}, NotAllowed),
        ("chatCompletion", {"model_id": "codegen-16b", "messages": MESSAGES}, NotAllowed),
    ],
)
async def test_refusals_by_code(method, params, kind):
    async with serving() as served:
        with pytest.raises(kind) as caught:
            await with_client(served, lambda client: client.call(method, **params))
    assert type(caught.value) is kind


async def test_refusals_without_a_kind_of_their_own():
    async with serving() as served:
        with pytest.raises(Refused, match="Method not found") as caught:
            await with_client(served, lambda client: client.call("nothing"))
    assert type(caught.value) is Refused


async def test_a_bad_token():
    def work():
        with RpcClient(served.url, "aigen_x") as client:
            client.call("health")

    async with serving() as served:
        with pytest.raises(NotAllowed, match="aigen token"):
            await trio.to_thread.run_sync(work)


async def test_stream():
    def work(client):
        stream = client.stream("chatCompletion", model_id="mistral-7b", messages=MESSAGES)
        return list(stream), stream.result

    async with serving() as served:
        notifications, result = await with_client(served, work)
    assert notifications[0].method == "loadProgress"
    assert notifications[1:] == [
        Notification("chatCompletionChunk", {"content": "one"}),
        Notification("chatCompletionChunk", {"content": " two"}),
    ]
    assert result["message"]["content"] == "one two"


async def test_a_refused_stream():
    def work(client):
        for _ in client.stream("chatCompletion", model_id="codegen-16b", messages=MESSAGES):
            pass

    async with serving() as served:
        with pytest.raises(NotAllowed, match="needs tier pro"):
            await with_client(served, work)


async def test_leaving_a_stream_stops_the_generation():
    node = FakeNode()
    node.words = trio.Semaphore(1)

    def work(client):
        for notification in client.stream("chatCompletion", model_id="mistral-7b", messages=MESSAGES):
            if notification.method == "chatCompletionChunk":
                break

    async with serving(node) as served:
        await with_client(served, work)
        while served.server.statistics().connections:
            await trio.lowlevel.checkpoint()
    assert node.chats_cancelled == 1


async def test_the_server_stops_in_the_middle_of_a_stream():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    caught = []

    async def ask(served, task_status):
        task_status.started()
        with pytest.raises(BadPeer) as raised:
            await with_client(
                served, lambda client: list(client.stream("chatCompletion", model_id="mistral-7b", messages=MESSAGES))
            )
        caught.append(str(raised.value))

    async with trio.open_nursery() as nursery, serving(node) as served:
        await nursery.start(ask, served)
        await node.chats_begun.wait()
    assert "ask again" in caught[0]


async def test_nothing_listens():
    async with serving() as served:
        pass
    with pytest.raises(NotFound, match="aigen start"):
        await with_client(served, lambda client: client.call("health"))
    with pytest.raises(NotFound, match="aigen start"):
        await with_client(served, lambda client: list(client.stream("health")))


async def test_no_answer_in_time():
    node = FakeNode()
    node.words = trio.Semaphore(0)

    def work():
        with RpcClient(served.url, timeout_s=0.05) as client:
            client.call("chatCompletion", model_id="mistral-7b", messages=MESSAGES)

    async with serving(node) as served:
        with pytest.raises(Busy, match="did not answer chatCompletion in time"):
            await trio.to_thread.run_sync(work)


@pytest.mark.parametrize(
    "answer", [b"<html>hello</html>", b"[]", b"{}", b'{"jsonrpc":"2.0","method":"x"}', b"\xff\xfe", b"[" * 100_000]
)
async def test_something_else_listens(answer):
    async def other(stream):
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))

    def work(port):
        with RpcClient(f"http://127.0.0.1:{port}") as client:
            client.call("health")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, other, 0, host="127.0.0.1"))
        with pytest.raises(BadPeer, match="is it an AIGEN node"):
            await trio.to_thread.run_sync(work, listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "url", ["", "localhost:9944", "ftp://localhost", "http://", "http://[::1", "http://x:99999999"]
)
def test_addresses_that_are_none(url):
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:9944"):
        RpcClient(url)


@pytest.mark.parametrize(("scheme", "made"), [("http", [False]), ("https", [True])])
def test_certificates_are_read_only_where_tls_shows_one(
    scheme: str, made: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(httpx, "Client", lambda verify, **_: asked.append(verify))
    RpcClient(f"{scheme}://127.0.0.1:1")
    assert asked == made
