"""One of three holders is killed: the others make its copies again, within two leases of its death. Real processes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cluster import MODEL, Cluster, Node, aigen, until, write_model

LEASE_S = 16
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Four storage nodes, of which a is the authority's and has the model; short leases."""
    cluster = Cluster(tmp_path)
    for name in ("admin", "alice", "guest", *NAMES):
        cluster.new_key(name)
    assert cluster.new_genesis(cluster.genesis).status == 0
    text, count = re.subn(r"(?m)^lease_s = \d+", f"lease_s = {LEASE_S}", cluster.genesis.read_text())
    assert count == 1
    cluster.genesis.write_text(text)
    a = cluster.init("a", "storage")
    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    aigen("model", "import", write_model(tmp_path / MODEL, **small), "--data-dir", a.data_dir, "--json").json  # noqa: B018
    try:
        a.start()
        a.wait_ready()
        key = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
        assert a.cli("model", "publish", MODEL, "--tier", "basic", *key, "--json").json["succeeded"]
        bootstrap = ("--bootstrap", a.info()["endpoints"][0])
        others = [cluster.init(name, "storage", *bootstrap) for name in NAMES[1:]]
        for node in others:
            node.start()
        for node in others:
            node.wait_ready()
        yield cluster
    finally:
        cluster.kill_all()


def holders(node: Node) -> list[set[str]]:
    """Of each shard, those that are there."""
    shards = node.ask("getShardLocations", model_id=MODEL)["shards"]
    return [{location["node_id"] for location in shard["locations"]} for shard in shards]


def silent(node: Node) -> set[str]:
    return {row["node_id"] for row in node.ask("listNodes") if not row["live"]}


def test_the_copies_of_a_dead_node_are_made_again_within_two_leases(cluster: Cluster) -> None:
    nodes = {name: cluster.nodes[name] for name in NAMES}
    a = nodes["a"]
    until(lambda: all(len(found) >= 3 for found in holders(a)), "every shard has three copies", tuple(nodes.values()))
    victim = max((nodes[name] for name in NAMES[1:]), key=lambda node: sum(node.node_id in h for h in holders(a)))
    had = [index for index, found in enumerate(holders(a)) if victim.node_id in found]
    assert had
    rest = tuple(node for node in nodes.values() if node is not victim)
    victim.kill()
    died = time.monotonic()
    until(lambda: silent(a) == {victim.node_id}, "its lease is over", rest, 2 * LEASE_S)
    until(
        lambda: all(len(found - {victim.node_id}) >= 3 for found in holders(a)),
        "every shard has three copies again",
        rest,
        died + 2 * LEASE_S - time.monotonic(),
    )
    for node in rest:
        assert {a.ask("listShards")[index]["shard_hash"] for index in had} <= {f"0x{name}" for name in node.held()}
    listed = a.cli("shard", "list", MODEL).out
    assert "good, 1 silent" in listed
    assert re.search(r"(?m)^12D3KooW.*silent$", a.cli("node", "list").out)
    victim.start()
    victim.wait_ready()
    until(lambda: silent(a) == set(), "it is there again", tuple(nodes.values()))
    check_removal(cluster, victim, a)
    assert all(not node.tracebacks() for node in nodes.values())


def check_removal(cluster: Cluster, gone: Node, a: Node) -> None:
    """An admin takes it out: what it announced ends at that block, and nobody serves it any more."""
    key = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
    a.cli("node", "remove", "12D3KooWnobody", *key).refused("is no node_id")
    assert a.cli("node", "remove", gone.node_id, *key).out.startswith(f"{gone.node_id} is no member from block ")
    assert gone.node_id not in {row["node_id"] for row in a.ask("listNodes")}
    assert not any(gone.node_id in found for found in holders(a))
    a.cli("node", "remove", gone.node_id, *key).refused("unknown node")
    until(lambda: gone.node_id not in {row["node_id"] for row in gone.ask("listNodes")}, "it knows", (gone, a))
