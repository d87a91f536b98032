"""Small models and artifacts for the tests of node/storage."""

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from random import Random

from contracts.types import PIECE_SIZE, ShardHash
from node.storage.artifact import Source, cut
from node.storage.manifest import FORMAT, Manifest, ManifestFile, ManifestShard
from node.storage.store import ShardStore

BOUNDARIES = sorted(
    {0, 1, 7, *(n * PIECE_SIZE + delta for n in (1, 2, 3, 4) for delta in (-1, 0, 1))},
)
"""Sizes around piece and shard boundaries, for shards of one and of two pieces."""


def noise(size: int, seed: int) -> bytes:
    return Random(seed).randbytes(size)


class MemorySource:
    """A file of an artifact that lives in memory."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.data = data
        self.size_bytes = len(data)

    def open(self) -> None: ...

    def read(self, view: memoryview, offset: int) -> None:
        view[:] = self.data[offset : offset + len(view)]

    def close(self) -> None: ...

    def finish(self) -> None: ...

    def prove(self, digest: bytes) -> None: ...


def memory_sources(contents: Iterable[bytes]) -> list[Source]:
    return [MemorySource(f"file-{index:04d}", data) for index, data in enumerate(contents)]


def manifest_of(contents: list[bytes], shard_size: int) -> tuple[Manifest, list[bytes]]:
    """What cutting must give, computed the slow and obvious way, and the shards themselves."""
    whole = b"".join(contents)
    blobs = [whole[at : at + shard_size] for at in range(0, len(whole), shard_size)]
    files = tuple(
        ManifestFile(f"file-{index:04d}", len(data), sha256(data).digest()) for index, data in enumerate(contents)
    )
    shards = tuple(ManifestShard(ShardHash(sha256(b).digest()), len(b), piece_hashes(b)) for b in blobs)
    return Manifest(FORMAT, shard_size, PIECE_SIZE, files, shards), blobs


def piece_hashes(data: bytes) -> bytes:
    return b"".join(sha256(data[at : at + PIECE_SIZE]).digest() for at in range(0, len(data), PIECE_SIZE))


def pieces(data: bytes) -> list[bytes]:
    return [data[at : at + PIECE_SIZE] for at in range(0, len(data), PIECE_SIZE)]


def stored(store: ShardStore, contents: list[bytes], shard_size: int = 2 * PIECE_SIZE) -> Manifest:
    manifest = cut(memory_sources(contents), store, shard_size)
    store.put_manifest(manifest.encode(), manifest.manifest_hash())
    return manifest


def safetensors(tensors: Mapping[str, bytes], **changes: object) -> bytes:
    """A safetensors file of byte tensors; `changes` replace fields of the first one."""
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    header[next(iter(tensors))].update(changes)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(tensors.values())


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 128}


def model_directory(root: Path, weight_sizes: Iterable[int] = (100,), seed: int = 1) -> Path:
    """A directory that looks like a model: config, tokenizer and weight files (with their index when several)."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "tokenizer.json").write_text("{}")
    sizes = list(weight_sizes)
    if len(sizes) == 1:
        (root / "model.safetensors").write_bytes(safetensors({"w0": noise(sizes[0], seed)}))
        return root
    names = [f"model-{index + 1:05d}-of-{len(sizes):05d}.safetensors" for index in range(len(sizes))]
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        (root / name).write_bytes(safetensors({f"w{index}": noise(size, seed + index)}))
    index_text = json.dumps({"weight_map": {f"w{index}": name for index, name in enumerate(names)}})
    (root / "model.safetensors.index.json").write_text(index_text)
    return root


def contents_of(root: Path) -> dict[str, bytes]:
    """Every file under a directory: what must be the same afterwards."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
