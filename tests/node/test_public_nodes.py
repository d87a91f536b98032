"""A node whose key is not on the ledger, but which replays it, gets the public model from a member, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import Busy, NoSpace
from tests.node.cluster import MIB, MODEL, Cluster, Node, aigen, until, write_model

OTHER = "tiny-other"
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A member with two models, and a stranger that follows the ledger."""
    made = Cluster(tmp_path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest", "stranger"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).json["shard_size"] == MIB
    a = made.init("a", "storage")
    for model_id, spread in ((MODEL, 0.1), (OTHER, 0.2)):
        source = write_model(made.path / model_id, **SMALL, initializer_range=spread)
        done = aigen("model", "import", source, "--data-dir", a.data_dir, "--json")
        made.manifests[model_id] = done.json["manifest_hash"]
    try:
        a.start()
        a.wait_ready()
        for model_id in (MODEL, OTHER):
            admin(made, "publish", model_id, "--tier", "basic", "--manifest", made.manifests[model_id])
        until(lambda: a.copies() == [1] * len(a.copies()) and min(a.copies(OTHER)) == 1, "A has announced both", (a,))
        stranger = made.init("stranger", "gateway", "--bootstrap", a.info()["endpoints"][0])
        config = stranger.data_dir / "config.toml"
        config.write_text(re.sub("(?m)^cache_size = .*", "cache_size = 1", config.read_text()))
        stranger.start()
        until(lambda: knows(stranger, OTHER), "the stranger knows both models", (a, stranger))
        yield made
    finally:
        made.kill_all()


def admin(cluster: Cluster, command: str, *words: object) -> None:
    a = cluster.nodes["a"]
    done = a.cli("model", command, *words, "--key", cluster.key("admin"), "--data-dir", a.data_dir, "--json")
    assert done.json["succeeded"], done


def knows(node: Node, model_id: str) -> bool:
    if node.cli("model", "list").status:  # nothing answers yet
        return False
    return min([0] if model_id not in registered(node) else node.copies(model_id)) == 1


def registered(node: Node) -> dict[str, bool]:
    """Whether each model is public."""
    return {row["model_id"]: row["public"] for row in node.ask("listModels")["models"]}


def hashes(node: Node, model_id: str) -> dict[str, int]:
    found: list[dict[str, Any]] = node.ask("getModelInfo", model_id=model_id)["shards"]
    return {shard["shard_hash"].removeprefix("0x"): shard["size"] for shard in found}


def test_a_stranger_mirrors_the_public_model_and_gets_no_other(cluster: Cluster, tmp_path: Path) -> None:
    a, stranger = cluster.nodes["a"], cluster.nodes["stranger"]
    both = (a, stranger)
    with pytest.raises(Busy, match=f"{stranger.node_id} is no member of this network"):
        stranger.ask("loadModel", model_id=MODEL, wait=True)
    assert stranger.held() == set()

    admin(cluster, "set-public", MODEL, 1)
    until(lambda: registered(stranger) == {MODEL: True, OTHER: False}, "the stranger knows that it is public", both)
    with pytest.raises(NoSpace):  # a mirror need not have the memory to use it
        stranger.ask("loadModel", model_id=MODEL, wait=True)
    assert stranger.held() == set(hashes(a, MODEL))
    assert stranger.node_id not in {row["node_id"] for row in a.ask("listNodes")}

    done = aigen("shard", "export", tmp_path / "www", MODEL, "--data-dir", stranger.data_dir, "--rpc", stranger.url)
    assert done.status == 0, done
    assert {path.name for path in (tmp_path / "www" / "shards").iterdir()} == set(hashes(a, MODEL))

    with pytest.raises(Busy, match=f"the manifest {cluster.manifests[OTHER].removeprefix('0x')} is of no public model"):
        stranger.ask("loadModel", model_id=OTHER, wait=True)
    assert stranger.held() == set(hashes(a, MODEL))
    private, size = next(iter(hashes(a, OTHER).items()))
    refusal = stranger.ask_piece(a, private, size, 0)
    assert refusal == (
        f"it refuses: {stranger.node_id} is no member of this network, and the shard {private} is of no public model"
    )

    admin(cluster, "set-public", MODEL, 1, "--off")
    public, size = next(iter(hashes(a, MODEL).items()))
    refused = until(lambda: stranger.ask_piece(a, public, size, 0), "A serves it to members alone", both)
    assert f"{stranger.node_id} is no member of this network" in refused
    assert not a.tracebacks() + stranger.tracebacks()
