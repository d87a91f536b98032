"""A streamed chatCompletion: server-sent events over a real socket."""

import json

import pytest
import trio

from node import receipts
from node.rpc.limits import RpcLimits

from .fake import FakeNode
from .wire import call, connect, post, request, serving


def chat(content="one two three", id_=1, model_id="mistral-7b", **more):
    messages = [{"role": "user", "content": content}]
    return call("chatCompletion", {"model_id": model_id, "messages": messages, "stream": True, **more}, id_)


def events(body: bytes) -> list[dict]:
    parts = body.decode().split("\n\n")
    assert parts[-1] == ""
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1] if not part.startswith(":")]


async def test_notifications_and_then_the_response():
    async with serving() as served:
        reply = await post(served, chat(id_="abc"))
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-store"
    loading, *chunks, last = events(reply.body)
    assert (loading["method"], loading["params"]["state"]) == ("loadProgress", "loaded")
    assert chunks == [
        {"jsonrpc": "2.0", "method": "chatCompletionChunk", "params": {"content": text}}
        for text in ("one", " two", " three")
    ]
    assert last["id"] == "abc"
    assert last["result"]["message"] == {"role": "assistant", "content": "one two three"}
    assert last["result"]["usage"]["total_tokens"] == 6
    receipts.decode(json.dumps(last["result"]["receipt"]).encode())


async def test_params_in_an_array():
    body = json.loads(chat())
    body["params"] = [body["params"]]
    async with serving() as served:
        reply = await post(served, json.dumps(body).encode())
    assert len(events(reply.body)) == 5


async def test_a_chunk_goes_out_as_soon_as_it_is_there():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(node) as served, await connect(served) as stream:
        await stream.send_all(request(chat()))
        text = b""
        for word in (b'"one"', b'" two"', b'" three"'):
            assert word not in text
            node.words.release()
            while word not in text:
                text += await stream.receive_some()


async def test_a_silent_stream_is_kept_alive():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(node, limits=RpcLimits(keep_alive_s=0.01)) as served, await connect(served) as stream:
        await stream.send_all(request(chat("one")))
        text = b""
        while text.count(b": waiting\n\n") < 3:
            text += await stream.receive_some()
        node.words.release()
        while b'"result"' not in text:
            text += await stream.receive_some()


async def test_leaving_stops_the_generation():
    node = FakeNode()
    node.words = trio.Semaphore(1)
    async with serving(node) as served:
        async with await connect(served) as stream:
            await stream.send_all(request(chat()))
            text = b""
            while b'"one"' not in text:
                text += await stream.receive_some()
        while served.server.statistics().connections:
            await trio.lowlevel.checkpoint()
        assert node.chats_cancelled == 1
        assert served.server.statistics().requests_active == 0


async def test_stopping_the_server_ends_a_stream():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(node) as served:
        stream = await connect(served)
        await stream.send_all(request(chat()))
        await node.chats_begun.wait()
    async with stream:
        while await stream.receive_some():
            pass
    assert node.chats_cancelled == 1


async def test_a_refusal_is_the_response_of_the_stream():
    async with serving() as served:
        reply = await post(served, chat(model_id="codegen-16b"))
    (last,) = events(reply.body)
    assert last["error"]["code"] == -32003
    assert "needs tier pro" in last["error"]["message"]


async def test_no_stream_in_a_batch():
    async with serving() as served:
        reply = await post(served, b"[" + chat() + b"]")
    assert reply.headers["content-type"] == "application/json"
    assert "not in a batch" in reply.json[0]["error"]["message"]


async def test_a_notification_is_not_streamed():
    body = json.loads(chat())
    del body["id"]
    async with serving() as served:
        assert (await post(served, json.dumps(body).encode())).status == 204


@pytest.mark.parametrize("stream", [False, "yes", 1])
async def test_only_true_streams(stream):
    async with serving() as served:
        reply = await post(served, chat(stream=stream))
    assert reply.headers["content-type"] == "application/json"
