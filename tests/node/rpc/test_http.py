"""The door and the limits, each at its edge, over real sockets."""

import json
import socket

import h2.connection
import h2.events
import pytest
import trio

from contracts.errors import BadInput, Conflict
from node.config import RpcSettings
from node.rpc.limits import RpcLimits
from node.rpc.server import RpcServer

from .fake import FakeNode
from .wire import Served, call, connect, post, read_reply, request, send, serving

HEALTH = call("health")


# What is asked of whom


async def test_keep_alive_serves_one_request_after_another():
    async with serving() as served, await connect(served) as stream:
        for id_ in range(5):
            await stream.send_all(request(call("health", id_=id_)))
            assert (await read_reply(stream)).json["id"] == id_


async def test_pipelined_requests_are_answered_in_order():
    async with serving() as served, await connect(served) as stream:
        await stream.send_all(request(call("health", id_=1)) + request(call("health", id_=2)))
        text = b""
        while text.count(b'"id":') < 2:
            text += await stream.receive_some()
    assert text.index(b'"id":1') < text.index(b'"id":2')


async def test_chunked_body():
    raw = request(b"", {"content-length": "", "transfer-encoding": "chunked"})
    half = len(HEALTH) // 2
    for part in (HEALTH[:half], HEALTH[half:], b""):
        raw += b"%x\r\n%s\r\n" % (len(part), part)
    async with serving() as served:
        assert (await send(served, raw)).json["result"]["ready"] is True


async def test_get_health():
    node = FakeNode()
    async with serving(node) as served:
        ready = await send(served, request(b"", {"content-type": ""}, "GET", "/health"))
        node.ready = False
        starting = await send(served, request(b"", {"content-type": ""}, "GET", "/health"))
    assert (ready.status, ready.json["status"]) == (200, "ready")
    assert (starting.status, starting.json["step"]) == (503, "fetch")


@pytest.mark.parametrize(
    ("method", "target", "status"), [("GET", "/", 405), ("POST", "/health", 405), ("POST", "/x", 404)]
)
async def test_other_paths_and_verbs(method, target, status):
    async with serving() as served:
        reply = await send(served, request(HEALTH, method=method, target=target))
    assert reply.status == status
    assert "POST /" in reply.error["message"]


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1"]
)
async def test_content_type_must_be_json(content_type):
    async with serving() as served:
        reply = await post(served, HEALTH, {"content-type": content_type})
    assert reply.status == 415
    assert "content-type: application/json" in reply.error["message"]


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=UTF-8", "Application/JSON", 'application/json;charset="utf-8"']
)
async def test_content_types_that_are_json(content_type):
    async with serving() as served:
        assert (await post(served, HEALTH, {"content-type": content_type})).status == 200


async def test_compressed_body_is_refused():
    async with serving() as served:
        assert (await post(served, HEALTH, {"content-encoding": "gzip"})).status == 415


# Host and origin


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9944", "localhost.", "127.0.0.1:1", "127.8.8.8", "[::1]:9944"]
)
async def test_hosts_of_loopback(host):
    async with serving() as served:
        assert (await send(served, request(HEALTH, host=host))).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "192.0.2.7", "[2001:db8::1]", "127.0.0.1.evil.example"]
)
async def test_foreign_hosts_are_refused(host):
    async with serving() as served:
        reply = await send(served, request(HEALTH, host=host))
    assert reply.status == 403
    assert "rpc.allowed_hosts" in reply.error["message"]


async def test_no_host_is_refused():
    async with serving() as served:
        raw = request(HEALTH, host="").replace(b"HTTP/1.1", b"HTTP/1.0")
        assert (await send(served, raw)).status == 403


async def test_configured_host():
    async with serving(settings=RpcSettings(port=0, allowed_hosts=("node.example",))) as served:
        assert (await send(served, request(HEALTH, host="node.example:80"))).status == 200


@pytest.mark.parametrize(("host", "status"), [("192.0.2.7", 200), ("[2001:db8::1]:9944", 200), ("evil.example", 403)])
async def test_hosts_away_from_loopback(host, status):
    """An IP literal cannot be rebound, and whoever binds another address is reached by it."""
    async with serving(settings=RpcSettings(port=0, host="0.0.0.0")) as served:
        assert (await send(served, request(HEALTH, host=host))).status == status


async def test_a_page_of_the_node_itself_may_call():
    async with serving() as served:
        headers = {"origin": f"http://localhost:{served.port}", "sec-fetch-site": "same-origin"}
        reply = await send(served, request(HEALTH, headers, host=f"localhost:{served.port}"))
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(("mode", "status"), [("no-cors", 403), ("navigate", 200)])
async def test_pages_that_hide_their_origin(mode, status):
    """An image of another site is refused, a link from it is followed."""
    headers = {"content-type": "", "sec-fetch-site": "cross-site", "sec-fetch-mode": mode}
    async with serving() as served:
        assert (await send(served, request(b"", headers, "GET", "/health"))).status == status


async def test_a_form_that_hides_its_origin_is_refused():
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    async with serving() as served:
        assert (await post(served, HEALTH, headers)).status == 403


def test_settings_that_could_never_match_are_refused():
    with pytest.raises(BadInput, match="scheme, host and port"):
        RpcServer(FakeNode(), RpcSettings(allowed_origins=("https://panel.example/",)))
    with pytest.raises(BadInput, match="bare name"):
        RpcServer(FakeNode(), RpcSettings(allowed_hosts=("http://node.example",)))


async def test_every_origin_is_not_let_in_on_loopback():
    server = RpcServer(FakeNode(), RpcSettings(port=0, allowed_origins=("*",)))
    with pytest.raises(BadInput, match="any web page could drive this node"):
        await server.serve()


# Bodies


async def test_body_at_the_limit_and_one_byte_over():
    limits = RpcLimits(body_bytes=1000)
    async with serving(limits=limits) as served:
        fits = await post(served, HEALTH.ljust(1000))
        over = await post(served, HEALTH.ljust(1001))
    assert fits.json["result"]["ready"] is True
    assert over.status == 413
    assert "1000 bytes (rpc.body_bytes)" in over.error["message"]


async def test_chunked_body_over_the_limit():
    raw = (
        request(b"", {"content-length": "", "transfer-encoding": "chunked"})
        + b"3e9\r\n"
        + b" " * 1001
        + b"\r\n0\r\n\r\n"
    )
    async with serving(limits=RpcLimits(body_bytes=1000)) as served:
        assert (await send(served, raw)).status == 413


async def test_a_large_refused_body_leaves_the_connection_usable():
    """hypercorn's queue holds ten parts of a body; a refusal that left them unread stopped the connection for ever."""
    async with serving(limits=RpcLimits(body_bytes=1000)) as served, await connect(served) as stream:
        await stream.send_all(request(b" " * (8 << 20)))
        assert (await read_reply(stream)).status == 413
        await stream.send_all(request(HEALTH))
        assert (await read_reply(stream)).status == 200


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"host": "evil.example"}, {"authorization": "Bearer x"}]
)
async def test_any_refusal_reads_a_large_body_away(headers):
    async with serving() as served:
        reply = await post(served, b" " * (4 << 20), headers)
        assert reply.status in {401, 403, 415}


async def send_for_ever(stream: trio.SocketStream) -> None:
    while True:
        await stream.send_all(b" " * 65536)


async def test_an_endless_refused_body_is_cut_off():
    limits = RpcLimits(body_bytes=1000, drain_bytes=100_000)
    async with serving(limits=limits) as served, await connect(served) as stream:
        await stream.send_all(request(b"", {"content-length": str(1 << 40)}))
        with pytest.raises(trio.BrokenResourceError):
            await send_for_ever(stream)
        await until_no_connections(served)


async def test_a_body_that_does_not_come_is_refused():
    limits = RpcLimits(read_timeout_s=0.05, drain_timeout_s=0.05)
    async with serving(limits=limits) as served, await connect(served) as stream:
        await stream.send_all(request(HEALTH, {"content-length": "1000"}))
        reply = await read_reply(stream)
        await until_no_connections(served)
    assert reply.status == 408
    assert reply.error["code"] == -32008
    assert f"{len(HEALTH)} bytes" in reply.error["message"]


async def test_headers_that_do_not_come_end_the_connection():
    async with serving(limits=RpcLimits(header_timeout_s=0.05)) as served, await connect(served) as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: loc")
        assert await stream.receive_some() == b""


async def test_headers_over_the_limit():
    async with serving(limits=RpcLimits(header_bytes=1000)) as served, await connect(served) as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 1000)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 431 ")


async def test_a_client_that_leaves_in_the_middle_of_a_body():
    async with serving() as served:
        async with await connect(served) as stream:
            await stream.send_all(request(HEALTH, {"content-length": "1000"}))
        await until_no_connections(served)
        assert (await post(served, HEALTH)).status == 200


async def until_no_connections(served: Served) -> None:
    """The server has let go of every connection (the deadline is the test's)."""
    while served.server.statistics().connections:
        await trio.lowlevel.checkpoint()


# Batches and requests


async def test_batch_at_the_limit_and_one_over():
    async with serving(limits=RpcLimits(batch_size=3)) as served:
        fits = await post(served, b"[" + b",".join([HEALTH] * 3) + b"]")
        over = await post(served, b"[" + b",".join([HEALTH] * 4) + b"]")
    assert len(fits.json) == 3
    assert "4 elements, at most 3" in over.error["message"]


def chat(content="one two three", id_=1, **more):
    messages = [{"role": "user", "content": content}]
    return call("chatCompletion", {"model_id": "mistral-7b", "messages": messages, **more}, id_)


async def test_one_request_over_the_limit_is_told_to_come_back():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    limits = RpcLimits(concurrent_requests=1, turn_timeout_s=0.05)
    async with serving(node, limits=limits) as served, await connect(served) as slow:
        await slow.send_all(request(chat()))
        await node.chats_begun.wait()
        over = await post(served, HEALTH)
        watched = await send(served, request(b"", {"content-type": ""}, "GET", "/health"))
        for _ in range(3):
            node.words.release()
        assert (await read_reply(slow)).json["result"]["message"]["content"] == "one two three"
        assert (await post(served, HEALTH)).status == 200
        assert served.server.statistics().requests_refused == 1
    assert over.status == 503
    assert over.headers["retry-after"] == "1"
    assert over.error["code"] == -32008
    assert watched.status == 200


async def test_a_request_waits_for_its_turn():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with (
        serving(node, limits=RpcLimits(concurrent_requests=1)) as served,
        await connect(served) as slow,
        await connect(served) as next_,
    ):
        await slow.send_all(request(chat("one")))
        await node.chats_begun.wait()
        await next_.send_all(request(HEALTH))
        node.words.release()
        assert (await read_reply(slow)).status == 200
        assert (await read_reply(next_)).status == 200


async def test_connections_over_the_limit_wait():
    async with serving(limits=RpcLimits(connections=1)) as served:
        async with await connect(served) as first:
            await first.send_all(request(HEALTH))
            assert (await read_reply(first)).status == 200
            second = await connect(served)
            await second.send_all(request(HEALTH))
            assert served.server.statistics().connections == 1
        async with second:
            assert (await read_reply(second)).status == 200


async def test_a_client_that_leaves_cancels_its_request():
    node = FakeNode()
    node.words = trio.Semaphore(0)
    async with serving(node) as served:
        async with await connect(served) as stream:
            await stream.send_all(request(chat()))
            await node.chats_begun.wait()
        await until_no_connections(served)
        assert node.chats_cancelled == 1
        assert served.server.statistics().requests_active == 0


# Clients that stop reading, and stopping


async def ask_without_reading(served: Served) -> trio.SocketStream:
    """A client with a small window that asks for 3 MB and takes none of it."""
    client = trio.socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await client.connect((served.host, served.port))
    stream = trio.SocketStream(client)
    await stream.send_all(request(chat("x" * 2_000_000)))
    return stream


async def test_a_client_that_stops_reading_is_cut_off():
    node = FakeNode()
    async with serving(node, limits=RpcLimits(write_timeout_s=0.1)) as served, await ask_without_reading(served):
        await node.chats_begun.wait()
        await until_no_connections(served)


async def test_a_client_that_stops_reading_does_not_keep_the_server_from_stopping():
    """hypercorn sends under a shield; without `abort` this waited for the client, however long it took."""
    node = FakeNode()
    async with serving(node, limits=RpcLimits(write_timeout_s=1e6)) as served:
        client = await ask_without_reading(served)
        await node.chats_begun.wait()
        await trio.testing.wait_all_tasks_blocked()
    await client.aclose()


async def test_port_in_use():
    async with serving() as served:
        server = RpcServer(FakeNode(), RpcSettings(port=served.port))
        with pytest.raises(Conflict, match=f"127.0.0.1 port {served.port} is in use: .*--rpc-port"):
            await server.serve()


async def test_an_address_of_another_machine():
    with pytest.raises(BadInput, match=r"rpc\.host"):
        await RpcServer(FakeNode(), RpcSettings(host="192.0.2.1", port=0)).serve()


async def h2_reply(stream: trio.SocketStream, connection: h2.connection.H2Connection) -> bytes:
    """The body of the next answer."""
    body = b""
    while True:
        for event in connection.receive_data(await stream.receive_some()):
            if isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.StreamEnded):
                return body
        await stream.send_all(connection.data_to_send())


async def test_http_2_with_prior_knowledge_is_refused():
    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    headers = [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "localhost")]
    connection.send_headers(1, [*headers, ("content-type", "application/json")])
    connection.send_data(1, HEALTH, end_stream=True)
    async with serving() as served, await connect(served) as stream:
        await stream.send_all(connection.data_to_send())
        body = await h2_reply(stream, connection)
    assert "HTTP/2 is not spoken here" in json.loads(body)["error"]["message"]


async def test_http_2_by_upgrade_is_refused():
    headers = {"upgrade": "h2c", "connection": "upgrade", "http2-settings": "", "content-length": ""}
    async with serving() as served, await connect(served) as stream:
        await stream.send_all(request(b"", headers, "GET", "/health"))
        text = b""
        while b"is not spoken here" not in text:
            part = await stream.receive_some()
            assert part, text
            text += part


async def test_statistics():
    async with serving() as served:
        await post(served, HEALTH)
        await post(served, HEALTH)
        await until_no_connections(served)
        statistics = served.server.statistics()
    assert (statistics.connections_total, statistics.requests_total, statistics.requests_refused) == (2, 2, 0)


async def test_garbage_is_answered_with_400():
    async with serving() as served, await connect(served) as stream:
        await stream.send_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")


async def test_answers_are_not_stored():
    async with serving() as served:
        reply = await post(served, HEALTH)
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert json.loads(reply.body)["jsonrpc"] == "2.0"
