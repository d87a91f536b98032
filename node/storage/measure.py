"""A model directory hashed where it lies, as an import would cut it, and held against what was registered.

Writes nothing and needs no store; reads each byte once, in bounded memory. Knows no ledger.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contracts.errors import BadInput
from contracts.types import PIECE_SIZE, ManifestHash, ShardHash
from node.storage.artifact import Feeder, FileSource, Progress, ProgressCallback, Source, no_progress
from node.storage.directory import inspect_directory
from node.storage.hashing import BLOCK_SIZE, HASH_THREADS, ShardHasher
from node.storage.manifest import (
    FORMAT,
    Manifest,
    ManifestShard,
    check,
    check_paths,
    check_shard_count,
    check_shard_size,
)

_FILES_SHOWN_MAX = 3


def measure(
    sources: Sequence[Source],
    shard_size: int,
    on_shard: Callable[[int, ShardHash], None],
    on_progress: ProgressCallback = no_progress,
) -> Manifest:
    """The manifest that importing these files would give. What `on_shard` raises at a shard's hash ends the work."""
    check_shard_size(shard_size)
    check_paths([source.path for source in sources])
    total = sum(source.size_bytes for source in sources)
    count = check_shard_count(total, shard_size)
    feeder, shards = Feeder(sources, min(BLOCK_SIZE, shard_size)), []
    try:
        with ThreadPoolExecutor(HASH_THREADS) as executor:
            for index in range(count):
                start = index * shard_size
                size, hasher = min(shard_size, total - start), ShardHasher(executor)
                for block, parts in feeder.blocks(size, executor):
                    hasher.update(block, parts)
                    start += len(block)
                    on_progress(Progress("checking", start, total))
                shards.append(ManifestShard(ShardHash(hasher.digest()), size, hasher.pieces()))
                on_shard(index, shards[-1].sha256)
            feeder.drain()
    finally:
        feeder.close()
    manifest = Manifest(FORMAT, shard_size, PIECE_SIZE, tuple(feeder.files), tuple(shards))
    check(manifest)
    return manifest


def check_directory(
    root: Path,
    total_size: int,
    shard_size: int,
    shard_hashes: Sequence[ShardHash],
    manifest_hash: ManifestHash,
    on_progress: ProgressCallback = no_progress,
) -> Manifest:
    """The manifest of a Hugging Face directory. Raises BadInput unless it is the registered model, byte for byte."""
    sources = [FileSource(path, root / path) for path in inspect_directory(root).paths]
    total = sum(source.size_bytes for source in sources)
    if total != total_size:
        raise BadInput(
            f"{root} has {total:,} bytes in {len(sources)} files, the registered model has {total_size:,}: it is "
            "another one, or files are missing, were added or changed"
        )

    def compare(index: int, found: ShardHash) -> None:
        if found != shard_hashes[index]:
            raise BadInput(
                f"shard {index} of {root} has the SHA-256 0x{found.hex()}, registered is "
                f"0x{shard_hashes[index].hex()}: a byte differs in {_files_of(sources, index, shard_size)}"
            )

    manifest = measure(sources, shard_size, compare, on_progress)
    if manifest.manifest_hash() != manifest_hash:
        raise BadInput(
            f"{root} has the registered bytes, and its manifest 0x{manifest.manifest_hash().hex()} is not the "
            f"registered 0x{manifest_hash.hex()}: files have other names, or begin and end elsewhere"
        )
    return manifest


def _files_of(sources: Sequence[Source], index: int, shard_size: int) -> str:
    """The names of the files a shard has bytes of."""
    first, end, offset, names = index * shard_size, (index + 1) * shard_size, 0, []
    for source in sources:
        if offset < end and offset + source.size_bytes > first:
            names.append(source.path)
        offset += source.size_bytes
    more = len(names) - _FILES_SHOWN_MAX
    return ", ".join(names[:_FILES_SHOWN_MAX]) + (f" or {more} more files" if more > 0 else "")
