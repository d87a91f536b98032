"""Looking whether held shards still are what they were, and taking the damaged ones out of service.

Owns the walk over an artifact's shards. A damaged shard is demoted: from then on it is not held, not served and not
loaded, and its good pieces are kept for the repair, which is an ordinary fetch. Knows no peers.
"""

from dataclasses import dataclass

from contracts.errors import NotFound
from contracts.types import ShardHash
from node.storage.artifact import Progress, ProgressCallback, no_progress
from node.storage.manifest import Manifest, ManifestShard
from node.storage.proving import Damaged, OnBytes, damaged_pieces
from node.storage.store import ShardStore


@dataclass(frozen=True)
class ScrubReport:
    """What a walk found."""

    checked_bytes: int
    whole: tuple[ShardHash, ...]
    damaged: dict[ShardHash, tuple[int, ...]]
    """The bad pieces of each shard that was demoted."""
    missing: tuple[ShardHash, ...]


def scrub_shard(
    store: ShardStore,
    shard: ManifestShard,
    on_bytes: OnBytes = lambda count: None,
    damaged: Damaged = damaged_pieces,
) -> tuple[int, ...]:
    """Check one held shard; when it is damaged it is demoted and its bad pieces are returned. `on_bytes`, `damaged`:
    see `ShardStore.verify`."""
    found = tuple(store.verify(shard.sha256, shard.pieces, on_bytes, damaged))
    if found:
        store.demote(shard.sha256)
    return found


def scrub(store: ShardStore, manifest: Manifest, on_progress: ProgressCallback = no_progress) -> ScrubReport:
    """Check every held shard of an artifact."""
    whole: list[ShardHash] = []
    damaged: dict[ShardHash, tuple[int, ...]] = {}
    missing: list[ShardHash] = []
    done = checked = 0
    for shard in {shard.sha256: shard for shard in manifest.shards}.values():
        try:
            bad = scrub_shard(store, shard)
        except NotFound:
            # Also when it went away between a look and the read: another task demoted or removed it.
            missing.append(shard.sha256)
        else:
            checked += shard.size
            if bad:
                damaged[shard.sha256] = bad
            else:
                whole.append(shard.sha256)
        done += shard.size
        on_progress(Progress("verifying", done, manifest.total_size))
    return ScrubReport(checked, tuple(whole), damaged, tuple(missing))
