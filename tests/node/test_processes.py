"""The main job and what goes wrong in it, on real node processes: libp2p, TLS, LevelDB, an engine with torch.

One network for the whole module; the tests run in the order they stand, each leaves it whole.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.calls import Call, EnrolAccounts
from contracts.errors import BadInput, Busy, Conflict, NoSpace, NotAllowed, NotFound, Refused
from contracts.types import Address, NodeId, ShardHash
from ledger import transactions
from ledger.keys import Key
from node.members import REPLICATING_ROLES
from node.placement import Candidate, keepers
from node.rpc.client import RpcClient
from tests.node.cluster import MIB, MODEL, Cluster, Done, Node, aigen, flip, until, write_model
from tests.tools import nginx

LARGE = "too-large"
"""A model that does not fit beside the pinned one."""

SMALL = "tiny-small"
"""One that does."""

CACHE_SIZE = 19_000_000
"""Beside the pinned model it has no room for another of that size, not in int4 either."""

SMALLER = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "initializer_range": 0.2}
QUESTION = [{"role": "user", "content": "Where is Paris?"}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with the model on all of them: a (authority, storage), b (worker), c (storage)."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    for name in ("admin", "a", "b", "c", "d", "alice", "guest", "stranger"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).json["shard_size"] == MIB
    a = made.init("a", "storage")
    for model_id, changes in ((MODEL, {}), (LARGE, {"initializer_range": 0.1}), (SMALL, SMALLER)):
        imported = aigen(
            "model", "import", write_model(made.path / model_id, **changes), "--data-dir", a.data_dir, "--json"
        )
        made.manifests[model_id] = imported.json["manifest_hash"]
    try:
        a.start()
        a.wait_ready()
        publish(made, a, MODEL, "--core")
        bootstrap = ("--bootstrap", a.info()["endpoints"][0])
        b, c = made.init("b", "worker", "--model", MODEL, *bootstrap), made.init("c", "storage", *bootstrap)
        config = b.data_dir / "config.toml"
        config.write_text(config.read_text().replace("cache_size = 32_000_000_000", f"cache_size = {CACHE_SIZE}"))
        for node in (b, c):
            node.start()
        for node in (b, c):
            node.wait_ready()
        yield made
    finally:
        made.kill_all()


def publish(cluster: Cluster, node: Node, model_id: str, *options: str) -> None:
    done = aigen(
        *("model", "publish", model_id, "--manifest", cluster.manifests[model_id], "--tier", "basic", *options),
        *("--key", cluster.key("admin"), "--data-dir", node.data_dir, "--rpc", node.url, "--json"),
    )
    assert done.json["succeeded"]
    for other in [node for node in cluster.nodes.values() if node.is_running()]:
        until(lambda other=other: model_id in registered(other), "every node knows the model", (other,))


def registered(node: Node) -> set[str]:
    return {row["model_id"] for row in node.ask("listModels")["models"]}


def nodes(cluster: Cluster, *names: str) -> tuple[Node, ...]:
    return tuple(cluster.nodes[name] for name in names)


def head(node: Node) -> dict[str, Any]:
    chain = node.ask("getChainInfo")
    return {name: chain[name] for name in ("head_number", "head_hash", "state_root", "genesis_hash")}


def wait_same_head(machines: tuple[Node, ...]) -> None:
    until(lambda: len({head(node)["head_hash"] for node in machines}) == 1, "all are at one head", machines)
    until(lambda: len({state_hash(node) for node in machines}) == 1, "all hold one state", machines)


def state_hash(node: Node) -> str:
    """Of the newest block that the node has folded."""
    newest: str = node.ask("getChainInfo")["state_hashes"][-1]["hash"]
    return newest


def token(cluster: Cluster, name: str) -> str:
    done = aigen("token", "--key", cluster.key(name), "--data-dir", cluster.nodes["a"].data_dir, "--json")
    text: str = done.json["token"]
    return text


# The main job


def test_every_shard_gets_three_copies(cluster: Cluster) -> None:
    machines = nodes(cluster, "a", "b", "c")
    c = machines[2]
    shards = c.ask("getModelInfo", model_id=MODEL)["shards"]
    assert len(shards) >= 8
    until(lambda: c.copies() == [3] * len(shards), "every shard has three copies", machines)
    hashes = {shard["shard_hash"].removeprefix("0x") for shard in shards}
    assert all(hashes <= node.held() for node in machines)
    assert c.info()["pieces_fetched"] == len(shards)
    wait_same_head(machines)


def test_the_worker_answers_whole_and_streamed(cluster: Cluster) -> None:
    b = cluster.nodes["b"]
    state = b.ask("getLoadState", model_id=MODEL)
    assert state["state"] == "loaded"
    assert state["pinned"]
    whole = b.ask("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=12)
    assert whole["usage"]["completion_tokens"] == 12
    with b.rpc() as rpc:
        stream = rpc.stream("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=12)
        texts = [notification.params["content"] for notification in stream]
    assert len(texts) > 1
    assert "".join(texts) == stream.result["message"]["content"] == whole["message"]["content"]


def test_every_node_answers_ethereums_methods(cluster: Cluster) -> None:
    for node in nodes(cluster, "a", "b"):
        with node.rpc() as rpc:
            assert rpc.call("eth_chainId") == hex(node.ask("getChainInfo")["chain_id"])


def test_tiers_decide_and_the_decision_is_on_every_ledger(cluster: Cluster) -> None:
    b, c = nodes(cluster, "b", "c")
    done = b.cli("chat", MODEL, "hello", "--token", token(cluster, "guest"))
    done.refused("needs tier basic", cluster.accounts["guest"], "holds none", "aigen tier grant")
    answered = b.cli("chat", MODEL, "hello", "--max-tokens", 3, "--token", token(cluster, "alice"), "--json").json
    assert answered["usage"]["completion_tokens"] == 3
    b.cli("chat", MODEL, "hello", "--token", token(cluster, "stranger")).refused("neither enrolled nor holds a tier")
    found = {}
    for name in ("guest", "alice"):
        with b.rpc(token(cluster, name)) as rpc:
            check = rpc.call("checkTier", model_id=MODEL)
        receipt = until(
            lambda made=check: c.ask("getTransactionReceipt", transaction_hash=made["transaction_hash"]),
            "the check is on C's ledger",
            (b, c),
        )
        assert check["block_number"] == receipt["block_number"]
        events = [event for event in receipt["events"] if event["name"] == "TierChecked"]
        assert [event["fields"]["account"] for event in events] == [cluster.accounts[name]]
        found[name] = events[0]["fields"]["granted"]
    assert found == {"guest": False, "alice": True}


def test_what_a_node_proves_holds_without_one(cluster: Cluster, tmp_path: Path) -> None:
    b, c = nodes(cluster, "b", "c")
    proofs = {name: tmp_path / f"{name}.json" for name in ("model", "shard")}
    assert b.cli("proof", "model", MODEL, "--out", proofs["model"]).status == 0
    assert b.cli("proof", "shard", MODEL, 2, c.node_id, "--out", proofs["shard"]).status == 0
    b.cli("proof", "tier", cluster.accounts["alice"], "--out", tmp_path / "tier.json").refused("in the genesis file")
    check = ("--genesis", cluster.genesis, "--json")
    model = aigen("proof", "check", proofs["model"], cluster.path / MODEL, *check).json
    assert model["event"]["fields"]["manifest_hash"] == cluster.manifests[MODEL]
    assert model["sender"] == cluster.accounts["admin"]
    assert model["standing"]["number"] > model["block"]["number"]
    shard = aigen("proof", "check", proofs["shard"], *check).json
    assert shard["event"]["fields"]["node_id"] == c.node_id
    assert 2 in shard["event"]["fields"]["shard_indices"]
    assert shard["sender"] == cluster.accounts["c"]


def test_an_answers_receipt_holds_against_what_the_ledger_says(cluster: Cluster, tmp_path: Path) -> None:
    b = cluster.nodes["b"]
    alice = token(cluster, "alice")
    done = b.cli("chat", MODEL, QUESTION[0]["content"], "--max-tokens", 3, "--token", alice, "--json").json
    receipt = done["receipt"]
    files = {"receipt": receipt, "prompt": QUESTION}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "answer").write_text(done["message"]["content"])
    assert b.cli("proof", "model", MODEL, "--out", tmp_path / "model").status == 0
    assert b.cli("proof", "shard", MODEL, 0, b.node_id, "--out", tmp_path / "shard").status == 0
    told = aigen(
        *("receipt", "check", tmp_path / "receipt", "--node-id", b.node_id, "--genesis", cluster.genesis),
        *("--prompt", tmp_path / "prompt", "--answer", tmp_path / "answer"),
        *("--proof", tmp_path / "model", "--proof", tmp_path / "shard", "--json"),
    ).json
    assert told["receipt"] == receipt
    assert len(told["proven"]) == 2
    assert (receipt["account"], receipt["precision"]) == (cluster.accounts["alice"], "fp32")
    check = b.ask("getTransactionReceipt", transaction_hash=receipt["check_transaction_hash"])
    assert check["block_number"] == receipt["check_block_number"]
    assert [event["fields"]["account"] for event in check["events"]] == [cluster.accounts["alice"]]
    got = b.cli("receipt", "get", receipt["receipt_id"], "--token", alice, "--json")
    assert got.json == receipt
    b.cli("receipt", "get", receipt["receipt_id"], "--token", token(cluster, "guest")).refused("of yours here")


# Damage


def damage(node: Node, index: int) -> tuple[dict[str, Any], Path]:
    shard = node.ask("getModelInfo", model_id=MODEL)["shards"][index]
    path = node.data_dir / "store" / "shards" / shard["shard_hash"].removeprefix("0x")
    flip(path, 12_345)
    return shard, path


def wait_repaired(node: Node, path: Path, fetched_before: int) -> None:
    until(lambda: node.info()["pieces_fetched"] > fetched_before and path.exists(), "the shard is repaired", (node,))
    assert node.info()["pieces_fetched"] == fetched_before + 1


def test_a_damaged_piece_is_noticed_when_it_is_asked_for(cluster: Cluster) -> None:
    b, c = nodes(cluster, "b", "c")
    before = c.info()["pieces_fetched"]
    shard, path = damage(c, 1)
    refusal = b.ask_piece(c, shard["shard_hash"], shard["size"], 0)
    assert refusal is not None
    assert "damaged" in refusal
    wait_repaired(c, path, before)
    assert b.ask_piece(c, shard["shard_hash"], shard["size"], 0) is None
    assert c.cli("shard", "verify").status == 0


def test_shard_verify_finds_a_damaged_piece_and_has_it_fetched(cluster: Cluster) -> None:
    b, c = nodes(cluster, "b", "c")
    before = c.info()["pieces_fetched"]
    shard, path = damage(c, 2)
    done = c.cli("shard", "verify", MODEL)
    assert done.status == 1
    assert "1 damaged" in done.out
    wait_repaired(c, path, before)
    assert b.ask_piece(c, shard["shard_hash"], shard["size"], 0) is None
    checks = c.cli("shard", "verify", "--json").json
    assert not any(check["bad_pieces"] for check in checks)
    until(lambda: set(c.copies()) == {3}, "three copies stand on the ledger", (b, c))


# Refused, and nothing changed


def transaction(key: Key, chain_id: int, nonce: int, call: Call) -> bytes:
    return transactions.sign(key, chain_id, nonce, call.to, call.encode(), transactions.CALL_GAS)


def test_bad_transactions_are_refused_and_change_nothing(cluster: Cluster) -> None:
    b = cluster.nodes["b"]
    admin, alice, stranger = (cluster.secret(name) for name in ("admin", "alice", "stranger"))
    chain_id = b.ask("getChainInfo")["chain_id"]
    nonce = b.ask("getAccount", account=cluster.accounts["admin"])["nonce"]
    before = head(b)
    call = EnrolAccounts((Address(bytes(19) + b"\x07"),))
    good = transaction(admin, chain_id, nonce, call)
    tampered = good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]
    refusals: list[tuple[bytes, type[Refused] | tuple[type[Refused], ...], str]] = [
        (transaction(admin, chain_id + 1, nonce, call), BadInput, str(chain_id)),
        (transaction(admin, chain_id, nonce - 1, call), Conflict, f"nonce too low: {nonce - 1}"),
        (transaction(alice, chain_id, 0, call), NotAllowed, "not an admin"),
        (transaction(stranger, chain_id, 0, call), NotAllowed, "not enrolled"),
        (tampered, (BadInput, NotAllowed), "sign|not enrolled"),
        (good[: len(good) // 2], BadInput, "transaction"),
    ]
    for raw, kind, part in refusals:
        with pytest.raises(kind, match=part) as caught:
            b.ask("sendRawTransaction", transaction=f"0x{raw.hex()}")
        assert "\n" not in str(caught.value)
        assert caught.value.code != Refused.code
    assert b.ask("getAccount", account=cluster.accounts["admin"])["nonce"] == nonce
    assert head(b) == before


def test_bad_commands_are_refused_in_one_line_and_change_nothing(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    before = head(b)
    admin = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
    manifest = ("--manifest", cluster.manifests[MODEL])
    b.cli("model", "info", "nope").refused("no model 'nope'", "aigen model list")
    b.cli("model", "load", "nope").refused("no model 'nope'")
    b.cli("chat", "nope", "hello").refused("no model 'nope'")
    b.cli("shard", "list", MODEL, "--version", "9").refused("version '9'")
    b.cli("model", "publish", MODEL, "--tier", "basic", *manifest, *admin).refused("registered already")
    b.cli("model", "publish", "other", "--tier", "gold", *manifest, *admin).refused("unknown tier")
    b.cli("model", "publish", "Bad Name", "--tier", "basic", *manifest, *admin).refused("Bad Name")
    b.cli("model", "publish", "x", "--tier", "basic", "--manifest", "zz", *admin).refused("64 hexadecimal digits")
    alice = ("--key", cluster.key("alice"), "--data-dir", a.data_dir)
    b.cli("model", "publish", "other", "--tier", "basic", *manifest, *alice).refused(
        "no admin", cluster.accounts["alice"]
    )
    b.cli("model", "retire", MODEL, "1", *alice).refused("not an admin")
    b.cli("model", "set-public", MODEL, "1", *alice).refused("not an admin")
    b.cli("model", "set-public", MODEL, "1", "--off", *admin).refused("model is not public")
    b.cli("model", "retire", MODEL, "1", *admin).refused("core model")
    stranger = ("--key", cluster.key("stranger"))
    b.cli("account", "enrol", cluster.accounts["stranger"], *stranger).refused("not enrolled", "aigen account enrol")
    b.cli("model", "unload", MODEL).refused("pinned")
    b.cli("model", "unload", LARGE).refused("no model")
    wrong = aigen("model", "retire", MODEL, "1", *admin, "--rpc", b.url, password="guess")
    wrong.refused("wrong password", str(cluster.key("admin")))
    aigen("model", "list", "--rpc", "http://127.0.0.1:1").refused("nothing answers", "aigen start")
    assert head(b) == before


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    publish(cluster, a, LARGE)
    until(lambda: [m["model_id"] for m in b.ask("listModels")["models"]] == [MODEL, LARGE], "B knows it", (a, b))
    until(lambda: min(b.copies(LARGE)) >= 2, "somebody beside A holds it", nodes(cluster, "a", "b", "c"))
    needed = str(b.ask("getModelInfo", model_id=LARGE)["total_size"])
    b.cli("model", "load", LARGE).refused(needed, str(CACHE_SIZE), MODEL)
    refused = b.cli("chat", LARGE, "hello")
    assert refused.status == 1
    assert needed in refused.err.splitlines()[-1], "below the progress of the load"
    with pytest.raises(NoSpace):
        b.ask("chatCompletion", model_id=LARGE, messages=QUESTION)
    assert b.ask("getLoadState", model_id=LARGE)["state"] == "failed"
    assert b.ask("getLoadState", model_id=MODEL)["pinned"]
    assert b.ask("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=2)["usage"]["completion_tokens"] == 2
    assert b.info()["status"] == "ready"


def test_a_second_node_on_a_data_directory_and_ports_in_use_are_refused(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    aigen("start", "--data-dir", b.data_dir).refused("in use by process", str(b.data_dir))
    aigen("ledger", "verify", "--data-dir", b.data_dir).refused("in use by another process")
    d = cluster.init("d", "storage", "--bootstrap", a.info()["endpoints"][0])
    for flag, port in (("--rpc-port", a.rpc_port), ("--control-port", a.rpc_port + 1), ("--data-port", a.rpc_port + 2)):
        aigen("start", "--data-dir", d.data_dir, flag, port).refused(str(port), "in use")
    assert len(a.ask("listNodes")) == 3


# Networks that do not fit


def test_another_genesis_is_turned_away_and_the_reason_is_visible(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    other = cluster.path / "other.toml"
    assert cluster.new_genesis(other, "--name", "other").json["chain_id"] == 19944
    bootstrap = a.info()["endpoints"][0]
    e = cluster.init("e", "storage", "--bootstrap", bootstrap, operator="d", genesis=other)
    e.start()
    answers = until(lambda: reachable(e), "E answers", (e,))
    assert answers
    until(lambda: "wrong genesis" in e.cli("status").out, "status says why", (e,))
    shown = e.cli("status")
    assert shown.status == 1
    assert a.node_id in shown.out
    assert "wrong genesis" in e.log()
    assert e.signal_and_wait(signal.SIGINT) == 0
    assert e.tracebacks() == []
    assert len(a.ask("listNodes")) == 3
    # Its data directory grown from one genesis, the other one put in its place.
    (e.data_dir / "genesis.toml").write_bytes(cluster.genesis.read_bytes())
    aigen("start", "--data-dir", e.data_dir).refused("grew from genesis", "--data-dir")


def step(node: Node, name: str) -> dict[str, Any]:
    return next(step for step in node.info()["steps"] if step["name"] == name)


def reachable(node: Node) -> bool:
    try:
        return bool(node.info())
    except NotFound:
        return False


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
    d = cluster.nodes["d"]
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


# Asked for


def small_hashes(node: Node) -> set[str]:
    return {shard["shard_hash"].removeprefix("0x") for shard in node.ask("getModelInfo", model_id=SMALL)["shards"]}


def load_state(node: Node, model_id: str) -> tuple[str, bool]:
    state = node.ask("getLoadState", model_id=model_id)
    return state["state"], state["pinned"]


def member(observer: Node, node: Node) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in observer.ask("listNodes") if row["node_id"] == node.node_id)
    return found


def test_a_gateway_holds_nothing_until_it_is_asked(cluster: Cluster) -> None:
    a, c = nodes(cluster, "a", "c")
    publish(cluster, a, SMALL)
    until(lambda: min(c.copies(SMALL)) >= 3, "the small model is replicated", (a, c))
    g = cluster.init("g", "gateway", "--bootstrap", a.info()["endpoints"][0], operator="alice")
    g.start()
    g.wait_ready()
    wait_same_head((a, g))
    assert g.info()["role"] == member(a, g)["role"] == "gateway"
    assert member(a, g)["shards_announced"] == 0
    assert (g.held(), g.info()["pieces_fetched"], g.info()["cache_used"]) == (set(), 0, 0)
    for method, params in (("listModels", {}), ("listNodes", {}), ("getShardLocations", {"model_id": MODEL})):
        assert g.ask(method, **params) == a.ask(method, **params)
    # A question loads: fetched, verified, mapped, answered.
    assert load_state(g, SMALL) == ("absent", False)
    answer = g.ask("chatCompletion", model_id=SMALL, messages=QUESTION, max_tokens=3)
    assert answer["usage"]["completion_tokens"] == 3
    hashes = small_hashes(a)
    assert (load_state(g, SMALL), g.held()) == (("loaded", False), hashes)
    assert g.info()["pieces_fetched"] == len(hashes), "of one piece each"
    assert g.info()["cache_used"] > 0
    until(lambda: member(a, g)["shards_announced"] == len(hashes), "what it holds is announced", (a, g))
    # And on request.
    assert "absent" in g.cli("model", "unload", SMALL).out
    assert (g.info()["cache_used"], g.held()) == (0, hashes)
    g.cli("model", "unload", SMALL).refused("not loaded")
    assert "loaded" in g.cli("model", "load", SMALL).out
    assert load_state(g, SMALL) == ("loaded", False)
    assert g.info()["pieces_fetched"] == len(hashes), "its shards were still here"
    g.stop()
    assert g.tracebacks() == []


def test_a_question_loads_a_model_beside_the_pinned_one(cluster: Cluster) -> None:
    b = cluster.nodes["b"]
    assert load_state(b, MODEL) == ("loaded", True)
    assert load_state(b, SMALL) == ("absent", False)
    before = b.info()["cache_used"]
    assert b.cli("chat", SMALL, "hello", "--max-tokens", 2, "--json").json["usage"]["completion_tokens"] == 2
    assert (load_state(b, SMALL), load_state(b, MODEL)) == (("loaded", False), ("loaded", True))
    assert b.info()["cache_used"] > before
    assert b.cli("model", "unload", SMALL, "--json").json["state"] == "absent"
    assert b.info()["cache_used"] == before
    assert b.cli("model", "load", SMALL, "--json").json["state"] == "loaded"
    assert b.info()["cache_used"] > before


# The other commands, as tables and as JSON


def field_of(done: Done, name: str) -> str:
    return next(cells[1] for cells in done.cells if cells[0] == name)


def row_of(done: Done, first: object) -> dict[str, str]:
    """The row that begins with this cell, by heading."""
    heading, *rows = done.cells
    return dict(zip(heading, next(row for row in rows if row[0] == str(first)), strict=True))


def test_commands_that_read_print_tables_and_json(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    shard = a.ask("getShardLocations", model_id=SMALL)["shards"][0]

    tiers = b.cli("tier", "list", "--json").json
    assert [row["rank"] for row in tiers if row["name"] == "basic"] == [1]
    row = row_of(b.cli("tier", "list"), "basic")
    assert (row["rank"], row["answers at once"], row["tokens a minute"]) == ("1", "4", "40000")

    listed = b.cli("model", "list", "--json").json["models"]
    assert (listed[0]["model_id"], listed[0]["core"]) == (MODEL, True)
    assert row_of(b.cli("model", "list"), MODEL)["state"] == "core"
    assert row_of(b.cli("model", "list"), MODEL)["loaded as"] == listed[0]["precision"] == "fp32"
    assert row_of(b.cli("model", "list"), "mistral-7b")["state"] == "catalogue"

    manifest = f"0x{cluster.manifests[SMALL].removeprefix('0x')}"
    assert b.cli("model", "info", SMALL, "--json").json["manifest_hash"] == manifest
    shown = b.cli("model", "info", SMALL)
    assert field_of(shown, "manifest_hash") == manifest
    assert shard["shard_hash"] in shown.out

    listed = [row for row in b.cli("node", "list", "--json").json if row["node_id"] == a.node_id]
    assert [(row["role"], row["operator"]) for row in listed] == [("storage", cluster.accounts["a"])]
    assert row_of(b.cli("node", "list"), a.node_id)["role"] == "storage"

    assert b.cli("shard", "list", SMALL, "--json").json["shards"][0]["shard_hash"] == shard["shard_hash"]
    before = a.ask("getShardLocations", model_id=SMALL)["shards"][0]["copies"]
    row = row_of(b.cli("shard", "list", SMALL), 0)
    assert row["SHA-256"] == shard["shard_hash"]
    # Nodes still announce and withdraw: what the table says is what was true before or after it.
    after = a.ask("getShardLocations", model_id=SMALL)["shards"][0]["copies"]
    assert row["copies"] in {f"{copies} of 3" for copies in range(min(before, after), max(before, after) + 1)}

    genesis_hash = b.ask("getChainInfo")["genesis_hash"]
    assert aigen("genesis", "show", cluster.genesis, "--json").json["genesis_hash"] == genesis_hash
    assert field_of(aigen("genesis", "show", cluster.genesis), "genesis_hash") == genesis_hash

    alice = cluster.accounts["alice"]
    assert b.cli("account", "info", alice, "--json").json["tier"] == "basic"
    assert field_of(b.cli("account", "info", alice), "tier") == "basic"
    assert aigen("account", "show", cluster.key("alice"), "--json").json["account"] == alice
    assert aigen("account", "show", cluster.key("alice")).cells == [[alice, str(cluster.key("alice"))]]


def test_commands_that_change_the_ledger_print_lines_and_json(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    admin = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)

    def account(address: str) -> tuple[bool, str | None]:
        info = b.ask("getAccount", account=address)
        return info["enrolled"], info["tier"]

    def change(*words: object, as_json: bool) -> None:
        """Typed at B; done when B says so, with the number of its block."""
        if as_json:
            done = b.cli(*words, *admin, "--json").json
            assert all(receipt["succeeded"] for receipt in (done if isinstance(done, list) else [done]))
        else:
            assert re.search(r"block \d+$", b.cli(*words, *admin).out.strip())

    for as_json in (False, True):
        path = cluster.path / "keys" / f"new-{as_json}.json"
        made = aigen("account", "new", path, *(["--json"] if as_json else []))
        new = made.json["account"] if as_json else made.cells[0][0]
        assert new == aigen("account", "show", path, "--json").json["account"]
        change("account", "enrol", new, "--tier", "basic", as_json=as_json)
        assert account(new) == (True, "basic")
        change("tier", "revoke", new, as_json=as_json)
        assert account(new) == (True, None)
        refused = b.cli("tier", "check", SMALL, "--account", new, *(["--json"] if as_json else []))
        assert refused.status == 1
        assert ('"granted": false' if as_json else f"{new} may not use {SMALL} 1") in refused.out
        change("tier", "grant", new, "pro", "--for", "1h", as_json=as_json)
        assert account(new) == (True, "pro")
        granted = b.cli("tier", "check", SMALL, "--account", new, *(["--json"] if as_json else []))
        assert granted.status == 0
        assert ('"held": "pro"' if as_json else f"{new} may use {SMALL} 1: holds pro, basic is needed") in granted.out
        change("account", "expel", new, as_json=as_json)
        assert not account(new)[0]
        model_id = f"brief-{as_json}".lower()
        cluster.manifests[model_id] = cluster.manifests[SMALL]
        publish(cluster, a, model_id)
        for off, state in (((), "registered, public"), (("--off",), "registered"), ((), "registered, public")):
            change("model", "set-public", model_id, 1, *off, as_json=as_json)
            assert row_of(b.cli("model", "list"), model_id)["state"] == state
            assert field_of(b.cli("model", "info", model_id), "public") == ("yes" if "public" in state else "no")
        b.cli("model", "set-public", model_id, 1, *admin).refused("model is already public")
        change("model", "retire", model_id, 1, as_json=as_json)
        assert row_of(b.cli("model", "list"), model_id)["state"] == "retired"


def test_a_chat_is_streamed_and_a_conversation_goes_on(cluster: Cluster) -> None:
    b = cluster.nodes["b"]

    def asked(*messages: dict[str, str]) -> dict[str, str]:
        answer: dict[str, str] = b.ask("chatCompletion", model_id=MODEL, messages=messages, max_tokens=6)["message"]
        return answer

    questions: list[dict[str, str]] = [{"role": "user", "content": text} for text in ("hello", "and Norway?")]
    first = asked(questions[0])
    second = asked(questions[0], first, questions[1])
    words = ("chat", MODEL, "--max-tokens", 6)
    assert b.cli(*words, "hello").out == f"{first['content']}\n"
    talked = b.cli(*words, typed="hello\n\n  and Norway?  \n")
    assert (talked.status, talked.out) == (0, f"{first['content']}\n{second['content']}\n")
    system = {"role": "system", "content": "Be brief."}
    assert b.cli(*words, "hello", "--system", "Be brief.").out == f"{asked(system, questions[0])['content']}\n"


def test_the_variables_of_the_environment_are_honoured(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    nobody = "http://127.0.0.1:1"
    assert aigen("status", "--json", AIGEN_RPC=b.url).json["node"]["node_id"] == b.node_id
    flagged = aigen("status", "--json", "--rpc", b.url, AIGEN_RPC=nobody).json
    assert flagged["node"]["node_id"] == b.node_id, "a flag wins"
    aigen("status", AIGEN_RPC=nobody).refused(nobody)
    check = ("tier", "check", MODEL, "--rpc", b.url, "--json")
    assert aigen(*check).json["account"] == cluster.accounts["b"], "the node's operator"
    assert aigen(*check, AIGEN_TOKEN=token(cluster, "alice")).json["account"] == cluster.accounts["alice"]
    made = aigen("token", "--json", AIGEN_KEY=str(cluster.key("guest")), AIGEN_DATA_DIR=str(a.data_dir)).json
    assert made["account"] == cluster.accounts["guest"]


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


def test_switching_the_core_model_takes_a_restart(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    admin = ("--key", cluster.key("admin"), "--data-dir", a.data_dir)
    assert not b.is_running()
    assert a.cli("model", "set-core", SMALL, 1, *admin, "--json").json["succeeded"]
    assert SMALL in aigen("model", "switch", SMALL, "--data-dir", b.data_dir).out
    b.start()
    b.wait_ready()
    wait_same_head((a, b))
    assert [m["model_id"] for m in b.ask("listModels")["models"] if m["core"]] == [SMALL]
    assert b.info()["core_model"] == SMALL
    assert (load_state(b, SMALL), load_state(b, MODEL)) == (("loaded", True), ("absent", False))
    b.cli("model", "unload", SMALL).refused("pinned")
    # The old core model is one like any other now.
    assert b.ask("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=2)["usage"]["completion_tokens"] == 2
    assert load_state(b, MODEL) == ("loaded", False)
    assert b.cli("model", "unload", MODEL, "--json").json["state"] == "absent"


def test_models_are_loaded_in_fewer_bits_and_are_so_again_after_a_restart(cluster: Cluster) -> None:
    (b,) = nodes(cluster, "b")
    config = b.data_dir / "config.toml"
    b.stop()
    config.write_text(config.read_text().replace('quantization = "auto"', 'quantization = "int8"'))
    answers = []
    for _ in range(2):
        b.start()
        b.wait_ready()
        answers.append(b.ask("chatCompletion", model_id=MODEL, messages=QUESTION, max_tokens=2)["message"])
        assert {m["model_id"]: m["precision"] for m in b.ask("listModels")["models"] if m["precision"]} == {
            MODEL: "int8",
            SMALL: "int8",
        }
        assert row_of(b.cli("model", "list"), MODEL)["loaded as"] == "int8"
        assert b.ask("getLoadState", model_id=MODEL)["precision"] == "int8"
        made = sorted((b.data_dir / "store" / "quantised").iterdir())
        assert [path.name for path in made] == sorted(
            f"{cluster.manifests[model_id].removeprefix('0x')}.int8" for model_id in (MODEL, SMALL)
        )
        assert b.info()["cache_used"] == sum(path.stat().st_size for path in made)
        b.stop()
    assert answers[0] == answers[1]
    config.write_text(config.read_text().replace('quantization = "int8"', 'quantization = "auto"'))
    b.start()
    b.wait_ready()
    assert b.ask("getModelInfo", model_id=SMALL)["precision"] == "fp32"


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
