"""Web servers for the tests: an honest static one that does ranges, an honest gateway, and a zoo of others.

A small server over http.server: nginx as a mirror is tested where it is installed, see test_fetch_nginx.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from contracts.types import PIECE_SIZE
from node.storage.manifest import ManifestShard
from node.storage.unixfs import cid_text, raw_cid

Files = dict[str, bytes]
"""By path."""


class Request(BaseHTTPRequestHandler):
    """One connection; what it answers is `answer`'s."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range", "")))
        try:
            self.server.answer(self)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Requests are counted, not printed."""

    @property
    def body(self) -> bytes | None:
        return self.server.files.get(self.path)

    def range(self) -> tuple[int, int]:
        """First byte and the one after the last."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert found, self.headers["Range"]
        return int(found[1]), int(found[2]) + 1

    def say(self, status: int, headers: dict[str, object] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def say_range(self, headers: dict[str, object] | None = None, change: Callable[[bytes], bytes] = bytes) -> None:
        """What an honest mirror says, with `change` made to the body and `headers` over its own."""
        assert self.body is not None
        first, end = self.range()
        body = self.body[first:end]
        told = {"Content-Range": f"bytes {first}-{end - 1}/{len(self.body)}", "Content-Length": len(body)}
        self.say(206, {**told, **(headers or {})}, change(body))


class Web(ThreadingHTTPServer):
    """A server on loopback, its requests noted."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self, answer: Callable[[Request], None], files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answer = answer
        self.files = files
        self.requests: list[tuple[str, str]] = []
        self.ended = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is nothing to print."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(answer: Callable[[Request], None], files: Files) -> Iterator[Web]:
    web = Web(answer, files)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        web.shutdown()
        thread.join()
        web.server_close()


def mirror_files(shards: list[tuple[ManifestShard, bytes]]) -> Files:
    return {f"/shards/{shard.sha256.hex()}": data for shard, data in shards}


def blocks(shards: list[tuple[ManifestShard, bytes]]) -> Files:
    """The same for a gateway: every piece by its CID."""
    return {
        f"/ipfs/{cid_text(raw_cid(shard.piece_hash(index)))}?format=raw": data[
            index * PIECE_SIZE : (index + 1) * PIECE_SIZE
        ]
        for shard, data in shards
        for index in range(shard.piece_count)
    }


# Honest ones


def static(request: Request) -> None:
    """Ranges of files, whole files without one."""
    if request.body is None:
        request.say(404, body=b"no such file")
    elif "Range" in request.headers:
        request.say_range()
    else:
        request.say(200, body=request.body)


def gateway(request: Request) -> None:
    if request.body is None:
        request.say(404, body=b"ipld: could not find node")
    else:
        request.say(200, {"Content-Type": "application/vnd.ipld.raw"}, request.body)


def redirecting(target: str) -> Callable[[Request], None]:
    """To the same path below `target`."""
    return lambda request: request.say(302, {"Location": target + request.path})


# Others


def error_page(request: Request) -> None:
    request.say(200, {"Content-Type": "text/html"}, b"<h1>Please log in</h1>")


def whole_file(request: Request) -> None:
    request.say(200, body=request.body or b"")


def beyond_its_end(request: Request) -> None:
    request.say(416, {"Content-Range": "bytes */100"})


def not_there(request: Request) -> None:
    request.say(404, body=b"nothing here")


def broken(request: Request) -> None:
    request.say(500)


def too_short(request: Request) -> None:
    request.say_range({"Content-Length": 10}, lambda body: body[:10])


def hangs_up(request: Request) -> None:
    request.say_range(change=lambda body: body[:1000])
    request.close_connection = True


def compressed(request: Request) -> None:
    request.say_range({"Content-Encoding": "gzip"})


def of_no_length(request: Request) -> None:
    request.say_range({"Content-Length": None, "Transfer-Encoding": "chunked"}, lambda body: b"5\r\nhello\r\n0\r\n\r\n")


def another_range(request: Request) -> None:
    first, end = request.range()
    request.say_range({"Content-Range": f"bytes {first + 1}-{end}/{end + 1}"})


def wrong_bytes(request: Request) -> None:
    request.say_range(change=lambda body: bytes([body[0] ^ 1]) + body[1:])


def redirect_loop(request: Request) -> None:
    request.say(302, {"Location": request.path + "x"})


def redirect_to_itself(request: Request) -> None:
    request.say(302, {"Location": request.path})


def redirect_to_a_file(request: Request) -> None:
    request.say(302, {"Location": "file:///etc/passwd"})


def redirect_to_metadata(request: Request) -> None:
    request.say(302, {"Location": "http://169.254.169.254/latest/meta-data/"})


def redirect_with_a_password(request: Request) -> None:
    request.say(302, {"Location": "http://me:secret@127.0.0.1/"})


def redirect_nowhere(request: Request) -> None:
    request.say(302)


def endless_head(request: Request) -> None:
    request.wfile.write(b"HTTP/1.1 206 Partial Content\r\n")
    while not request.server.ended.is_set():
        request.wfile.write(b"X-Padding: " + b"x" * 900 + b"\r\n")


def endless_continue(request: Request) -> None:
    while not request.server.ended.is_set():
        request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 40)


def garbage(request: Request) -> None:
    request.wfile.write(b"\x16\x03\x01 SSH-2.0 * OK IMAP ready\r\n\r\n")
    request.close_connection = True


def silent(request: Request) -> None:
    request.server.ended.wait(30)


def stalls(request: Request) -> None:
    request.say_range(change=lambda body: body[:1000])
    request.server.ended.wait(30)


def drips(request: Request) -> None:
    request.say_range(change=lambda body: b"")
    while not request.server.ended.wait(0.05):
        request.wfile.write(b"x")


def drips_its_head(request: Request) -> None:
    while not request.server.ended.wait(0.05):
        request.wfile.write(b"H")


def another_block(request: Request) -> None:
    assert request.body is not None
    request.say(200, body=bytes(len(request.body)))


def longer_block(request: Request) -> None:
    assert request.body is not None
    request.say(200, body=request.body + b"x")
