"""What the tests of kills and failing disks run in child processes: one fetch of one shard from one mirror."""

from __future__ import annotations

import ctypes
from pathlib import Path

import trio

from contracts.errors import Refused
from contracts.types import ManifestHash
from node.network.fetching.fetcher import Fetcher
from node.network.identity import NodeIdentity
from node.network.sources import MirrorSource
from node.storage.store import ShardStore
from tests.ledger.zygote import Tell

# Jobs


def fetch(tell: Tell, root: str, manifest_hash: str, url: str) -> None:
    """Told are the bytes of the first shard that are here, first those that lay here already."""
    store = ShardStore(Path(root), reserve_bytes=0)
    fetcher = Fetcher(store, NodeIdentity.generate())

    async def main() -> None:
        manifest = store.manifest(ManifestHash(bytes.fromhex(manifest_hash)))
        await fetcher.fetch_shard(manifest.shards[0], [MirrorSource(url)], tell)

    trio.run(main)


def starve(tell: Tell, root: str, manifest_hash: str, url: str, nth: int, number: int) -> None:
    """From the `nth` change to the disk on every one fails with errno `number`; 0: none does. Told are the changes
    there were, and what the fetch was refused with."""
    faults = ctypes.CDLL(None)
    faults.fault_arm(root.encode(), nth, number)
    refused = None
    try:
        fetch(lambda here: None, root, manifest_hash, url)
    except Refused as error:
        refused = type(error).__name__, str(error)
    changes = faults.fault_count()
    faults.fault_arm(b"", 0, 0)
    tell({"changes": changes, "refused": refused})
