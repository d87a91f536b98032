"""Settings: defaults, file, variables, flags, in that order; every mistake named."""

from pathlib import Path

import msgspec
import pytest

from contracts.errors import BadInput, Conflict, NotFound
from node import config as settings
from node.config import GB, Config, NetworkSettings, NodeSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    settings.write(path, Config())
    return path


def load(path: Path, environment: dict[str, str] | None = None, **flags: object) -> Config:
    return settings.load(path, environment or {}, {name.replace("__", "."): value for name, value in flags.items()})


def test_written_config_reads_back_as_it_was(tmp_path: Path) -> None:
    config = Config(
        node=NodeSettings("storage", 'a"b'),
        network=NetworkSettings("0.0.0.0", "höst", bootstrap=("/ip4/1.2.3.4/tcp/1/p2p/x", "y")),
    )
    path = tmp_path / "deep" / "config.toml"
    settings.write(path, config)
    assert load(path) == config


def test_written_config_has_every_setting(path: Path) -> None:
    assert load(path) == Config()
    import tomllib

    tables = tomllib.loads(path.read_text())
    for section in msgspec.structs.fields(Config):
        assert set(tables[section.name]) == {field.name for field in msgspec.structs.fields(section.type)}


def test_existing_config_is_not_overwritten(path: Path) -> None:
    path.write_text("# mine\n")
    with pytest.raises(Conflict, match="set up already"):
        settings.write(path, Config())
    assert path.read_text() == "# mine\n"


def test_order_of_sources(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[rpc]\nport = 1\nbatch_size = 1\nbody_bytes = 1\n")
    found = load(path, {"AIGEN_RPC_PORT": "2", "AIGEN_RPC_BATCH_SIZE": "2"}, rpc__port=3)
    assert (found.rpc.port, found.rpc.batch_size, found.rpc.body_bytes, found.rpc.host) == (3, 2, 1, "127.0.0.1")


def test_variables_of_every_kind(path: Path) -> None:
    environment = {
        "AIGEN_NODE_ROLE": "gateway",
        "AIGEN_NETWORK_BOOTSTRAP": " a, b ,,",
        "AIGEN_STORAGE_SCRUB_INTERVAL_S": "1.5",
        "AIGEN_NETWORK_PLAIN_TCP": "true",
        "AIGEN_INFERENCE_QUANTIZATION": "int8",
        "AIGEN_INFERENCE_RECEIPTS": "false",
        "AIGEN_PASSWORD": "of something else",
    }
    found = load(path, environment)
    assert found.inference.quantization == "int8"
    assert (found.inference.receipts, load(path).inference.receipts) == (False, True)
    assert found.node.role == "gateway"
    assert found.network.bootstrap == ("a", "b")
    assert found.storage.scrub_interval_s == 1.5
    assert (found.network.plain_tcp, load(path).network.plain_tcp) == (True, False)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[rpc]\nport = 'x'", "port"),
        ("[rpc]\nport = 70000", "rpc.port is 70000"),
        ("[rpc]\nport = -1", "rpc.port is -1"),
        ("[rpc]\nport = 9945", "give each its own"),
        ("[rpc]\nprot = 1", "prot"),
        ("[rcp]\nport = 1", "rcp"),
        ("rpc = 5", "rpc"),
        ("[node]\nrole = 'boss'", "role"),
        ("[rpc]\nbatch_size = 0", "rpc.batch_size is 0"),
        ("[storage]\nscrub_interval_s = inf", "scrub_interval_s is inf"),
        ("[storage]\nscrub_interval_s = nan", "scrub_interval_s is nan"),
        ("[inference]\nthreads = -1", "inference.threads is -1"),
        ("[inference]\nquantization = 'int3'", "'int3'.*inference.quantization"),
        ("[inference]\nquantization = 8", "inference.quantization"),
        ("[network]\nupload_rate = 1000", "network.upload_rate is 1000"),
        ("[network]\ndownload_rate = -1", "network.download_rate is -1"),
        ("[network]\ndownload_connections = 0", "network.download_connections is 0"),
        ("[rpc\n", "not TOML"),
        ("x = " + "9" * 5000, "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        ("\x00", "not TOML"),
        ("#" * (settings.CONFIG_BYTES_MAX + 1), "at most"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=match) as caught:
        load(path, {"AIGEN_RPC_HOST": "x"})
    assert str(path) in str(caught.value)


def test_not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not TOML"):
        load(path)


def test_mistake_in_a_variable_is_named(path: Path) -> None:
    with pytest.raises(BadInput, match="AIGEN_RPC_PORT is 'x'"):
        load(path, {"AIGEN_RPC_PORT": "x"})
    with pytest.raises(BadInput, match=r"rpc\.port is 99999"):
        load(path, {"AIGEN_RPC_PORT": "99999"})


def test_any_free_port_may_be_asked_for_more_than_once(path: Path) -> None:
    assert load(path, rpc__port=0, network__data_port=0).network.data_port == 0


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="aigen init"):
        load(tmp_path / "none.toml")
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path)


def test_core_model_is_set_and_nothing_else_changes(path: Path) -> None:
    path.write_text(path.read_text() + "\n# mine\n")
    before = path.read_text()
    settings.set_model(path, "mistral-7b")
    assert load(path).node.model == "mistral-7b"
    assert path.read_text() == before.replace('model = ""', 'model = "mistral-7b"')
    assert [entry.name for entry in path.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("model_id", ["Mistral", 'a"\nb', "../x"])
def test_no_model_id(path: Path, model_id: str) -> None:
    before = path.read_text()
    with pytest.raises(BadInput, match="no model_id"):
        settings.set_model(path, model_id)
    assert path.read_text() == before


def test_file_without_the_line_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[rpc]\nport = 1\n")
    with pytest.raises(BadInput, match="by hand"):
        settings.set_model(path, "one")
    assert path.read_text() == "[rpc]\nport = 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.toml"]


def test_recommended_cache() -> None:
    assert settings.recommended_cache_size("worker", 8 * GB) == 32 * GB
    assert settings.recommended_cache_size("worker", 64 * GB) == 64 * GB
    assert settings.recommended_cache_size("storage", 8 * GB) == 8 * GB
