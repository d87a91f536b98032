"""The sockets under the application: listeners, connections and their limits, on hypercorn's HTTP/1.1 for trio.

hypercorn's own `serve` has no bound on connections, sends under a shield without a deadline (a client that stops
reading could keep the node from ever stopping), and its `read_timeout` also cuts off a client that waits for a long
answer. So the connections are accepted here and handed to its TCPServer, and the deadlines are kept here and in
`guard`. Knows no method.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from contracts.errors import BadInput, Conflict, NotAllowed
from ledger.ledger import Ledger
from node.config import RpcSettings
from node.rpc import methods as aigen_methods
from node.rpc.ethereum import Ethereum
from node.rpc.guard import Guard
from node.rpc.http import RpcApp
from node.rpc.jsonrpc import Dispatcher, Method
from node.rpc.limits import RpcLimits, check_any_origin, check_names
from node.rpc.port import NodePort

logger = logging.getLogger("aigen.rpc")


KEEP_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
"""Seconds of silence before the kernel asks, seconds between its questions, questions without an answer."""


@dataclass(frozen=True)
class RpcStatistics:
    """What the server did since it began and is doing now."""

    connections: int
    connections_total: int
    requests_active: int
    requests_total: int
    requests_refused: int
    websockets: int


class Started(Protocol):
    """trio's TaskStatus for the URLs (the stubs that come with libp2p do not know that name)."""

    def started(self, value: list[str], /) -> None: ...


class Connection(trio.abc.HalfCloseableStream):
    """A client's socket whose sends have a deadline and which can be cut from outside."""

    def __init__(self, stream: trio.SocketStream, write_timeout_s: float) -> None:
        self._stream = stream
        self._write_timeout_s = write_timeout_s
        self.socket = stream.socket
        self.tasks = trio.CancelScope()
        """Around everything that serves this client."""

    async def send_all(self, data: bytes | memoryview) -> None:
        with trio.move_on_after(self._write_timeout_s) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            # hypercorn would take the failure for the client's leaving, and go on reading from one that has not left.
            self.abort()
            raise trio.BrokenResourceError(f"the client took nothing for {self._write_timeout_s:g} s")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Whoever waits on the socket wakes with ClosedResourceError, under a shield too. The rest is cancelled: it may
        wait for a task of the connection that no longer takes anything."""
        self.socket.close()
        self.tasks.cancel()


class LimitedListener(trio.abc.Listener[Connection]):
    """Hands out a connection only when one of `slots` is free; whoever serves it releases the slot."""

    def __init__(self, listener: trio.SocketListener, slots: trio.Semaphore, write_timeout_s: float) -> None:
        self._listener = listener
        self._slots = slots
        self._write_timeout_s = write_timeout_s

    async def accept(self) -> Connection:
        stream = await self._listener.accept()
        # A WebSocket may be silent for long: the kernel finds out when its other end is gone without a word.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
        try:
            await self._slots.acquire()
        except trio.Cancelled:
            stream.socket.close()
            raise
        return Connection(stream, self._write_timeout_s)

    async def aclose(self) -> None:
        await self._listener.aclose()


class RpcServer:
    """The RPC room of one node. `methods` are AIGEN's unless others are given; with a ledger, Ethereum's as well."""

    def __init__(
        self,
        node: NodePort,
        settings: RpcSettings,
        limits: RpcLimits | None = None,
        *,
        ledger: Ledger | None = None,
        methods: Mapping[str, Method] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_names(settings)
        self._node = node
        self._settings = settings
        self._limits = limits or RpcLimits.of(settings)
        self._ethereum = None if ledger is None else Ethereum(ledger, self._limits, lambda: node.node_info().sync)
        self._methods = {
            **(aigen_methods.table(node) if methods is None else methods),
            **(self._ethereum.table() if self._ethereum is not None else {}),
        }
        self._clock = clock
        self._app: RpcApp | None = None
        self._live: set[Connection] = set()
        self._connections_total = 0

    def statistics(self) -> RpcStatistics:
        app = self._app
        return RpcStatistics(
            connections=len(self._live),
            connections_total=self._connections_total,
            requests_active=app.requests_active if app else 0,
            requests_total=app.requests_done if app else 0,
            requests_refused=app.requests_refused if app else 0,
            websockets=app.websockets if app else 0,
        )

    async def serve(self, *, task_status: Started = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and answer until cancelled; reports the URLs when ready. Raises Conflict when the port is in use."""
        sockets = await self._listen()
        loopback = all(_is_loopback(listener) for listener in sockets)
        try:
            check_any_origin(self._settings, loopback)
        except BadInput:
            for listener in sockets:
                listener.socket.close()
            raise
        dispatcher = Dispatcher(self._methods, self._limits.batch_concurrency, aigen_methods.ORDERED)
        self._app = RpcApp(self._node, dispatcher, self._limits, loopback, self._clock, self._ethereum)
        guard = Guard(self._app.asgi(), self._settings, self._limits, loopback)
        slots = trio.Semaphore(self._limits.connections)
        config = self._hypercorn_config()
        # hypercorn types its callables as unions of TypedDicts, Starlette as mappings: the same values.
        application, context = ASGIWrapper(cast(Any, guard)), WorkerContext(None)

        async def handle(connection: Connection) -> None:
            self._live.add(connection)
            self._connections_total += 1
            try:
                state = ConnectionState({"connection": connection})
                with connection.tasks:
                    await TCPServer(application, config, context, state, cast(Any, connection)).run()
            except Exception:
                # One connection's surprise in the HTTP library is not the node's end.
                logger.exception("a connection was dropped for a bug in the HTTP server")
            finally:
                self._live.discard(connection)
                slots.release()

        listeners = [LimitedListener(listener, slots, self._limits.write_timeout_s) for listener in sockets]
        async with trio.open_nursery() as nursery:
            try:
                task_status.started([_url(listener) for listener in sockets])
                await trio.serve_listeners(handle, listeners, handler_nursery=nursery)
            finally:
                for connection in self._live:
                    connection.abort()

    async def _listen(self) -> Sequence[trio.SocketListener]:
        host, port = self._settings.host, self._settings.port
        try:
            return await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            where = f"{host} port {port}"
            if error.errno == errno.EADDRINUSE:
                line = f"{where} is in use: stop what listens there, or choose another with `aigen start --rpc-port`"
                raise Conflict(line) from error
            if error.errno == errno.EACCES:
                raise NotAllowed(f"this user may not listen on {where}: choose a port above 1023") from error
            raise BadInput(f"cannot listen on {where}: {error}; set rpc.host to an address of this machine") from error

    def _hypercorn_config(self) -> Config:
        config = Config()
        config.errorlog = logger
        config.accesslog = None
        config.include_server_header = False
        config.keep_alive_timeout = self._limits.header_timeout_s
        config.h11_max_incomplete_size = self._limits.header_bytes
        return config


def _is_loopback(listener: trio.SocketListener) -> bool:
    return ipaddress.ip_address(_address(listener)[0]).is_loopback


def _url(listener: trio.SocketListener) -> str:
    host, port = _address(listener)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address(listener: trio.SocketListener) -> tuple[str, int]:
    name: Any = listener.socket.getsockname()
    return str(name[0]).partition("%")[0], int(name[1])
