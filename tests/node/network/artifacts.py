"""Small artifacts for the data plane's tests, put straight into a store."""

import random
from hashlib import sha256

from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage.manifest import Manifest, ManifestFile, ManifestShard
from node.storage.store import ShardStore

SEED = 20_240_607


def make(size_bytes: int, shard_size: int, seed: int = SEED) -> tuple[Manifest, list[bytes]]:
    """An artifact of random bytes in one file: its manifest, and the bytes of its shards."""
    data = random.Random(seed).randbytes(size_bytes)
    shards = [data[at : at + shard_size] for at in range(0, size_bytes, shard_size)]
    manifest = Manifest(
        format=1,
        shard_size=shard_size,
        piece_size=PIECE_SIZE,
        files=(ManifestFile("weights.bin", size_bytes, sha256(data).digest()),),
        shards=tuple(
            ManifestShard(
                ShardHash(sha256(shard).digest()),
                len(shard),
                b"".join(sha256(shard[at : at + PIECE_SIZE]).digest() for at in range(0, len(shard), PIECE_SIZE)),
            )
            for shard in shards
        ),
    )
    return manifest, shards


def put(store: ShardStore, manifest: Manifest, shards: list[bytes]) -> ManifestHash:
    """Make a store hold the whole artifact."""
    manifest_hash = manifest.manifest_hash()
    store.put_manifest(manifest.encode(), manifest_hash)
    for description, data in zip(manifest.shards, shards, strict=True):
        with store.open_partial(description.sha256, description.size, description.pieces) as partial:
            for index in range(description.piece_count):
                partial.write(index, data[index * PIECE_SIZE : (index + 1) * PIECE_SIZE])
            partial.commit()
    return manifest_hash
