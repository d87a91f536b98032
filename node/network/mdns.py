"""Nodes of the same network on the same LAN, found without an address of either (RFC 6762 and 6763).

Says where this node is and hears where others are, in the form of libp2p's specification of peer discovery by mDNS,
under a private service name made from the genesis hash: other networks' nodes are never heard of. Whoever is on the LAN
can claim anything, so an address is only one more to dial: the key that answers there is checked as always. Knows no
ledger and no sessions.
"""

import logging
import socket
from typing import Any, Final

import trio
from zeroconf import Error, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from contracts.errors import BadInput
from contracts.types import NodeId
from node.network.addresses import ControlAddress, parse_control

FOUND_MAX: Final = 64
"""Nodes that are remembered; those that come later are passed over until one goes."""

ANSWER_MS_MAX: Final = 3_000
"""How long a node that was heard of may take to say its addresses."""

KEY: Final = b"dnsaddr"

log = logging.getLogger(__name__)


def service_type(genesis_hash: bytes) -> str:
    """What nodes of one network ask for. The name of a service has at most 15 characters (RFC 6335, section 5.1)."""
    return f"_p2p-{genesis_hash.hex()[:10]}._udp.local."


class Mdns(ServiceListener):
    """`nursery.start_soon(mdns.run)`; `addresses` may be asked at any time."""

    def __init__(self, genesis_hash: bytes, own: ControlAddress, interface: str) -> None:
        """`own` is told to others. `interface`: the address of the network to speak on, an unspecified one: all."""
        self._type = service_type(genesis_hash)
        self._own = own
        self._interfaces: list[str] | None = None if interface in ("0.0.0.0", "::") else [interface]
        self._found: dict[str, ControlAddress] = {}

    def addresses(self) -> tuple[ControlAddress, ...]:
        """Where the others are."""
        return tuple(self._found.values())

    async def run(self) -> None:
        """Speak and listen until cancelled. A machine on which that cannot be goes on without."""
        try:
            zeroconf = await trio.to_thread.run_sync(self._open)
        except (OSError, Error) as error:
            log.warning("no mDNS here (%s): nodes on this LAN are found by network.bootstrap and the ledger", error)
            return
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(zeroconf.close)

    def _open(self) -> Zeroconf:
        options: dict[str, Any] = {} if self._interfaces is None else {"interfaces": self._interfaces}
        zeroconf = Zeroconf(**options)
        try:
            zeroconf.register_service(announcement(self._type, self._own.node_id, self._own, str(self._own).encode()))
            ServiceBrowser(zeroconf, self._type, self)
        except BaseException:
            zeroconf.close()
            raise
        return zeroconf

    # What zeroconf's own thread calls

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        if len(self._found) >= FOUND_MAX and name not in self._found:
            log.info("more than %d nodes on this LAN: %s is passed over", FOUND_MAX, name)
            return
        info = zc.get_service_info(type_, name, ANSWER_MS_MAX)
        found = read(info.properties.get(KEY) if info else None, NodeId(name.removesuffix(f".{type_}")))
        if found is not None and found.node_id != self._own.node_id:
            self._found[name] = found

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        self._found.pop(name, None)


def announcement(kind: str, name: str, own: ControlAddress, told: bytes) -> ServiceInfo:
    """What a node says of itself. Its address stands in the text; the address record is there because DNS-SD wants
    one."""
    hosts = sorted({str(found[4][0]) for found in socket.getaddrinfo(own.host, own.port, type=socket.SOCK_STREAM)})
    return ServiceInfo(
        kind,
        f"{name}.{kind}",
        port=own.port,
        properties={KEY: told},
        server=f"{name}.local.",
        parsed_addresses=hosts,
    )


def read(told: bytes | None, node_id: NodeId) -> ControlAddress | None:
    """A node's address as it tells it; None for what is no address, or another node's."""
    try:
        address = parse_control((told or b"").decode())
    except (BadInput, UnicodeDecodeError) as error:
        log.debug("mDNS: %s has an address that is none: %s", node_id, error)
        return None
    return address if address.node_id == node_id else None
