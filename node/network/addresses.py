"""Where a node is reached: the two endpoint forms members put on the ledger, parsed and formatted.

- control plane: a multiaddr, `/ip4/HOST/tcp/PORT/p2p/NODE_ID` (also ip6, dns4, dns6, dns), the form libp2p and
  bootstrap lists use;
- data plane: `aigen+tls://HOST:PORT`, or `aigen+tcp://HOST:PORT` where pieces go in clear. Which key must answer there
  follows from the member the endpoint belongs to, so it is not said a second time, where it could disagree.

Pure text; knows no sockets and no libp2p.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from contracts.errors import BadInput
from contracts.types import NodeId
from node.network.identity import public_key_of_node_id

ENDPOINT_CHARS_MAX: Final = 128
"""The longest endpoint the ledger takes (contracts/Members)."""

TLS_SCHEME: Final = "aigen+tls"
PLAIN_SCHEME: Final = "aigen+tcp"
DATA_SCHEMES: Final = (TLS_SCHEME, PLAIN_SCHEME)

_HOST_NAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9][A-Za-z0-9-]{0,62})*\.?\Z")
_PORT: Final = re.compile(r"[0-9]{1,5}\Z")


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """A control plane endpoint: which node, and where it listens."""

    node_id: NodeId
    kind: str
    """`ip4`, `ip6`, `dns4`, `dns6` or `dns`: how `host` is to be read."""
    host: str
    port: int

    def __str__(self) -> str:
        return f"/{self.kind}/{self.host}/tcp/{self.port}/p2p/{self.node_id}"


@dataclass(frozen=True, slots=True)
class DataAddress:
    """A data plane endpoint: where pieces are served."""

    host: str
    port: int
    plain: bool = False
    """Over plain TCP, as on networks whose packets nobody else can read or alter; else over TLS."""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{PLAIN_SCHEME if self.plain else TLS_SCHEME}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """A member's endpoints, sorted by plane."""

    control: tuple[ControlAddress, ...]
    data: tuple[DataAddress, ...]


def parse_control(text: str) -> ControlAddress:
    """A control address from its multiaddr."""
    _check_length(text)
    parts = text.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
        raise BadInput(f"{text!r} is no control address; expected /ip4/HOST/tcp/PORT/p2p/NODE_ID.")
    kind, host = parts[1], parts[2]
    if kind not in ("ip4", "ip6", "dns4", "dns6", "dns"):
        raise BadInput(f"{text!r}: {kind!r} is none of ip4, ip6, dns4, dns6, dns.")
    if kind in ("ip4", "ip6"):
        try:
            host = str(ipaddress.IPv4Address(host) if kind == "ip4" else ipaddress.IPv6Address(host))
        except ValueError:
            raise BadInput(f"{text!r}: {host!r} is no {kind} address.") from None
    elif not _HOST_NAME.match(host):
        raise BadInput(f"{text!r}: {host!r} is no host name.")
    public_key_of_node_id(parts[6])
    return ControlAddress(NodeId(parts[6]), kind, host, _port(text, parts[4]))


def parse_data(text: str) -> DataAddress:
    """A data address from `aigen+tls://HOST:PORT` or `aigen+tcp://HOST:PORT`."""
    _check_length(text)
    expected = f"{text!r} is no data address; expected {TLS_SCHEME}://HOST:PORT or {PLAIN_SCHEME}://HOST:PORT."
    try:
        split = urlsplit(text)
        host = split.hostname
    except ValueError:
        host = None
    if host is None or split.scheme not in DATA_SCHEMES:
        raise BadInput(expected)
    # Whatever else a URL may carry (user, path, query) has no meaning here and is refused with the rest.
    port = _port(text, split.netloc.rpartition(":")[2])
    address = data_address(host, port, plain=split.scheme == PLAIN_SCHEME)
    if str(address).lower() != text.lower():
        raise BadInput(expected)
    return address


def data_address(host: str, port: int, plain: bool = False) -> DataAddress:
    """A data address from its parts, host checked."""
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST_NAME.match(host):
            raise BadInput(f"{host!r} is no IP address and no host name.") from None
    return DataAddress(host, port, plain)


def control_address(node_id: NodeId, host: str, port: int) -> ControlAddress:
    """A control address from its parts; the kind follows from the host (a name becomes `dns`)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return parse_control(f"/dns/{host}/tcp/{port}/p2p/{node_id}")
    return ControlAddress(node_id, f"ip{address.version}", str(address), port)


def parse_endpoints(node_id: NodeId, endpoints: Iterable[str]) -> Endpoints:
    """The endpoints of one member, as the ledger has them; a control address of another node is refused."""
    control: list[ControlAddress] = []
    data: list[DataAddress] = []
    for text in endpoints:
        if text.startswith("/"):
            address = parse_control(text)
            if address.node_id != node_id:
                raise BadInput(f"{text!r} names node {address.node_id}, but the member is {node_id}.")
            control.append(address)
        else:
            data.append(parse_data(text))
    return Endpoints(tuple(control), tuple(data))


def is_loopback(host: str) -> bool:
    """Whether an address or host name to listen on is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_length(text: str) -> None:
    if len(text) > ENDPOINT_CHARS_MAX:
        raise BadInput(f"{text[:32]!r}... has {len(text)} characters; an endpoint has at most {ENDPOINT_CHARS_MAX}.")


def _port(text: str, digits: str) -> int:
    if _PORT.match(digits) and 1 <= int(digits) <= 65535:
        return int(digits)
    raise BadInput(f"{text!r}: {digits!r} is no port from 1 to 65535.")
