"""A new model and eight nodes that want it at once, all of them real processes: they have it from one another."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cluster import MIB, MODEL, Cluster, aigen, until, write_model

CROWD = tuple(f"node-{number}" for number in range(8))
RATE = 4 * MIB
"""Bytes a second that the seeder gives out: eight copies from it alone would take eight times as long as one."""

CROWD_S_MAX = 300.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """All are to hold everything; only the seeder has it."""
    cluster = Cluster(tmp_path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest", *CROWD):
        cluster.new_key(name)
    enrolled = [word for name in CROWD for word in ("--account", cluster.accounts[name])]
    assert cluster.new_genesis(cluster.genesis, "--shard-size", 16 * MIB, *enrolled).status == 0
    text, count = re.subn(r"(?m)^redundancy = \d+", f"redundancy = {len(CROWD) + 1}", cluster.genesis.read_text())
    assert count == 1
    cluster.genesis.write_text(text)
    seeder = cluster.init("a", "storage")
    config = seeder.data_dir / "config.toml"
    config.write_text(config.read_text().replace("upload_rate = 0", f"upload_rate = {RATE}"))
    source = write_model(tmp_path / MODEL)
    assert aigen("model", "import", source, "--data-dir", seeder.data_dir, "--json").status == 0
    try:
        seeder.start()
        seeder.wait_ready()
        yield cluster
    finally:
        cluster.kill_all()


@pytest.mark.soak
def test_a_crowd_has_a_model_from_one_another(cluster: Cluster) -> None:
    seeder = cluster.nodes["a"]
    crowd = [cluster.init(name, "storage", "--bootstrap", seeder.info()["endpoints"][0]) for name in CROWD]
    for node in crowd:
        node.start()
    for node in crowd:
        node.wait_ready()
    key = ("--key", cluster.key("admin"), "--data-dir", seeder.data_dir)
    assert seeder.cli("model", "publish", MODEL, "--tier", "basic", *key, "--json").json["succeeded"]
    wanted = {shard["shard_hash"] for shard in seeder.ask("getModelInfo", model_id=MODEL)["shards"]}
    machines = (seeder, *crowd)
    until(
        lambda: all({f"0x{name}" for name in node.held()} == wanted for node in crowd),
        "everybody has the model",
        machines,
        CROWD_S_MAX,
    )
    pieces: Counter[bool] = Counter()
    for node in crowd:
        for source in node.info()["fetching"]["sources"]:
            pieces[seeder.node_id in source["source"]] += source["pieces"]
    assert pieces[True] < pieces[False], "most pieces came from others of the crowd"
    until(lambda: set(seeder.copies()) == {len(machines)}, "all of it is announced", machines)
    for node in crowd:
        assert not any(check["bad_pieces"] for check in node.ask("verifyShards"))
        assert not node.tracebacks()
    print(f"pieces from the seeder: {pieces[True]}, from one another: {pieces[False]}")
