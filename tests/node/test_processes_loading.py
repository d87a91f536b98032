"""What real node processes load, and in how many bits: beside the pinned model, on request, after a change of it.

One network for the whole module; the tests run in the order they stand, and some go on with what earlier ones left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from contracts.errors import NoSpace
from tests.node.cluster import MODEL, Cluster, Node, aigen, until
from tests.node.three import (
    CACHE_SIZE,
    LARGE,
    QUESTION,
    SMALL,
    load_state,
    nodes,
    publish,
    row_of,
    three_nodes,
    wait_same_head,
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with three_nodes(tmp_path_factory.mktemp("cluster"), LARGE, SMALL) as made:
        yield made


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


def small_hashes(node: Node) -> set[str]:
    return {shard["shard_hash"].removeprefix("0x") for shard in node.ask("getModelInfo", model_id=SMALL)["shards"]}


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


def test_models_are_loaded_in_fewer_bits_and_are_so_again_after_a_restart(cluster: Cluster) -> None:
    (b,) = nodes(cluster, "b")
    config = b.data_dir / "config.toml"
    b.stop()
    config.write_text(config.read_text().replace('quantization = "auto"', 'quantization = "int8"'))
    answers = []
    for _ in range(2):
        b.start()
        b.wait_ready()
        answers.append(b.ask("chatCompletion", model_id=SMALL, messages=QUESTION, max_tokens=2)["message"])
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
    precisions = {b.ask("getModelInfo", model_id=model_id)["precision"] for model_id in (MODEL, SMALL)}
    assert precisions == {"fp32"}, "what was made of fewer bits is left alone"
    assert b.cli("model", "unload", MODEL, "--json").json["state"] == "absent"
