"""The seed's examples, as the bytes that curl, PowerShell, Node's and a page's fetch and Python's requests write."""

import pytest

from node.config import RpcSettings

from .wire import connect, read_reply, send, serving

CURL = b"POST / HTTP/1.1\r\nHost: localhost:9944\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"

LIST_MODELS = b'{"jsonrpc":"2.0","id":1,"method":"listModels","params":[]}'
GET_MODEL_INFO = b'{"jsonrpc":"2.0","id":2,"method":"getModelInfo","params":[{"model_id":"mistral-7b"}]}'
LOAD_MODEL = b'{"jsonrpc":"2.0","id":3,"method":"loadModel","params":[{"model_id":"codegen-16b"}]}'


def curl(body):
    return CURL + b"content-type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


async def test_curl_list_models():
    async with serving() as served:
        reply = await send(served, curl(LIST_MODELS))
    result = reply.json["result"]
    assert [model["model_id"] for model in result["models"]] == ["mistral-7b", "codegen-16b", "old-model"]
    assert [entry["model_id"] for entry in result["catalogue"]] == ["llama2-13b"]


async def test_curl_get_model_info():
    async with serving() as served:
        reply = await send(served, curl(GET_MODEL_INFO))
    assert reply.json["id"] == 2
    assert reply.json["result"]["model_id"] == "mistral-7b"
    assert reply.json["result"]["shard_count"] == 4


async def test_curl_load_model_as_the_operator():
    async with serving() as served:
        reply = await send(served, curl(LOAD_MODEL))
    assert reply.json["result"]["state"] == "fetching"


async def test_powershell_waits_for_100_continue():
    """Windows PowerShell: ConvertTo-Json's layout and order, and a body that is sent only when it is asked for."""
    body = b'{\r\n    "method":  "listModels",\r\n    "params":  [\r\n\r\n               ],\r\n'
    body += b'    "id":  1,\r\n    "jsonrpc":  "2.0"\r\n}'
    head = (
        b"POST / HTTP/1.1\r\nUser-Agent: Mozilla/5.0 (Windows NT; Windows NT 10.0; en-GB) WindowsPowerShell/5.1\r\n"
        b"Content-Type: application/json\r\nHost: localhost:9944\r\nContent-Length: %d\r\n"
        b"Expect: 100-continue\r\nConnection: Keep-Alive\r\n\r\n" % len(body)
    )
    async with serving() as served, await connect(served) as stream:
        await stream.send_all(head)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
        await stream.send_all(body)
        reply = await read_reply(stream)
    assert len(reply.json["result"]["models"]) == 3


FETCH_IN_NODE = (
    b"POST / HTTP/1.1\r\nhost: localhost:9944\r\nconnection: keep-alive\r\ncontent-type: application/json\r\n"
    b"accept: */*\r\naccept-language: *\r\nsec-fetch-mode: cors\r\nuser-agent: node\r\n"
    b"accept-encoding: gzip, deflate\r\ncontent-length: 58\r\n\r\n" + LIST_MODELS
)


async def test_fetch_in_node():
    async with serving() as served:
        reply = await send(served, FETCH_IN_NODE)
    assert len(reply.json["result"]["models"]) == 3


def fetch_in_page(origin):
    headers = b"origin: %s\r\nsec-fetch-site: cross-site\r\n" % origin
    return FETCH_IN_NODE.replace(b"user-agent: node\r\n", headers)


def preflight_of_page(origin):
    return (
        b"OPTIONS / HTTP/1.1\r\nHost: localhost:9944\r\nConnection: keep-alive\r\nAccept: */*\r\n"
        b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: content-type\r\n"
        b"Access-Control-Request-Private-Network: true\r\n"
        b"Origin: %s\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Dest: empty\r\n\r\n" % origin
    )


async def test_fetch_in_a_listed_page():
    settings = RpcSettings(port=0, allowed_origins=("https://panel.example",))
    async with serving(settings=settings) as served:
        preflight = await send(served, preflight_of_page(b"https://panel.example"))
        reply = await send(served, fetch_in_page(b"https://panel.example"))
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-origin"] == "https://panel.example"
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    assert preflight.headers["access-control-allow-private-network"] == "true"
    assert len(reply.json["result"]["models"]) == 3
    assert reply.headers["access-control-allow-origin"] == "https://panel.example"
    assert reply.headers["access-control-expose-headers"] == "x-aigen-receipt, x-aigen-receipt-id"
    assert reply.headers["vary"] == "origin"


@pytest.mark.parametrize("origin", [b"https://evil.example", b"http://localhost:3000", b"null"])
async def test_fetch_in_any_other_page_is_refused(origin):
    async with serving() as served:
        preflight = await send(served, preflight_of_page(origin))
        reply = await send(served, fetch_in_page(origin))
    assert (preflight.status, reply.status) == (403, 403)
    assert "access-control-allow-origin" not in preflight.headers
    assert "rpc.allowed_origins" in reply.error["message"]
    assert reply.error["code"] == -32003


async def test_python_requests():
    body = b'{"jsonrpc": "2.0", "id": 1, "method": "getModelInfo", "params": [{"model_id": "mistral-7b"}]}'
    raw = (
        b"POST / HTTP/1.1\r\nHost: localhost:9944\r\nUser-Agent: python-requests/2.34.2\r\n"
        b"Accept-Encoding: gzip, deflate\r\nAccept: */*\r\nConnection: keep-alive\r\nContent-Length: 93\r\n"
        b"Content-Type: application/json\r\n\r\n" + body
    )
    async with serving() as served:
        reply = await send(served, raw)
    assert reply.json["result"]["minimum_tier"] == "basic"
