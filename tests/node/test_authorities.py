"""Four authorities as real processes: blocks are made while one is dead, and it catches up; a fifth comes to vote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.node.cluster import DEADLINE_S, Cluster, Node, aigen, until

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    for name in ("admin", "alice", "guest", "e", *NAMES):
        cluster.new_key(name)
    cluster.new_genesis(cluster.genesis, "--account", cluster.accounts["e"], authorities=NAMES)
    bootstrap: list[object] = []
    for name in NAMES:
        node = cluster.init(name, "gateway", *bootstrap)
        bootstrap += ["--bootstrap", f"/ip4/127.0.0.1/tcp/{node.rpc_port + 1}/p2p/{node.node_id}"]
    yield cluster
    cluster.kill_all()


def enrol(cluster: Cluster, node: Node, name: str) -> int:
    """An admin's transaction typed at this node; the block it is in."""
    address = cluster.new_key(name)
    words = ("account", "enrol", address, "--key", cluster.key("admin"), "--data-dir", node.data_dir, "--json")
    number: int = node.cli(*words).json[0]["block_number"]
    return number


def same_head(nodes: list[Node]) -> int:
    """The number of the head, once all have the same."""
    heads: list[dict[str, object]] = []

    def agree() -> bool:
        heads[:] = [node.ask("getChainInfo") for node in nodes]
        return len({head["head_hash"] for head in heads}) == 1 and not any(h["pending_transactions"] for h in heads)

    until(agree, "all have the same head", tuple(nodes))
    assert len({head["state_hashes"][-1]["hash"] for head in heads}) == 1  # type: ignore[index]
    number = heads[0]["head_number"]
    assert isinstance(number, int)
    return number


def ethereum(node: Node, method: str, *params: object) -> Any:
    """One of Ethereum's methods, which take their parameters by place."""
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    answer = httpx.post(node.url, json=body, timeout=DEADLINE_S).json()
    return answer.get("result", answer.get("error"))


def check_fast_join(cluster: Cluster, source: Node) -> None:
    """A node that is new joins without executing: across both changes of the authorities, from peers of which one did
    so itself."""
    late = cluster.init("guest", "gateway", "--bootstrap", source.info()["endpoints"][0])
    config = late.data_dir / "config.toml"
    config.write_text(config.read_text().replace("fast_blocks = 1_024", "fast_blocks = 1"))
    late.start()
    late.wait_ready()
    head = same_head([late, source])
    refused = ethereum(late, "eth_getBalance", f"0x{'00' * 20}", "0x1")
    assert "the state of block 1 is not here: this node joined at block" in refused["message"]
    for number in range(head + 1):
        assert ethereum(late, "eth_getBlockByNumber", hex(number), True) == ethereum(
            source, "eth_getBlockByNumber", hex(number), True
        )
    enrol(cluster, late, "new-6")
    assert same_head([late, source]) == head + 1
    late.stop()
    assert aigen("ledger", "verify", "--data-dir", late.data_dir).status == 0


def test_one_of_four_may_die_and_a_fifth_may_come(cluster: Cluster) -> None:
    nodes = [cluster.nodes[name] for name in NAMES]
    for node in nodes:
        node.start()
    for node in nodes:
        node.wait_ready()
    signers = nodes[0].ask("getBlock", number=1)["signers"]
    assert len(signers) == 3
    assert set(signers) < {cluster.accounts[name] for name in NAMES}

    victim, others = nodes[2], [nodes[0], nodes[1], nodes[3]]
    before = same_head(nodes)
    victim.kill()
    for count, node in enumerate(others):
        enrol(cluster, node, f"new-{count}")
    assert same_head(others) >= before + 3
    victim.start()
    victim.wait_ready()
    enrol(cluster, victim, "new-3")
    reached = same_head(nodes)
    proposers = {victim.ask("getBlock", number=number)["proposer"] for number in range(1, reached + 1)}
    assert len(proposers) > 1, "they take turns"

    fifth = cluster.init("e", "gateway", "--bootstrap", nodes[0].info()["endpoints"][0])
    fifth.start()
    fifth.wait_ready()
    key = ("--key", cluster.key("admin"), "--data-dir", nodes[0].data_dir)
    nodes[0].cli("authority", "add", cluster.accounts["e"], *key, "--json").json  # noqa: B018 - it has to succeed
    nodes.append(fifth)
    same_head(nodes)
    listed = fifth.cli("authority", "list", "--json").json
    assert [row["account"] for row in listed] == sorted(cluster.accounts[name] for name in (*NAMES, "e"))
    assert not any(row["evidence"] for row in listed)
    nodes[3].cli("authority", "remove", cluster.accounts["a"], *key, "--json").json  # noqa: B018 - as above
    for count in range(4, 6):
        enrol(cluster, nodes[1], f"new-{count}")
    newest = nodes[1].ask("getBlock", number=same_head(nodes))
    assert cluster.accounts["a"] not in newest["signers"]
    until(lambda: fifth.info()["consensus"]["is_voting"], "the fifth votes", (fifth,))
    assert not nodes[0].info()["consensus"]["is_voting"]
    check_fast_join(cluster, nodes[1])
    assert all(not node.tracebacks() for node in nodes)
    assert aigen("ledger", "verify", "--data-dir", cluster.path / "nowhere").status == 1
    fifth.stop()
    assert aigen("ledger", "verify", "--data-dir", fifth.data_dir).status == 0
