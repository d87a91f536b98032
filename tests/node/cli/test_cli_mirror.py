"""`aigen mirror`, `aigen shard export` and `aigen shard cid` against one node, running and stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import Conflict, NotFound
from contracts.types import ManifestHash
from node.cli.mirror import chosen
from node.storage.store import ShardStore
from node.storage.unixfs import root_cid
from tests.node.cluster import MODEL, Cluster, Node, aigen, flip, write_model

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1}
OTHER = "tiny-other"
URL = "https://example.org/models"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A sole node, running, with two models of a few shards."""
    made = Cluster(tmp_path_factory.mktemp("mirrors"))
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).status == 0
    node = made.init("a", "storage")
    admin = ("--key", made.key("admin"), "--data-dir", node.data_dir)
    try:
        for model_id, changes in ((MODEL, SMALL), (OTHER, {**SMALL, "num_hidden_layers": 2})):
            source = write_model(made.path / model_id, **changes)
            imported = aigen("model", "import", source, "--data-dir", node.data_dir, "--json").json
            made.manifests[model_id] = imported["manifest_hash"]
        node.start()
        node.wait_ready()
        for model_id, manifest in made.manifests.items():
            publish = ("model", "publish", model_id, "--manifest", manifest, "--tier", "basic")
            assert node.cli(*publish, *admin, "--json").json["succeeded"]
        yield made
    finally:
        made.kill_all()


@pytest.fixture
def node(cluster: Cluster) -> Node:
    return cluster.nodes["a"]


@pytest.fixture
def admin(cluster: Cluster, node: Node) -> tuple[object, ...]:
    return ("--key", cluster.key("admin"), "--data-dir", node.data_dir)


def mirrors(node: Node) -> set[tuple[str, str, str]]:
    return {(row["model_id"], row["kind"], row["url"]) for row in node.cli("mirror", "list", "--json").json}


def test_mirrors_are_added_listed_and_removed(node: Node, admin: tuple[object, ...]) -> None:
    assert node.cli("mirror", "list").out == "model  version  kind  url\n"
    assert (
        f"{URL} (http) is a mirror of {MODEL} version 1 from block"
        in node.cli("mirror", "add", MODEL, f"{URL}/", *admin).out
    )
    gateway = ("mirror", "add", MODEL, "http://127.0.0.1:8080", "--kind", "ipfs", "--version", 1)
    assert node.cli(*gateway, *admin, "--json").json["succeeded"]
    assert node.cli("mirror", "add", OTHER, URL, *admin).status == 0
    assert mirrors(node) == {(MODEL, "http", URL), (MODEL, "ipfs", "http://127.0.0.1:8080"), (OTHER, "http", URL)}
    assert node.cli("mirror", "list", OTHER).cells == [["model", "version", "kind", "url"], [OTHER, "1", "http", URL]]
    assert ", 2 mirrors " in node.cli("shard", "list", MODEL).out
    removed = node.cli("mirror", "remove", MODEL, f"{URL}/", *admin).out
    assert f"{URL} (http) is no mirror of {MODEL} version 1 from block" in removed
    assert node.cli("mirror", "remove", OTHER, URL, "--json", *admin).json["succeeded"]
    assert mirrors(node) == {(MODEL, "ipfs", "http://127.0.0.1:8080")}


def on_the_ledger(*places: tuple[str, str]) -> list[dict[str, str]]:
    return [{"kind": kind, "url": url} for kind, url in places]


@pytest.mark.parametrize(
    ("places", "url", "kind", "which"),
    [
        ([("http", "http://a"), ("http", "http://b")], "http://b/", None, 1),
        ([("http", "http://a//"), ("http", "http://b")], "http://a", None, 0),
        ([("http", "http://a/"), ("http", "http://a")], "http://a", None, 1),
        ([("http", "http://a"), ("ipfs", "http://a")], "http://a", "ipfs", 1),
        ([("ipfs", "bafy-no-address")], "bafy-no-address", None, 0),
    ],
)
def test_the_mirror_that_is_meant(places: list[tuple[str, str]], url: str, kind: str | None, which: int) -> None:
    found = on_the_ledger(*places)
    assert chosen(found, url, kind) == found[which]


def test_no_mirror_is_guessed() -> None:
    with pytest.raises(Conflict, match=r"2 mirrors could be meant: http://a \(http\), http://a \(ipfs\); give --kind"):
        chosen(on_the_ledger(("http", "http://a"), ("ipfs", "http://a")), "http://a", None)
    with pytest.raises(Conflict, match="2 mirrors could be meant"):
        chosen(on_the_ledger(("http", "http://a/"), ("http", "http://a//")), "http://a", "http")
    with pytest.raises(NotFound, match="aigen mirror list"):
        chosen(on_the_ledger(("http", "http://a")), "http://a", "ipfs")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.org/", "expected http"),
        ("example.org", "expected http"),
        ("http://me:secret@example.org/", "carries a user name or password"),
        ("http://example.org/?key=1", "has a query"),
        ("http://example.org/#x", "has a fragment"),
        ("http://example.org/" + "x" * 300, "319 characters, the ledger takes 256"),
        ("http://example.org/" + "x" * 3000, "at most 2,048"),
    ],
)
def test_what_is_no_address_is_refused_before_a_key_is_opened(node: Node, url: str, why: str) -> None:
    node.cli("mirror", "add", MODEL, url, "--key", "no-such-key.json").refused(why)


def test_what_the_ledger_does_not_have_is_refused(cluster: Cluster, node: Node, admin: tuple[object, ...]) -> None:
    before = mirrors(node)
    node.cli("mirror", "add", "no-such-model", URL, *admin).refused("no model 'no-such-model'", "aigen model list")
    node.cli("mirror", "add", MODEL, URL, "--version", 9, *admin).refused("the contract refuses", "unknown model")
    node.cli("mirror", "add", MODEL, URL, "--kind", "torrent", *admin).refused("torrent", status=2)
    alice = ("--key", cluster.key("alice"), "--data-dir", node.data_dir)
    node.cli("mirror", "add", MODEL, URL, *alice).refused("not an admin")
    node.cli("mirror", "remove", MODEL, URL, *admin).refused("no such mirror", URL, "aigen mirror list")
    node.cli("mirror", "list", "no-such-model").refused("no model 'no-such-model'")
    node.cli("mirror", "list", "--version", 1).refused("--version goes with a MODEL_ID")
    assert node.cli("mirror", "add", MODEL, URL, *admin).status == 0
    node.cli("mirror", "add", MODEL, URL, *admin).refused("already added")
    assert node.cli("mirror", "remove", MODEL, URL, *admin).status == 0
    assert mirrors(node) == before


@pytest.mark.parametrize("answer", [{}, None, {"model_id": MODEL, "version": "1", "manifest_hash": "0xno"}])
def test_a_node_that_answers_something_else_is_named(
    answer: object, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.rpc.client.RpcClient.call", lambda *_, **__: answer)
    done = node.cli("shard", "cid", MODEL, "--data-dir", node.data_dir)
    done.refused("answered with no model", node.url, "does that node run this version?")


def test_cids_are_those_of_the_manifest(cluster: Cluster, node: Node) -> None:
    manifest_hash = ManifestHash(bytes.fromhex(cluster.manifests[MODEL].removeprefix("0x")))
    shards = ShardStore(node.data_dir / "store").manifest(manifest_hash).shards
    done = node.cli("shard", "cid", MODEL, "--data-dir", node.data_dir, "--json").json
    assert (done["model_id"], done["version"], done["manifest_hash"]) == (MODEL, "1", cluster.manifests[MODEL])
    assert [row["cid"] for row in done["shards"]] == [root_cid(shard) for shard in shards]
    assert [row["shard_hash"] for row in done["shards"]] == [f"0x{shard.sha256.hex()}" for shard in shards]
    table = node.cli("shard", "cid", MODEL, "--version", 1, "--data-dir", node.data_dir).cells
    assert [row[2] for row in table[1:]] == [root_cid(shard) for shard in shards]


def test_what_is_not_there_is_refused(node: Node, tmp_path: Path) -> None:
    target = tmp_path / "www"
    for command in (("shard", "cid"), ("shard", "export", target)):
        node.cli(*command, MODEL, "--data-dir", tmp_path / "typo").refused("no store in", "--data-dir")
        assert not (tmp_path / "typo").exists()
        node.cli(*command, "no-such-model", "--data-dir", node.data_dir).refused("no model 'no-such-model'")
        node.cli(*command, MODEL, "--version", 9, "--data-dir", node.data_dir).refused("version '9'")
    node.cli("shard", "export", target, "--data-dir", node.data_dir).refused("MODEL_ID", status=2)
    (tmp_path / "file").write_bytes(b"")
    node.cli("shard", "export", tmp_path / "file", MODEL, "--data-dir", node.data_dir).refused("file", status=2)
    (tmp_path / "empty" / "store").mkdir(parents=True)
    node.cli("shard", "cid", MODEL, "--data-dir", tmp_path / "empty").refused("no ledger in", "start the node once")
    assert not target.exists()


def test_a_copy_that_does_not_fit_is_one_line(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.storage.export.DISK_RESERVE_BYTES", 1 << 60)
    copy = ("shard", "export", tmp_path / "www", MODEL, "--copy", "--data-dir", node.data_dir)
    node.cli(*copy).refused("needs 304.5 kB", "free for it are 0 bytes", "free some disk space")
    assert not any(path.is_file() for path in (tmp_path / "www").rglob("*"))


def test_an_export_beside_a_running_node_and_without_one(node: Node, tmp_path: Path) -> None:
    """The last test here: it stops the node."""
    here = ("--data-dir", node.data_dir)
    cids = node.cli("shard", "cid", MODEL, *here).out
    done = node.cli("shard", "export", tmp_path / "www", MODEL, OTHER, *here)
    assert "0 copied, 0 there already, each SHA-256 verified" in done.out, done
    assert f"aigen mirror add {MODEL} URL" in done.out
    files = {path.name for path in (tmp_path / "www").rglob("*") if path.is_file()}
    assert files == {
        path.name for kind in ("shards", "manifests") for path in (node.data_dir / "store" / kind).iterdir()
    }
    node.stop()
    # No node answers now: the ledger in the data directory does.
    assert aigen("shard", "cid", MODEL, *here, "--rpc", "http://127.0.0.1:1").out == cids
    again = aigen("shard", "export", tmp_path / "www", MODEL, OTHER, *here, "--json").json
    assert (again["linked"], again["copied"], again["kept"]) == (0, 0, len(node.held()))
    assert [row["model_id"] for row in again["models"]] == [MODEL, OTHER]
    copied = aigen("shard", "export", tmp_path / "copy", MODEL, "--copy", *here, "--json").json
    assert copied["copied"] == len(json.loads(aigen("shard", "cid", MODEL, *here, "--json").out)["shards"])
    aigen("shard", "cid", "no-such-model", *here).refused("no model no-such-model")
    bad = sorted((node.data_dir / "store" / "shards").iterdir())[0]
    flip(bad, 100)
    aigen("shard", "export", tmp_path / "new", MODEL, OTHER, *here).refused(bad.name, "damaged", "aigen shard verify")
    bad.unlink()
    aigen("shard", "export", tmp_path / "new", MODEL, OTHER, *here).refused("are not held", "export on a node")
