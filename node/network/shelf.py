"""What this node has to give: manifests, and pieces of shards held or in flight, each proved before it leaves.

Finds the piece hashes of a shard in the manifests of the store, so whoever serves needs the shard's name only. Knows
no sockets. Thread-safe and blocking.
"""

import logging
import threading
from typing import Protocol

from contracts.errors import BadInput, Corrupt, NotAllowed, NotFound
from contracts.types import ManifestHash, ShardHash
from node.storage.manifest import HASH_SIZE, Manifest

log = logging.getLogger(__name__)


class StorePort(Protocol):
    """The reading part of `node.storage.store.ShardStore`."""

    def manifests(self) -> list[ManifestHash]: ...

    def manifest(self, manifest_hash: ManifestHash) -> Manifest: ...

    def manifest_bytes(self, manifest_hash: ManifestHash) -> bytes: ...

    def held(self, shard_hash: ShardHash) -> bool: ...

    def arrived(self, shard_hash: ShardHash) -> bytes | None: ...

    def read_piece(
        self, shard_hash: ShardHash, index: int, piece_hash: bytes | None = None, buffer: bytearray | None = None
    ) -> memoryview: ...


class Shelf:
    """Reads from the store what may be served."""

    def __init__(self, store: StorePort) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._indexed: set[ManifestHash] = set()
        self._piece_hashes: dict[ShardHash, bytes] = {}

    def manifest_bytes(self, manifest_hash: ManifestHash) -> bytes:
        """Raises NotFound, or Corrupt."""
        return self._store.manifest_bytes(manifest_hash)

    def piece(self, shard_hash: ShardHash, index: int, buffer: bytearray | None = None) -> memoryview:
        """A piece whose SHA-256 was taken just now, in `buffer`. Raises NotFound, or Corrupt when the disk lies."""
        hashes = self._hashes(shard_hash)
        if not 0 <= index * HASH_SIZE < len(hashes):
            raise NotFound(f"shard {shard_hash.hex()} has {len(hashes) // HASH_SIZE:,} pieces, none is number {index}")
        try:
            piece_hash = hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE]
            return self._store.read_piece(shard_hash, index, piece_hash, buffer)
        except (BadInput, NotAllowed) as error:  # removed meanwhile, or not ours to read: the path stays in our log
            log.warning("not served: %s", error)
            raise NotFound(f"shard {shard_hash.hex()} cannot be read here") from None

    def piece_count(self, shard_hash: ShardHash) -> int:
        """Of a shard in a manifest that is here. Raises NotFound."""
        return len(self._hashes(shard_hash)) // HASH_SIZE

    def have(self, shard_hash: ShardHash) -> bytes:
        """Which pieces can be had: bit i % 8 of byte i // 8; empty for all. Raises NotFound when none can."""
        arrived = self._store.arrived(shard_hash)
        if arrived is not None and not self._store.held(shard_hash):
            return arrived
        if self._store.held(shard_hash):
            return b""
        raise NotFound(f"nothing of shard {shard_hash.hex()} is here")

    def _hashes(self, shard_hash: ShardHash) -> bytes:
        with self._lock:
            if shard_hash not in self._piece_hashes:
                self._read_new_manifests()
            hashes = self._piece_hashes.get(shard_hash)
        if hashes is None:
            raise NotFound(f"shard {shard_hash.hex()} is in none of the manifests here")
        return hashes

    def _read_new_manifests(self) -> None:
        """Take in what came since the last look; another process may have imported a model."""
        for manifest_hash in self._store.manifests():
            if manifest_hash in self._indexed:
                continue
            try:
                manifest = self._store.manifest(manifest_hash)
            except (BadInput, Corrupt, NotFound) as error:  # one bad file must not hide the others
                log.warning("skipped a manifest: %s", error)
                continue
            self._indexed.add(manifest_hash)
            for shard in manifest.shards:
                self._piece_hashes.setdefault(shard.sha256, shard.pieces)
