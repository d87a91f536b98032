"""How much memory nodes without an engine take while a shard of 4 GiB moves between them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.cluster import MIB, MODEL, Cluster, Node, aigen, until, write_model

SHARD_SIZE = 4 << 30
BLOCK = 64 * MIB
RESIDENT_BYTES_MAX = 300_000_000
MOVE_S_MAX = 600.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """One storage node that has the model, and one that does not."""
    cluster = Cluster(tmp_path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        cluster.new_key(name)
    assert cluster.new_genesis(cluster.genesis, "--shard-size", SHARD_SIZE).status == 0
    holder = cluster.init("a", "storage")
    source = write_model(tmp_path / MODEL)
    enlarge(source / "model.safetensors")
    assert aigen("model", "import", source, "--move", "--data-dir", holder.data_dir, "--json").status == 0
    try:
        holder.start()
        holder.wait_ready()
        key = ("--key", cluster.key("admin"), "--data-dir", holder.data_dir)
        assert holder.cli("model", "publish", MODEL, "--tier", "basic", *key, "--json").json["succeeded"]
        cluster.init("b", "storage", "--bootstrap", holder.info()["endpoints"][0])
        yield cluster
    finally:
        cluster.kill_all()


def enlarge(path: Path) -> None:
    """Give the weights another tensor, so that they fill a shard."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    more = SHARD_SIZE // BLOCK * BLOCK
    header["more"] = {"dtype": "BF16", "shape": [more // 2], "data_offsets": [len(body), len(body) + more]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    block = random.Random(1).randbytes(BLOCK)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded + body)
        for number in range(more // BLOCK):
            file.write(number.to_bytes(8, "little") + block[8:])


def resident_bytes_max(node: Node) -> int:
    """The most that a process ever had in memory, of what is its own: pages of files that it reads can go any time."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{node.pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


@pytest.mark.soak
def test_memory_stays_small_while_a_whole_shard_moves(cluster: Cluster) -> None:
    holder, taker = cluster.nodes["a"], cluster.nodes["b"]
    taker.start()
    until(lambda: taker._health() != "unreachable", "it answers", (taker,))
    until(lambda: len(taker.held()) == 2, "it has both shards", (holder, taker), MOVE_S_MAX)
    taker.wait_ready()
    until(lambda: set(holder.copies()) == {2}, "both are announced", (holder, taker))
    assert max(path.stat().st_size for path in (taker.data_dir / "store" / "shards").iterdir()) == SHARD_SIZE
    found = {node.name: resident_bytes_max(node) for node in (holder, taker)}
    print({name: f"{size / 1e6:.0f} MB" for name, size in found.items()})
    assert max(found.values()) < RESIDENT_BYTES_MAX
