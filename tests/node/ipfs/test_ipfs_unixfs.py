"""The root CIDs of shards beside those of an independent implementation, @helia/unixfs, for the same bytes."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest

from contracts.types import PIECE_SIZE, ShardHash
from node.storage.export import export
from node.storage.manifest import ManifestShard
from node.storage.store import ShardStore
from node.storage.unixfs import LINKS_MAX, Node, cid_text, raw_cid, root_cid, tree
from tests.node.network.artifacts import make, put
from tests.tools import npm_libraries, run_node

SCRIPT = Path(__file__).with_name("unixfs.mjs")
SEED = 499


@pytest.fixture(scope="module")
def libraries() -> Path:
    return npm_libraries("helia")


def shard_of(data: bytes, times: int = 1, rest: bytes = b"") -> ManifestShard:
    """As a manifest has it: `data`, whole pieces when it is taken several times, and something after it."""
    pieces = b"".join(sha256(data[at : at + PIECE_SIZE]).digest() for at in range(0, len(data), PIECE_SIZE)) * times
    pieces += sha256(rest).digest() if rest else b""
    return ManifestShard(ShardHash(bytes(32)), len(data) * times + len(rest), pieces)


def test_shards_of_any_size(libraries: Path, tmp_path: Path) -> None:
    """From one byte to one more than a node has links for: 1 GiB, of which the same MiB is read again and again."""
    random = Random(SEED)
    sizes = [1, 1000, PIECE_SIZE - 1, PIECE_SIZE, PIECE_SIZE + 1, 3 * PIECE_SIZE, 5 * PIECE_SIZE + 77]
    sizes += [random.randrange(1, 4 * PIECE_SIZE) for _ in range(5)]
    jobs: list[dict[str, Any]] = []
    expected = []
    for number, size in enumerate(sizes):
        data = random.randbytes(size)
        (tmp_path / str(number)).write_bytes(data)
        jobs.append({"parts": [[str(tmp_path / str(number)), 1]]})
        expected.append(root_cid(shard_of(data)))
    piece, byte = random.randbytes(PIECE_SIZE), b"x"
    (tmp_path / "piece").write_bytes(piece)
    (tmp_path / "byte").write_bytes(byte)
    jobs.append({"parts": [[str(tmp_path / "piece"), LINKS_MAX], [str(tmp_path / "byte"), 1]]})
    expected.append(root_cid(shard_of(piece, LINKS_MAX, byte)))
    assert run_node(libraries, SCRIPT, jobs) == expected, f"seed {SEED}"


def test_trees_of_any_shape(libraries: Path, tmp_path: Path) -> None:
    """Three levels and more, with smaller pieces and fewer links on both sides."""
    jobs = []
    expected = []
    for chunk, links, size in [
        (1, LINKS_MAX, LINKS_MAX + 1),
        (5, LINKS_MAX, 12_345),
        (7, 3, 1000),
        (1, 2, 33),
        (4, 4, 256),
    ]:
        data = Random(size).randbytes(size)
        path = tmp_path / f"{chunk}-{links}"
        path.write_bytes(data)
        jobs.append({"parts": [[str(path), 1]], "chunk": chunk, "links": links})
        chunks = [data[at : at + chunk] for at in range(0, size, chunk)]
        leaves = [Node(raw_cid(sha256(part).digest()), len(part), len(part)) for part in chunks]
        expected.append(cid_text(tree(leaves, links)[-1].cid))
    assert run_node(libraries, SCRIPT, jobs) == expected


def test_an_exported_directory_taken_in_by_an_ipfs_node(libraries: Path, tmp_path: Path) -> None:
    """Its files get the CIDs that `aigen shard cid` prints, its manifest the one that a gateway is asked for."""
    store = ShardStore(tmp_path / "store")
    manifest, shards = make(5 * PIECE_SIZE + 77, 2 * PIECE_SIZE)
    manifest_hash = put(store, manifest, shards)
    export(store, [manifest_hash], tmp_path / "www")
    paths = [tmp_path / "www" / "shards" / shard.sha256.hex() for shard in manifest.shards]
    paths.append(tmp_path / "www" / "manifests" / manifest_hash.hex())
    found = run_node(libraries, SCRIPT, [{"parts": [[str(path), 1]]} for path in paths])
    assert found == [*map(root_cid, manifest.shards), cid_text(raw_cid(manifest_hash))]
