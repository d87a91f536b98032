"""The bounds of the RPC room, as frozen values, and the checks of what its settings name. Knows no sockets."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from contracts.errors import BadInput
from node.config import RpcSettings

ORIGIN_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@]+")
"""What a browser sends as Origin: scheme, host and perhaps a port, nothing after it."""

ANY = "*"
"""In a list of hosts or origins: all of them."""


@dataclass(frozen=True)
class RpcLimits:
    """What one client, and all together, may take. A refusal names the setting to raise where there is one."""

    body_bytes: int = 4 << 20
    """A request's body. The longest prompt the engine takes fits (2 Mi characters), with room for escapes."""
    batch_size: int = 100
    """Elements of one JSON-RPC batch."""
    batch_concurrency: int = 8
    """Elements of one batch under way at once."""
    concurrent_requests: int = 64
    """HTTP requests being worked on at once; one more waits `turn_timeout_s` and is then told to come back (503)."""
    turn_timeout_s: float = 5.0
    connections: int = 256
    """Open connections; one more waits in the kernel's backlog."""
    header_bytes: int = 16 << 10
    """A request's line and headers while they are incomplete; what comes whole in one read of 64 KiB is taken."""
    header_timeout_s: float = 10.0
    """For a request's headers to arrive, counted from the connection's opening or the answer before."""
    read_timeout_s: float = 30.0
    """For a request's body to arrive, all of it."""
    write_timeout_s: float = 30.0
    """For a client to take what is sent to it; after that the connection is cut."""
    drain_timeout_s: float = 2.0
    """How long the rest of a refused body is read away, so that the client gets to see why it was refused."""
    drain_bytes: int = 64 << 20
    """How much of it."""
    keep_alive_s: float = 15.0
    """A stream with nothing to say sends a comment this often, so that proxies keep it open."""
    log_blocks: int = 10_000
    """Blocks one question for logs may span."""
    log_results: int = 10_000
    """Logs of one answer, and ..."""
    log_bytes: int = 4 << 20
    """... bytes of their data. A filter's changes that are more come with the next question."""
    call_gas: int = 10_000_000
    """Gas a call that is only tried may use. The largest registration (1,024 shards) takes 0.9 million."""
    ledger_threads: int = 2
    """Threads in which final blocks are read and calls are tried; further questions wait for one."""
    filters: int = 256
    """Filters kept for all clients together."""
    filter_idle_s: float = 300.0
    """A filter that nobody asks for so long is forgotten."""
    websockets: int = 64
    """WebSocket connections; fewer than `connections`, so that they leave room for plain requests."""
    websocket_calls: int = 8
    """Messages of one WebSocket connection being answered at once; the next is read when one is done."""
    subscriptions: int = 32
    """Subscriptions of one WebSocket connection."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise BadInput(f"rpc.{field.name} is {getattr(self, field.name)}; it is above 0")

    @staticmethod
    def of(settings: RpcSettings) -> RpcLimits:
        """The limits the node's settings ask for."""
        return RpcLimits(
            body_bytes=settings.body_bytes,
            batch_size=settings.batch_size,
            concurrent_requests=settings.concurrent_requests,
            log_blocks=settings.log_blocks,
            call_gas=settings.call_gas,
        )


def check_names(settings: RpcSettings) -> None:
    """Raise BadInput when a configured host or origin could never match."""
    for origin in settings.allowed_origins:
        if origin != ANY and not ORIGIN_PATTERN.fullmatch(origin):
            raise BadInput(
                f"rpc.allowed_origins has {origin!r}; an origin is scheme, host and port in lower case, "
                "such as http://localhost:3000"
            )
    for host in settings.allowed_hosts:
        if not host or host != host.strip().lower() or "/" in host:
            raise BadInput(f"rpc.allowed_hosts has {host!r}; a host is a bare name in lower case, without a port")


def check_any_origin(settings: RpcSettings, loopback: bool) -> None:
    """Raise BadInput when every web page could act as the operator."""
    if loopback and ANY in settings.allowed_origins:
        raise BadInput(
            f'rpc.allowed_origins has "{ANY}" while rpc.host {settings.host} is loopback, where a question without a '
            "token is the operator's: any web page could drive this node; name the origins"
        )
