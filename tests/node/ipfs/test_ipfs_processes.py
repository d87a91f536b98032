"""A model that nobody has but an IPFS node: the start of a node brings it from the gateway alone.

Real processes: two nodes of ours, two of kubo's and the gateway before the second of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from contracts.types import ManifestHash
from node.storage.manifest import Manifest
from node.storage.store import ShardStore
from tests.node.cluster import MIB, MODEL, Cluster, aigen, until, write_model
from tests.node.ipfs.test_ipfs_kubo import blocks, kubo, library

SHARD_SIZE = 4 * MIB


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Node a is the authority's and, as a gateway, holds nothing unasked. The model was imported into c's directory,
    and no node runs there."""
    library()  # without one, nothing is begun
    made = Cluster(tmp_path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        made.new_key(name)
    assert made.new_genesis(made.genesis, "--shard-size", SHARD_SIZE).status == 0
    a, importer = made.init("a", "gateway"), made.init("c", "storage")
    directory = ("--data-dir", importer.data_dir)
    imported = aigen("model", "import", write_model(tmp_path / MODEL), *directory, "--json").json
    made.manifests[MODEL] = imported["manifest_hash"]
    try:
        a.start()
        a.wait_ready()
        publish = ("model", "publish", MODEL, "--tier", "basic", "--key", made.key("admin"), *directory)
        assert a.cli(*publish, "--json").json["succeeded"]
        yield made
    finally:
        made.kill_all()


def imported(cluster: Cluster) -> tuple[Manifest, list[bytes]]:
    """The model as it lies in c's directory."""
    store = ShardStore(cluster.nodes["c"].data_dir / "store")
    manifest = store.manifest(ManifestHash(bytes.fromhex(cluster.manifests[MODEL].removeprefix("0x"))))
    return manifest, [store.path(shard_hash).read_bytes() for shard_hash in manifest.shard_hashes]


def test_a_node_has_its_share_from_an_ipfs_gateway_alone(cluster: Cluster, tmp_path: Path) -> None:
    a = cluster.nodes["a"]
    manifest, shards = imported(cluster)
    pieces = sum(shard.piece_count for shard in manifest.shards)
    assert len(shards) > 1
    assert pieces > len(shards)
    b = cluster.init("b", "storage", "--bootstrap", a.info()["endpoints"][0])
    with kubo(blocks(manifest, shards), tmp_path / "kubo") as url:
        add = ("mirror", "add", MODEL, f"{url}/", "--kind", "ipfs", "--key", cluster.key("admin"))
        assert a.cli(*add, "--data-dir", a.data_dir, "--json").json["succeeded"]
        assert a.copies() == [0] * len(shards)
        assert a.cli("shard", "list", MODEL).out.count("only mirrors") == len(shards)
        b.start()
        b.wait_ready()

    info = b.info()
    brought = {
        row["source"]: (row["pieces"], row["bytes_fetched"], row["failures"]) for row in info["fetching"]["sources"]
    }
    assert brought == {f"gateway {url}": (pieces, manifest.total_size, 0)}
    assert (info["pieces_fetched"], info["fetching"]["manifests_fetched"]) == (pieces, 1)

    registered = [row["shard_hash"].removeprefix("0x") for row in a.ask("getModelInfo", model_id=MODEL)["shards"]]
    held = [(b.data_dir / "store" / "shards" / name).read_bytes() for name in registered]
    assert [sha256(data).hexdigest() for data in held] == registered
    assert held == shards
    assert b.held() == set(registered)
    assert b.cli("shard", "verify").status == 0
    assert a.held() == set(), "there was no peer to have it from"
    until(lambda: a.copies() == [1] * len(shards), "b's announcement is known", (a, b))
    assert [node.tracebacks() for node in (a, b)] == [[], []]
