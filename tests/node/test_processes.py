"""The main job and what is refused in it, on real node processes: libp2p, TLS, LevelDB, an engine with torch.

One network for the whole module; the tests run in the order they stand, each leaves it whole.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.calls import EnrolAccounts
from contracts.errors import BadInput, Conflict, NotAllowed, Refused
from contracts.types import Address
from tests.node.cluster import MODEL, Cluster, Node, aigen, flip, until
from tests.node.three import (
    LARGE,
    QUESTION,
    SMALL,
    field_of,
    head,
    nodes,
    publish,
    reachable,
    row_of,
    three_nodes,
    token,
    transaction,
    wait_same_head,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with three_nodes(tmp_path_factory.mktemp("cluster"), SMALL) as made:
        yield made


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


# The other commands, as tables and as JSON


def test_commands_that_read_print_tables_and_json(cluster: Cluster) -> None:
    a, b = nodes(cluster, "a", "b")
    publish(cluster, a, SMALL)
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
