"""Real node processes that are killed, stopped, cut off or out of space, and started again.

One network for the whole module; the tests run in the order they stand, and some go on with what earlier ones left.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.calls import EnrolAccounts
from contracts.errors import Busy, Refused
from contracts.types import Address, NodeId, ShardHash
from ledger.keys import Key
from node.members import REPLICATING_ROLES
from node.placement import Candidate, keepers
from node.rpc.client import RpcClient
from tests.node.cluster import MIB, MODEL, Cluster, Node, aigen, until
from tests.node.three import (
    LARGE,
    QUESTION,
    head,
    nodes,
    publish,
    reachable,
    step,
    three_nodes,
    transaction,
    wait_same_head,
)
from tests.tools import nginx


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with three_nodes(tmp_path_factory.mktemp("cluster"), LARGE) as made:
        yield made


# Killed


def share(observer: Node, node_id: str) -> set[str]:
    """The shards that placement gives a node."""
    rows = observer.ask("listNodes")
    nodes = [
        Candidate(NodeId(row["node_id"]), Address(bytes.fromhex(row["operator"][2:])), "127.0.0.1")
        for row in rows
        if row["live"] and row["role"] in REPLICATING_ROLES
    ]
    found = set()
    for model_id in (MODEL, LARGE):
        for shard in observer.ask("getModelInfo", model_id=model_id)["shards"]:
            shard_hash = ShardHash(bytes.fromhex(shard["shard_hash"].removeprefix("0x")))
            if node_id in keepers(shard_hash, nodes, 3):
                found.add(shard_hash.hex())
    return found


def test_a_spent_disk_budget_is_a_clear_state_while_fetching(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    publish(cluster, a, LARGE)
    until(lambda: set(a.copies(LARGE)) == {3}, "it is replicated", nodes(cluster, "a", "b", "c"))
    d = cluster.init("d", "storage", "--bootstrap", a.info()["endpoints"][0])
    config = d.data_dir / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("disk_budget = 500_000_000_000", f"disk_budget = {3 * MIB}"))
    d.start()
    until(lambda: reachable(d) and step(d, "fetch missing shards")["state"] == "failed", "D says so", (d,))
    assert "the disk budget of 3.1 MB" in d.cli("status").out
    assert len(d.held()) <= 2
    d.stop()
    assert d.tracebacks() == []
    config.write_text(text)


def test_a_node_killed_while_it_fetches_goes_on_where_it_was(cluster: Cluster) -> None:
    a, d = nodes(cluster, "a", "d")
    wanted, before = share(a, d.node_id), d.held()
    for _ in range(5):
        d.start()
        until(lambda: len(d.held()) >= len(before) + 3, "D has some more shards", (d,))
        d.kill()
        kept = d.held()
        if kept < wanted:
            break
        for name in kept - before:  # the look came late and D had all of it: once more
            (d.data_dir / "store" / "shards" / name).unlink()
    assert len(before) + 3 <= len(kept) < len(wanted), "killed in the middle"
    d.start()
    d.wait_ready()
    until(lambda: wanted <= d.held(), "D holds its share", (a, d))
    # Each shard here has one piece: what was whole stays, and of the one on its way the piece may have been here.
    assert len(wanted - kept) - 1 <= d.info()["pieces_fetched"] <= len(wanted - kept)
    announced = until(
        lambda: next(
            (r for r in a.ask("listNodes") if r["shards_announced"] == len(wanted) and r["node_id"] == d.node_id), None
        ),
        "all of it is announced",
        (a, d),
    )
    assert announced["role"] == "storage"


class Stream(threading.Thread):
    """Sends transactions as fast as they are acknowledged, until the node is gone."""

    def __init__(self, node: Node, key: Key) -> None:
        super().__init__()
        self._node = node
        self._key = key
        self.acknowledged: list[str] = []

    def run(self) -> None:
        account = self._node.ask("getAccount", account=f"0x{self._key.address.hex()}")
        chain_id = self._node.ask("getChainInfo")["chain_id"]
        with self._node.rpc() as rpc:
            for number in itertools.count(1):
                call = EnrolAccounts((Address(number.to_bytes(20, "big")),))
                raw = transaction(self._key, chain_id, account["nonce"] + number - 1, call)
                if (accepted := self._sent(rpc, raw)) is None:
                    return
                self.acknowledged.append(accepted)

    def _sent(self, rpc: RpcClient, raw: bytes) -> str | None:
        """The hash it was accepted under, once there is room for it in the pool; None: the connection broke."""
        while True:
            try:
                accepted: str = rpc.call("sendRawTransaction", transaction=f"0x{raw.hex()}")["transaction_hash"]
            except Busy:
                continue
            except Refused:
                return None
            return accepted


def test_an_authority_killed_while_it_seals_loses_nothing_it_acknowledged(cluster: Cluster) -> None:
    a, b, c = nodes(cluster, "a", "b", "c")
    before = head(a)["head_number"]
    stream = Stream(a, cluster.secret("admin"))
    stream.start()
    until(lambda: len(stream.acknowledged) >= 30 and head(a)["head_number"] > before + 3, "blocks are sealed", (a,))
    a.kill()
    stream.join(60)
    assert not stream.is_alive()
    done = aigen("ledger", "verify", "--data-dir", a.data_dir, "--json").json
    assert done["blocks"] > before
    a.start()
    a.wait_ready()
    for transaction_hash in stream.acknowledged:
        receipt = until(
            lambda sent=transaction_hash: a.ask("getTransactionReceipt", transaction_hash=sent),
            "it is in a block",
            (a,),
        )
        assert receipt["succeeded"]
    wait_same_head((a, b, c))


def test_a_node_that_was_down_catches_up_and_repairs_what_it_lost(cluster: Cluster) -> None:
    a, b, c = nodes(cluster, "a", "b", "c")
    c.stop()
    shards = [shard["shard_hash"].removeprefix("0x") for shard in a.ask("getModelInfo", model_id=MODEL)["shards"]]
    lost = set(shards[3:5]) & c.held()
    assert len(lost) == 2
    (c.data_dir / "store" / "shards" / shards[3]).unlink()
    os.truncate(c.data_dir / "store" / "shards" / shards[4], 1000)
    admin = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
    assert a.cli("tier", "grant", cluster.accounts["guest"], "pro", "--for", "1h", *admin, "--json").json["succeeded"]
    c.start()
    c.wait_ready()
    wait_same_head((a, b, c))
    assert c.ask("getTier", account=cluster.accounts["guest"])["tier"] == "pro"
    assert c.info()["pieces_fetched"] == 2
    assert lost <= c.held()


# Stopped and started


def test_a_signal_ends_a_node_cleanly_at_any_moment(cluster: Cluster) -> None:
    b, d = nodes(cluster, "b", "d")
    for node in (b, d):
        node.stop()
    d.start()
    # Python handles SIGINT from its first moment, SIGTERM only we do: from here on an end is clean.
    status = Path(f"/proc/{d.pid}/status")
    until(lambda: catches(status, signal.SIGTERM), "D has begun", (d,))
    assert d.signal_and_wait(signal.SIGTERM) == 0
    b.start()
    until(lambda: reachable(b) and step(b, "load and pin the core model")["state"] == "running", "B loads", (b,))
    assert b.cli("status").status == 1
    assert b.signal_and_wait(signal.SIGINT) == 0
    for node in (b, d):
        assert node.tracebacks() == []
        assert "stopping" in node.log()


def catches(status: Path, number: int) -> bool:
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_restart_changes_nothing_and_fetches_nothing(cluster: Cluster) -> None:
    machines = nodes(cluster, "a", "b", "c")
    before = head(machines[0])
    for node in machines:
        node.stop()
    for node in machines:
        done = aigen("ledger", "verify", "--data-dir", node.data_dir)
        assert done.status == 0, done
        assert before["head_hash"] in done.out
    for node in machines:
        node.start()
    for node in machines:
        node.wait_ready()
    for node in machines:
        assert head(node) == before
        assert node.info()["pieces_fetched"] == 0
    answer = machines[1].ask("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2


# Cut off


def test_without_peers_a_missing_shard_is_a_clear_state(cluster: Cluster) -> None:
    machines = nodes(cluster, "a", "b", "c")
    for node in machines:
        node.stop()
    c = machines[2]
    missing = next(iter(c.held()))
    (c.data_dir / "store" / "shards" / missing).unlink()
    c.start()
    until(lambda: reachable(c) and step(c, "fetch missing shards")["state"] == "failed", "C says so", (c,))
    shown = c.cli("status")
    assert "no source gives more" in shown.out
    assert missing not in c.held()
    assert c.tracebacks() == []
    c.stop()


def test_a_mirror_on_the_ledger_brings_what_no_node_gives(cluster: Cluster) -> None:
    """A running node's export, nginx over it, an admin's transaction: a lost shard comes from there with every other
    node down."""
    a, c = nodes(cluster, "a", "c")
    for node in (a, c):
        if not node.is_running():
            node.start()
    for node in (a, c):
        node.wait_ready()
    www = cluster.path / "www"
    exported = a.cli("shard", "export", www, MODEL, "--data-dir", a.data_dir, "--json").json
    shards = a.ask("getModelInfo", model_id=MODEL)["shards"]
    assert exported["linked"] == len(shards)
    with nginx(www, cluster.path / "nginx") as url:
        admin = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
        assert a.cli("mirror", "add", MODEL, f"{url}/", *admin, "--json").json["succeeded"]
        wait_same_head((a, c))
        assert c.cli("mirror", "list", MODEL).cells[1:] == [[MODEL, "1", "http", url]]
        for node in cluster.nodes.values():
            if node.is_running():
                node.stop()
        missing = shards[0]["shard_hash"].removeprefix("0x")
        (c.data_dir / "store" / "shards" / missing).unlink()
        c.start()
        until(lambda: missing in c.held(), "the shard comes from the mirror", (c,))
        (source,) = [row for row in c.info()["fetching"]["sources"] if row["source"] == f"mirror {url}"]
        assert (source["pieces"], source["failures"]) == (1, 0)
        assert c.tracebacks() == []
        c.stop()
