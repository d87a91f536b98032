"""Pieces in clear between real nodes: announced as such, passed over by who was not told to go there, else fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cluster import MIB, MODEL, Cluster, Node, aigen, until, write_model

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A node that serves a model in clear, and the files of one that wants it."""
    made = Cluster(tmp_path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).json["shard_size"] == MIB
    a = made.init("a", "storage")
    use_plain_tcp(a)
    source = write_model(made.path / MODEL, **SMALL)
    assert aigen("model", "import", source, "--data-dir", a.data_dir).status == 0
    try:
        a.start()
        a.wait_ready()
        admin = ("--key", made.key("admin"), "--data-dir", a.data_dir)
        assert a.cli("model", "publish", MODEL, "--tier", "basic", *admin).status == 0
        until(lambda: set(a.copies()) == {1}, "A has announced it", (a,))
        made.init("b", "storage", "--bootstrap", a.info()["endpoints"][0])
        yield made
    finally:
        made.kill_all()


def use_plain_tcp(node: Node) -> None:
    config = node.data_dir / "config.toml"
    config.write_text(config.read_text().replace("plain_tcp = false", "plain_tcp = true"))


def test_who_was_not_told_to_passes_over_what_is_served_in_clear(cluster: Cluster) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    endpoint = f"aigen+tcp://127.0.0.1:{a.rpc_port + 2}"
    assert a.info()["endpoints"][1] == endpoint
    locations = a.ask("getShardLocations", model_id=MODEL)["shards"][0]["locations"]
    assert [location["uri"] for location in locations] == [endpoint]
    assert "plain TCP (network.plain_tcp)" in a.log()

    b.start()
    reason = "only with network.plain_tcp = true"
    until(lambda: reason in b.cli("status").out, "B says why it has none", (a, b))
    (source,) = b.info()["fetching"]["sources"]
    assert source["source"] == f"{a.node_id} at {endpoint}"
    assert (source["state"], source["pieces"]) == ("dropped", 0)
    assert reason in b.log()
    assert b.held() == set()

    b.stop()
    use_plain_tcp(b)
    b.start()
    until(lambda: set(a.copies()) == {2}, "B has fetched and announced every shard", (a, b))
    assert b.held() == a.held()
    assert not a.tracebacks() + b.tracebacks()
