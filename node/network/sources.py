"""Where a shard can be had: a peer, an HTTP mirror or an IPFS gateway; and the names each knows a shard by.

Owns what a mirror's address may look like: it comes from the ledger, so it is checked like anything from outside.
Pure text; knows no sockets.
"""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from contracts.errors import BadInput
from contracts.types import NodeId
from node.network.addresses import DataAddress
from node.storage.unixfs import cid_text, raw_cid

URL_CHARS_MAX: Final = 2048
"""Also of a URL that a mirror redirects to; the ledger takes 256."""

_PRINTABLE: Final = re.compile(r"[!-~]+\Z")


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A node that serves pieces, and where."""

    node_id: NodeId
    address: DataAddress

    def __str__(self) -> str:
        return f"{self.node_id} at {self.address}"


@dataclass(frozen=True, slots=True)
class MirrorSource:
    """A static web server. `prefix` has no slash at its end."""

    prefix: str

    def __str__(self) -> str:
        return f"mirror {self.prefix}"

    def shard_url(self, shard_hash: bytes) -> str:
        return f"{self.prefix}/shards/{shard_hash.hex()}"

    def manifest_url(self, manifest_hash: bytes) -> str:
        return f"{self.prefix}/manifests/{manifest_hash.hex()}"


@dataclass(frozen=True, slots=True)
class GatewaySource:
    """A trustless IPFS gateway: it answers with the raw block of a CID. `prefix` has no slash at its end."""

    prefix: str

    def __str__(self) -> str:
        return f"gateway {self.prefix}"

    def block_url(self, block_hash: bytes) -> str:
        """Where the block with this SHA-256 is: a piece, or a manifest."""
        return f"{self.prefix}/ipfs/{cid_text(raw_cid(block_hash))}?format=raw"


WebSource = MirrorSource | GatewaySource
Source = PeerSource | WebSource


def web_source(backend: str, uri: str) -> WebSource:
    """A location of backend `http` or `ipfs`. Raises BadInput."""
    check_url(uri)
    if urlsplit(uri).query:
        raise BadInput(f"{uri!r} has a query; the address of a mirror is a prefix that paths are added to")
    match backend:
        case "http":
            return MirrorSource(uri.rstrip("/"))
        case "ipfs":
            return GatewaySource(uri.rstrip("/"))
    raise BadInput(f"{backend!r} is no kind of mirror; http and ipfs are")


def check_url(url: str) -> None:
    """An absolute http or https URL that tells nobody's password. Raises BadInput."""
    shown = repr(url[:80])
    if len(url) > URL_CHARS_MAX:
        raise BadInput(f"{shown}... has {len(url):,} characters; a URL has at most {URL_CHARS_MAX:,} here")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadInput(f"{shown} is no URL: {error}") from None
    if not _PRINTABLE.match(url) or parts.scheme not in {"http", "https"} or not host or port == 0:
        raise BadInput(f"{shown} is no URL to fetch from; expected http://HOST/... or https://HOST/...")
    if "@" in parts.netloc:
        raise BadInput(f"the URL of {parts.hostname} carries a user name or password; none is ever sent")
    if parts.fragment:
        raise BadInput(f"{shown} has a fragment, which no server gets to see")
