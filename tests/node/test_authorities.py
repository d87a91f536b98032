"""Four authorities as real processes: blocks are made while one is dead, and it catches up; a fifth comes to vote; one
that lies is proved to, on every node, and removed.

One network for the whole module; the tests run in the order they stand.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx
import pytest

from contracts.calls import EnrolAccounts
from contracts.types import Address
from ledger.transactions import CALL_GAS, sign
from tests.node.cluster import DEADLINE_S, Cluster, Node, aigen, until

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    for name in ("admin", "deputy", "alice", "guest", "e", *NAMES):
        cluster.new_key(name)
    options = ("--account", cluster.accounts["e"], "--admin", cluster.accounts["deputy"])
    cluster.new_genesis(cluster.genesis, *options, authorities=NAMES)
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


def enrol_at_both(cluster: Cluster, nodes: tuple[Node, Node]) -> bool:
    """Each of the two admins enrols somebody at a node of its own, at the same moment; True once both are final."""

    def send(node: Node, raw: bytes) -> str:
        sent: str = node.ask("sendRawTransaction", transaction=f"0x{raw.hex()}")["transaction_hash"]
        return sent

    def are_final() -> bool:
        return all(nodes[0].ask("getTransactionReceipt", transaction_hash=each) for each in hashes)

    chain_id, raws = nodes[0].ask("getChainInfo")["chain_id"], []
    for node, admin in zip(nodes, ("admin", "deputy"), strict=True):
        nonce, key = node.ask("getAccount", account=cluster.accounts[admin])["nonce"], cluster.secret(admin)
        call = EnrolAccounts((Address(key.address[:18] + nonce.to_bytes(2)),))
        raws.append(sign(key, chain_id, nonce, call.to, call.encode(), CALL_GAS))
    with ThreadPoolExecutor(len(nodes)) as threads:
        hashes = list(threads.map(send, nodes, raws))
    return until(are_final, "both are in a block", nodes)


def evidence_against(node: Node, account: str) -> dict[str, Any] | None:
    """The row of an account that this node has evidence against."""
    rows: list[dict[str, Any]] = node.ask("listAuthorities")
    return next((row for row in rows if row["account"] == account and row["evidence"]), None)


def test_an_authority_in_two_processes_is_proved_to_lie_everywhere_and_removed(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Its operator started a copy of its data directory as another node: both vote with one key, and in their turn both
    propose. A was an authority once and is none any more."""
    follower, *others = honest = [cluster.nodes[name] for name in NAMES]
    e, liar = cluster.nodes["e"], cluster.accounts["e"]
    twin = cluster.init("twin", "gateway", "--bootstrap", follower.info()["endpoints"][0], operator="e")
    shutil.copytree(e.data_dir / "ledger", twin.data_dir / "ledger", dirs_exist_ok=True)
    for node in (e, twin):
        node.start()
    for node in (e, twin):
        node.wait_ready()
    until(
        lambda: enrol_at_both(cluster, (e, twin)) and evidence_against(others[0], liar),
        "two blocks were proposed in one iteration",
        (*honest, e, twin),
    )
    until(lambda: all(evidence_against(node, liar) for node in honest), "every node has evidence", tuple(honest))
    assert [row["account"] for row in follower.ask("listAuthorities") if row["evidence"]] == [liar]

    found = evidence_against(follower, liar)
    assert found is not None
    assert ["LIAR", f"{liar}: evidence {found['evidence_hash']}"] in follower.cli("status").cells
    with urlopen(f"{follower.url}/metrics") as metrics:
        assert f'aigen_authority_evidence{{account="{liar}"}} 1.0' in metrics.read().decode()
    path = tmp_path / "evidence"
    follower.cli("authority", "evidence", liar, "--out", path, "--json").json  # noqa: B018 - it has to succeed
    checked = aigen("authority", "check", path, "--json").json
    assert (checked["account"], checked["evidence_hash"]) == (liar, found["evidence_hash"])

    key = ("--key", cluster.key("admin"), "--data-dir", follower.data_dir)
    receipt = follower.cli("authority", "remove", liar, "--cite", *key, "--json").json
    cited = {"account": liar, "evidence": found["evidence_hash"]}
    assert receipt["events"] == [{"name": "AuthorityRemoved", "fields": cited}]
    until(lambda: not e.info()["consensus"]["is_voting"], "the liar votes no more", (e,))
    for count, node in enumerate(others):
        enrol(cluster, node, f"honest-{count}")
    reached = same_head([*honest, e, twin])
    assert reached >= receipt["block_number"] + len(others)
    for number in range(receipt["block_number"] + 1, reached + 1):
        block = follower.ask("getBlock", number=number)
        assert liar not in (block["proposer"], *block["signers"])
    assert all(not node.tracebacks() for node in cluster.nodes.values())
