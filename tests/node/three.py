"""The network of the process tests, of which a seals, b answers and c keeps copies, and what they ask of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contracts.calls import Call
from contracts.errors import NotFound
from ledger import transactions
from ledger.keys import Key
from tests.node.cluster import MIB, MODEL, Cluster, Done, Node, aigen, until, write_model

LARGE = "too-large"
"""A model that does not fit beside the pinned one."""

SMALL = "tiny-small"
"""One that does."""

CACHE_SIZE = 19_000_000
"""Beside the pinned model it has no room for another of that size, not in int4 either."""

QUESTION = [{"role": "user", "content": "Where is Paris?"}]

CHANGES: dict[str, dict[str, object]] = {
    MODEL: {},
    LARGE: {"initializer_range": 0.1},
    SMALL: {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "initializer_range": 0.2},
}


@contextlib.contextmanager
def three_nodes(path: Path, *others: str) -> Iterator[Cluster]:
    """Three nodes with the model on all of them: a (authority, storage), b (worker), c (storage). A has imported
    `others` too; nobody has published them yet."""
    made = Cluster(path)
    for name in ("admin", "a", "b", "c", "d", "alice", "guest", "stranger"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).json["shard_size"] == MIB
    a = made.init("a", "storage")
    for model_id in (MODEL, *others):
        directory = write_model(made.path / model_id, **CHANGES[model_id])
        imported = aigen("model", "import", directory, "--data-dir", a.data_dir, "--json")
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


def transaction(key: Key, chain_id: int, nonce: int, call: Call) -> bytes:
    return transactions.sign(key, chain_id, nonce, call.to, call.encode(), transactions.CALL_GAS)


def step(node: Node, name: str) -> dict[str, Any]:
    return next(step for step in node.info()["steps"] if step["name"] == name)


def reachable(node: Node) -> bool:
    try:
        return bool(node.info())
    except NotFound:
        return False


def load_state(node: Node, model_id: str) -> tuple[str, bool]:
    state = node.ask("getLoadState", model_id=model_id)
    return state["state"], state["pinned"]


def field_of(done: Done, name: str) -> str:
    return next(cells[1] for cells in done.cells if cells[0] == name)


def row_of(done: Done, first: object) -> dict[str, str]:
    """The row that begins with this cell, by heading."""
    heading, *rows = done.cells
    return dict(zip(heading, next(row for row in rows if row[0] == str(first)), strict=True))
