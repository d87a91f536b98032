"""`aigen` without a network: setting up, and what is refused before a node runs. Each one line, nothing changed."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import msgspec
import pytest

from genesis import config as genesis_config
from ledger import snapshot
from ledger.accounts import Standing
from ledger.ledger import Ledger
from ledger.snapshot import Snapshot
from node import state
from node.config import Config, load, render
from node.replay import Replay
from node.storage.files import DirectoryLock
from tests.ledger.world import open_ledger
from tests.node.cluster import MIB, Cluster, aigen, write_model


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    made = Cluster(tmp_path_factory.mktemp("cli"))
    for name in ("admin", "a", "b", "c", "d", "alice", "guest"):
        made.new_key(name)
    assert made.new_genesis(made.genesis).status == 0
    made.init("a", "storage")
    return made


@pytest.fixture
def data_dir(cluster: Cluster, tmp_path: Path) -> Path:
    """A node's directory of the test's own."""
    shutil.copytree(cluster.path / "a", tmp_path / "node")
    return tmp_path / "node"


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# init


def test_init_founds_a_network_with_its_operator(tmp_path: Path) -> None:
    made = aigen("init", "--model", "mistral-7b", "--role", "worker", "--data-dir", tmp_path / "node")
    assert made.status == 0, made
    assert f"aigen start --data-dir {tmp_path / 'node'}" in made.out
    names = {path.name for path in (tmp_path / "node").iterdir()}
    assert names == {"config.toml", "genesis.toml", "node.key", "keys"}
    config = load(tmp_path / "node" / "config.toml", environment={})
    assert (config.node.role, config.node.model, config.inference.cache_size) == (
        "worker",
        "mistral-7b",
        32_000_000_000,
    )
    for secret in ("node.key", "keys/operator.json"):
        assert (tmp_path / "node" / secret).stat().st_mode & 0o077 == 0


def test_init_on_a_used_directory_changes_nothing(data_dir: Path) -> None:
    before = tree(data_dir)
    aigen("init", "--data-dir", data_dir).refused("not empty", str(data_dir), "--data-dir")
    assert tree(data_dir) == before


def test_a_failed_init_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    target = ("--data-dir", tmp_path / "node")
    aigen("init", *target, password=None).refused("no password", "AIGEN_PASSWORD")
    aigen("init", "--rpc-port", 9945, *target).refused("9945", "its own")
    aigen("init", "--rpc-port", 70_000, *target).refused("70000", "65535")
    aigen("init", "--model", "No Model", *target).refused("No Model")
    aigen("init", "--bootstrap", "localhost:9945", *target).refused("localhost:9945", "/ip4/")
    aigen("init", "--operator-key", cluster.key("a"), *target, password="guess").refused("wrong password")
    aigen("init", "--operator-key", tmp_path / "none.json", *target).refused("no key at")
    (tmp_path / "bad.toml").write_text("admins = 3\n")
    aigen("init", "--genesis", tmp_path / "bad.toml", *target).refused("genesis", "admins", "array")
    aigen("init", "--genesis", tmp_path / "none.toml", *target).refused("none.toml")
    (tmp_path / "file").write_text("")
    aigen("init", "--data-dir", tmp_path / "file" / "node").refused(str(tmp_path / "file"))
    assert {path.name for path in tmp_path.iterdir()} == {"bad.toml", "file"}


def test_keys_and_genesis_files_are_never_overwritten(cluster: Cluster, tmp_path: Path) -> None:
    before = cluster.genesis.read_bytes(), cluster.key("a").read_bytes()
    cluster.new_genesis(cluster.genesis).refused("exists", str(cluster.genesis))
    aigen("account", "new", cluster.key("a")).refused("exists", str(cluster.key("a")))
    cluster.new_genesis(tmp_path / "no" / "such" / "genesis.toml").refused("genesis.toml", "no such file")
    assert before == (cluster.genesis.read_bytes(), cluster.key("a").read_bytes())


def test_genesis_new_names_what_is_wrong(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "genesis.toml"
    cluster.new_genesis(path, "--account", "0x12=basic").refused("0x12", "20")
    cluster.new_genesis(path, "--account", f"0x{'11' * 20}=gold").refused("gold")
    cluster.new_genesis(path, "--shard-size", 1000).refused("1000")
    assert not path.exists()


# start


def test_start_without_a_node(tmp_path: Path) -> None:
    aigen("start", "--data-dir", tmp_path).refused("aigen init", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_start_with_a_wrong_password(data_dir: Path) -> None:
    before = tree(data_dir)
    aigen("start", "--data-dir", data_dir, password="guess").refused("wrong password", "operator.json")
    assert tree(data_dir) == before


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("[node]", "[node", ("not TOML", "line")),
        ("[rpc]", '[rpc]\ncolour = "red"', ("colour", "rpc")),
        ('role = "storage"', "role = 3", ("node.role",)),
        ('role = "storage"', 'role = "king"', ("king", "node.role")),
        ("body_bytes = 4_194_304", "body_bytes = 0", ("rpc.body_bytes", "above 0")),
        ("body_bytes = 4_194_304", 'body_bytes = "many"', ("rpc.body_bytes",)),
        ("control_port = ", "control_port = 9", ("network.control_port", "65535")),
        ("bootstrap = []", 'bootstrap = ["nowhere"]', ("nowhere", "/ip4/")),
        ('listen = "127.0.0.1"', 'listen = "0.0.0.0"', ("network.advertise",)),
        ("threads = 0", "threads = -1", ("inference.threads", "-1")),
    ],
)
def test_a_corrupted_config_is_named(data_dir: Path, old: str, new: str, parts: tuple[str, ...]) -> None:
    config = data_dir / "config.toml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    aigen("start", "--data-dir", data_dir).refused(*parts)


def test_a_missing_or_damaged_identity_is_named(data_dir: Path) -> None:
    key = data_dir / "node.key"
    key.write_text("no key")
    aigen("start", "--data-dir", data_dir).refused("node.key", "restore")
    key.unlink()
    aigen("start", "--data-dir", data_dir).refused("node.key", "aigen init")


def test_a_damaged_genesis_file_is_named(data_dir: Path) -> None:
    genesis = data_dir / "genesis.toml"
    genesis.write_text(genesis.read_text().replace("[shards]", "[shard]"))
    aigen("start", "--data-dir", data_dir).refused("genesis", "`shard`")


# model import


def test_what_is_no_model_is_not_imported(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "readme.txt").write_text("hello")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    text = tmp_path / "model.txt"
    text.write_text("hello")
    pickled = write_model(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1.0]}))
    before = tree(data_dir)

    def refused(source: Path, *parts: str) -> None:
        aigen("model", "import", source, "--data-dir", data_dir).refused(*parts)

    refused(folder, "config.json")
    refused(gguf, "model.gguf")
    refused(text, "model.txt")
    refused(pickled, "pytorch_model.bin", "safetensors")
    missing = aigen("model", "import", tmp_path / "none", "--data-dir", data_dir)
    missing.refused(str(tmp_path / "none"), "does not exist", "aigen model import --help", status=2)
    after = {name: data for name, data in tree(data_dir).items() if not name.startswith("store/")}
    assert after == before
    assert not any((data_dir / "store" / "shards").iterdir())
    assert not any((data_dir / "store" / "scratch").iterdir())


def test_an_import_beyond_the_disk_budget_is_refused_with_the_numbers(data_dir: Path, tmp_path: Path) -> None:
    config = data_dir / "config.toml"
    config.write_text(config.read_text().replace("disk_budget = 500_000_000_000", f"disk_budget = {3 * MIB}"))
    source = write_model(tmp_path / "model")
    aigen("model", "import", source, "--data-dir", data_dir).refused("budget", "3.1 MB", "15.")
    assert not any((data_dir / "store" / "shards").iterdir())
    assert (source / "model.safetensors").exists()


def test_publish_without_an_import(data_dir: Path) -> None:
    done = aigen("model", "publish", "m", "--tier", "basic", "--data-dir", data_dir)
    done.refused("no model was imported", "aigen model import")


# the rest


def test_switching_the_core_model_keeps_every_comment(data_dir: Path) -> None:
    before = (data_dir / "config.toml").read_text()
    assert aigen("model", "switch", "llama2-13b", "--data-dir", data_dir, "--json").json["model"] == "llama2-13b"
    assert (data_dir / "config.toml").read_text() == before.replace('model = ""', 'model = "llama2-13b"')
    aigen("model", "switch", "No!", "--data-dir", data_dir).refused("No!")


def test_a_token_is_made_offline(data_dir: Path, cluster: Cluster) -> None:
    made = aigen("token", "--key", cluster.key("alice"), "--data-dir", data_dir, "--for", "12h", "--json").json
    assert made["account"] == cluster.accounts["alice"]
    assert made["token"].startswith("aigen_")
    aigen("token", "--for", "soon", "--data-dir", data_dir).refused("soon", "30d")


@pytest.fixture
def ledger_dir(data_dir: Path) -> Path:
    """The ledger of a node that was started once."""
    Ledger.open(data_dir / "ledger", genesis_config.load(data_dir / "genesis.toml")).close()
    return data_dir / "ledger"


def test_a_corrupted_ledger_is_named_and_left_alone(data_dir: Path, ledger_dir: Path) -> None:
    """Whichever of its files is overwritten: no traceback, and no fresh start over what is there."""
    originals = {path: path.read_bytes() for path in ledger_dir.iterdir() if path.stat().st_size and path.name != "LOG"}
    assert {path.suffix for path in originals} >= {".log"}
    for path, original in originals.items():
        path.write_bytes(bytes(byte ^ 0xA5 for byte in original))
        for command in (("start",), ("ledger", "verify")):
            aigen(*command, "--data-dir", data_dir).refused("the ledger in", str(ledger_dir))
        assert all(copy.exists() for copy in originals)
        for other, content in originals.items():
            other.write_bytes(content)
    assert aigen("ledger", "verify", "--data-dir", data_dir).status == 0


def test_a_data_directory_grown_from_another_genesis(cluster: Cluster, data_dir: Path, ledger_dir: Path) -> None:
    genesis = (data_dir / "genesis.toml").rename(data_dir / "kept.toml")
    assert cluster.new_genesis(data_dir / "genesis.toml", "--name", "other").status == 0
    aigen("start", "--data-dir", data_dir).refused("grew from genesis", "0x", "--data-dir")
    genesis.replace(data_dir / "genesis.toml")
    assert aigen("ledger", "verify", "--data-dir", data_dir).status == 0, "nothing of it was lost"


def test_verify_without_a_ledger(data_dir: Path) -> None:
    aigen("ledger", "verify", "--data-dir", data_dir).refused("no ledger", "--data-dir")


def damage(ledger_dir: Path) -> None:
    (manifest,) = ledger_dir.glob("MANIFEST-*")
    manifest.write_bytes(b"")


def test_resync_sets_the_ledger_aside(data_dir: Path, ledger_dir: Path, cluster: Cluster) -> None:
    """Also a damaged one, when its node is no authority; the message of the damage names the command."""
    genesis_of_others = cluster.path / "others.toml"
    cluster.new_genesis(genesis_of_others, authorities=("alice",))
    shutil.copy(genesis_of_others, data_dir / "genesis.toml")
    shutil.rmtree(ledger_dir)
    Ledger.open(ledger_dir, genesis_config.load(data_dir / "genesis.toml")).close()
    damage(ledger_dir)
    before = tree(ledger_dir)
    aigen("ledger", "verify", "--data-dir", data_dir).refused("MANIFEST-", "aigen ledger resync")
    assert tree(ledger_dir).keys() >= before.keys() - {"LOG", "LOG.old"}
    done = aigen("ledger", "resync", "--data-dir", data_dir)
    assert (done.status, done.err) == (0, "")
    (aside,) = data_dir.glob("ledger.20*")
    assert str(aside) in done.out
    assert tree(aside).keys() >= before.keys()
    assert not ledger_dir.exists()
    aigen("ledger", "resync", "--data-dir", data_dir).refused("no ledger")


def test_resync_of_an_authority_warns_and_notes(data_dir: Path, ledger_dir: Path) -> None:
    done = aigen("ledger", "resync", "--data-dir", data_dir, "--json")
    assert done.json["waits_for_block"] == 0
    assert (data_dir / "ledger.votes-lost").exists()
    Ledger.open(ledger_dir, genesis_config.load(data_dir / "genesis.toml")).close()
    damage(ledger_dir)
    aigen("ledger", "resync", "--data-dir", data_dir).refused("is an authority", "--past", "aigen status")
    assert ledger_dir.exists()


def test_resync_of_an_authority_that_cannot_be_read(data_dir: Path, ledger_dir: Path) -> None:
    damage(ledger_dir)
    done = aigen("ledger", "resync", "--past", 7, "--data-dir", data_dir)
    assert done.status == 0
    assert "WARNING" in done.err
    assert "past block 7" in done.err
    assert not ledger_dir.exists()


def test_resync_while_the_node_runs(data_dir: Path, ledger_dir: Path) -> None:
    with DirectoryLock(data_dir):
        aigen("ledger", "resync", "--data-dir", data_dir).refused("in use by process", str(data_dir))
    assert ledger_dir.exists()


def test_verify_notices_a_wrong_snapshot(data_dir: Path, ledger_dir: Path) -> None:
    """Its bytes are whole, and not what the blocks fold to: a memory erred."""
    with open_ledger(ledger_dir, genesis_config.load(data_dir / "genesis.toml")) as ledger:
        replay = Replay(ledger)
        replay.catch_up()
        right = Snapshot(ledger.genesis_hash, 0, ledger.head.hash, replay._newest.standing, state.encode(replay.state))
        snapshot.write(ledger_dir, right)
    assert aigen("ledger", "verify", "--data-dir", data_dir).status == 0
    for changed in ({"projections": state.encode(state.State())}, {"standing": Standing()}):
        snapshot.write(ledger_dir, msgspec.structs.replace(right, **changed))
        aigen("ledger", "verify", "--data-dir", data_dir).refused("ledger.snapshot", "remove that file")


def test_the_written_config_reads_back(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(render(Config()))
    assert load(tmp_path / "config.toml", environment={}) == Config()
