"""Small artifacts for the data plane's tests, put straight into a store."""

import random
from hashlib import sha256

import numpy as np

from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage.manifest import Manifest, ManifestFile, ManifestShard
from node.storage.store import ShardStore

SEED = 20_240_607


def make(size_bytes: int, shard_size: int, seed: int = SEED) -> tuple[Manifest, list[bytes]]:
    """An artifact of random bytes in one file: its manifest, and the bytes of its shards."""
    return describe(random.Random(seed).randbytes(size_bytes), shard_size)


def weights(size_bytes: int, kind: str = "bf16", seed: int = SEED) -> bytes:
    """Numbers spread as the weights of a layer are, as bf16, fp16 or fp32."""
    floats = np.random.default_rng(seed).normal(0.0, 0.02, size_bytes // 2 + 1).astype(np.float32)
    if kind == "bf16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()[:size_bytes]
    return floats.astype({"fp16": np.float16, "fp32": np.float32}[kind]).tobytes()[:size_bytes]


def describe(data: bytes, shard_size: int) -> tuple[Manifest, list[bytes]]:
    """An artifact of these bytes in one file."""
    size_bytes = len(data)
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
