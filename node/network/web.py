"""HTTP/1.1 GET of large bodies from servers nobody trusts: one connection at a time, read into the caller's buffers.

Owns how far a URL may lead: http and https only, few redirects, none to a more private address than where it came
from, bounded heads, deadlines that a byte now and then does not satisfy, no compression, no credentials, no proxies.
Knows no shards. What it raises is the server's doing: Busy, or BadPeer.
"""

import functools
import io
import ssl
from collections.abc import Callable
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from ipaddress import IPv6Address, ip_address
from socket import SOCK_STREAM, gaierror, socket
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit

import trio

from contracts.errors import BadInput, BadPeer, Busy
from node.network.sources import check_url
from node.network.wire import Channel, DataLimits, NotThere, dial, run_on

T = TypeVar("T")

REDIRECTS_MAX: Final = 5
HEAD_BYTES_MAX: Final = 64 << 10
ADDRESSES_MAX: Final = 4
"""Addresses of one host that are tried."""
AGENT: Final = "aigen"

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_LOOPBACK, _PRIVATE, _PUBLIC = range(3)


class Answer:
    """A response whose head has come. Used in the worker thread that received it."""

    def __init__(self, response: HTTPResponse, channel: Channel, limits: DataLimits) -> None:
        self._response = response
        self._channel = channel
        self._limits = limits

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def size(self) -> int | None:
        """Bytes of the body; None when the server does not say."""
        return self._response.length

    def header(self, name: str) -> str:
        return str(self._response.getheader(name, "")).strip()

    def check(self, status: int, size: int) -> None:
        """Before a byte of the body is taken: it must be what was asked for, as it is stored."""
        if self.status != status:
            what = f"answers {self.status} {self._response.reason[:80]}".rstrip()
            # What is not there yet, or not now, may be there later.
            if self.status in {404, 410}:
                raise NotThere(what)
            if self.status in {401, 403, 408, 425, 429} or self.status >= 500:
                raise Busy(what)
            raise BadPeer(f"{what} ({self.header('Content-Type')[:80] or 'no type'}) where {status} is due")
        if (coding := self.header("Content-Encoding")) not in {"", "identity"}:
            raise BadPeer(f"answers with {coding[:80]!r} encoding, which was not asked for")
        if self.size != size:
            said = "does not say its length" if self.size is None else f"has {self.size:,} bytes"
            raise BadPeer(f"its answer {said} where {size:,} are due")

    def read_into(self, view: memoryview) -> None:
        """The next bytes of the body, within the time for a piece."""
        self._channel.within(self._limits.piece_s)
        size = len(view)
        while view:
            count = self._response.readinto(view)
            if not count:
                raise Busy(f"the connection was closed after {size - len(view):,} of {size:,} bytes")
            view = view[count:]


class WebClient:
    """Use as a context manager. The connection is kept for the next request to the same place."""

    def __init__(self, limits: DataLimits) -> None:
        self._limits = limits
        self._socket: socket | None = None
        self._origin: tuple[str, str, int] | None = None
        self._rank = _PUBLIC

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    async def get(
        self,
        url: str,
        use: Callable[[Answer], T],
        headers: dict[str, str] | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> T:
        """Send a request and run `use` on the answer in a worker thread, where redirects lead to."""
        floor = _lowest_rank(urlsplit(url).hostname or "")
        for _ in range(REDIRECTS_MAX + 1):
            parts = urlsplit(url)
            sock = await self._connect(parts, floor)
            exchange = functools.partial(self._exchange, sock, parts, headers or {}, use)
            try:
                found = await run_on(sock, exchange, wake)
            except BaseException:
                self._close()
                raise
            if not isinstance(found, _Redirect):
                return found
            self._close()
            floor = max(floor, self._rank)
            url = _checked(url, found.location)
        raise BadPeer(f"redirects more than {REDIRECTS_MAX} times, at last to {url[:80]!r}")

    async def _connect(self, parts: SplitResult, floor: int) -> socket:
        host = parts.hostname
        assert host is not None, "checked before"
        origin = parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80)
        if self._socket is not None and self._origin == origin and self._rank >= floor:
            return self._socket
        self._close()
        failure: Busy | None = None
        for address in await self._addresses(host, origin[2], floor):
            try:
                sock = await dial(address, origin[2], self._limits)
            except Busy as error:
                failure = error
                continue
            self._rank = _rank(address)
            return await self._secured(sock, origin)
        raise failure or Busy(f"{host} has no address")

    async def _addresses(self, host: str, port: int, floor: int) -> list[str]:
        """Where a host is, as far as we may go there. What was looked up is what is dialled."""
        try:
            with trio.fail_after(self._limits.connect_s):
                found = await trio.socket.getaddrinfo(host, port, type=SOCK_STREAM)
        except trio.TooSlowError:
            raise Busy(f"{host} was not looked up within {self._limits.connect_s:.0f} s") from None
        except (gaierror, UnicodeError) as error:
            raise Busy(f"{host} has no address: {error}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        allowed = [address for address in addresses if _rank(address) >= floor]
        if not allowed:
            raise BadPeer(f"{host} leads to {addresses[0]}, an address that nothing from outside may lead to")
        return allowed[:ADDRESSES_MAX]

    async def _secured(self, sock: socket, origin: tuple[str, str, int]) -> socket:
        scheme, host, _ = origin
        try:
            if scheme == "https":
                tls = _tls().wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
                sock = tls
                channel = Channel(tls)
                channel.within(self._limits.handshake_s)
                await run_on(tls, channel.handshake)
        except OSError as error:
            sock.close()
            raise Busy(f"no connection: {error.strerror or error}") from None
        except BaseException:
            sock.close()
            raise
        self._socket, self._origin = sock, origin
        return sock

    def _exchange(
        self, sock: socket, parts: SplitResult, headers: dict[str, str], use: Callable[[Answer], T]
    ) -> "T | _Redirect":
        """One request and its answer, in a worker thread."""
        channel = Channel(sock)
        channel.within(self._limits.piece_s)
        try:
            response = _ask(channel, parts, headers)
        except (HTTPException, ValueError) as error:
            raise BadPeer(f"what it answers is not HTTP: {type(error).__name__} {str(error)[:80]}") from None
        if response.status in _REDIRECTS:
            return _Redirect(str(response.getheader("Location", "")))
        found = use(Answer(response, channel, self._limits))
        if response.will_close or not response.isclosed():
            self._close()
        return found

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _Redirect:
    def __init__(self, location: str) -> None:
        self.location = location


def _ask(channel: Channel, parts: SplitResult, headers: dict[str, str]) -> HTTPResponse:
    """Send a request and take the head of its answer."""
    assert parts.hostname is not None
    default_port = 443 if parts.scheme == "https" else 80
    http = HTTPConnection(parts.hostname, parts.port or default_port)
    http.default_port = default_port
    http.auto_open = 0
    stream = _Stream(channel)
    http.sock = _Socket(channel, stream)
    http.putrequest("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), skip_accept_encoding=True)
    for name, value in {"User-Agent": AGENT, "Accept-Encoding": "identity", **headers}.items():
        http.putheader(name, value)
    http.endheaders()
    response = http.getresponse()
    stream.in_head = False
    return response


class _Socket:
    """As much of a socket as `http.client` uses. It does not own the real one."""

    def __init__(self, channel: Channel, stream: "_Stream") -> None:
        self._channel = channel
        self._stream = stream

    def sendall(self, data: bytes) -> None:
        self._channel.send(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._stream)

    def close(self) -> None:
        """The connection is closed by its owner, who may still be reading."""


class _Stream(io.RawIOBase):
    """What comes over a channel, as a file."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._head_bytes = 0
        self.in_head = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._channel.receive_some(memoryview(buffer))
        self._head_bytes += count
        if self.in_head and self._head_bytes > HEAD_BYTES_MAX:
            raise BadPeer(f"the head of its answer is longer than {HEAD_BYTES_MAX:,} bytes")
        return count


def _checked(url: str, location: str) -> str:
    """Where a redirect leads. Raises BadPeer."""
    try:
        target = urljoin(url, location)
        check_url(target)
    except (BadInput, ValueError) as error:
        raise BadPeer(f"redirects to what is no address: {error}") from None
    if not location or target == url:
        raise BadPeer("redirects to nowhere else")
    if url.startswith("https:") and not target.startswith("https:"):
        raise BadPeer(f"redirects from https to {target[:80]!r}")
    return target


def _lowest_rank(host: str) -> int:
    """The most private kind of address that a host in a URL may lead to: loopback only if that is what it says."""
    try:
        return max(_LOOPBACK, _rank(str(ip_address(host))))
    except ValueError:
        return _LOOPBACK if host == "localhost" else _PRIVATE


def _rank(address: str) -> int:
    """How public an address is; below all for what nobody has reason to fetch from (link-local: cloud metadata)."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:
        return _LOOPBACK
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified or ip.is_reserved:
        return -1
    return _PUBLIC if ip.is_global else _PRIVATE


@cache
def _tls() -> ssl.SSLContext:
    """The machine's certificate authorities, read once."""
    return ssl.create_default_context()
