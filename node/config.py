"""A node's settings: from defaults, then config.toml, then AIGEN_* variables, then flags. Knows no keys and no sockets.

A setting `key` of section `[section]` is the variable AIGEN_SECTION_KEY; lists are separated by commas there.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import platformdirs

from contracts.errors import BadInput, Conflict, NotFound
from contracts.types import NAME_PATTERN

Role = Literal["worker", "storage", "gateway"]

Quantization = Literal["auto", "none", "int8", "int4"]

CONFIG_BYTES_MAX = 1 << 20

GB = 1_000_000_000

FAST_BLOCKS_MIN = 1_024
"""Executing fewer blocks than this is a matter of seconds, and leaves the state after each of them."""

RATE_MIN = 100_000
"""Bytes a second: with less, a piece would take longer than its receiver waits."""


class NodeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role = "worker"
    model: str = ""
    """The core model this worker preloads and pins; empty: the one the ledger designates."""


class RpcSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 9944
    allowed_hosts: tuple[str, ...] = ()
    """Host names a request may carry besides the loopback ones and `host`."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this node, such as `https://panel.example`."""
    body_bytes: int = 4 << 20
    batch_size: int = 100
    concurrent_requests: int = 64
    log_blocks: int = 10_000
    """Blocks one eth_getLogs may span."""
    call_gas: int = 10_000_000
    """Gas one eth_call or eth_estimateGas may use."""


class NetworkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    listen: str = "127.0.0.1"
    """The address both planes bind; `0.0.0.0` for nodes on several machines."""
    advertise: str = ""
    """The host name or address others reach this node at; empty: the listening address."""
    control_port: int = 9945
    data_port: int = 9946
    bootstrap: tuple[str, ...] = ()
    """Peers to begin with: /ip4/HOST/tcp/PORT/p2p/NODE_ID."""
    mdns: bool = True
    """Find the network's nodes on this LAN, and be found; not while `listen` is loopback."""
    upload_rate: int = 0
    """Bytes a second that go out when shards are served, shared fairly among peers; 0: no limit."""
    download_rate: int = 0
    """Bytes a second that come in when shards are fetched; 0: no limit."""
    upload_connections: int = 64
    """Connections that are served shards at once."""
    connections_per_peer: int = 8
    """Of these, connections of one node."""
    download_connections: int = 8
    """Connections that one shard is fetched over at once."""
    compression: bool = True
    """Pieces go between nodes packed where that makes them come faster."""
    plain_tcp: bool = False
    """Shards are served over plain TCP instead of TLS, and fetched from nodes that do the same."""


class LedgerSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sync: Literal["fast", "full"] = "fast"
    """How a new node takes in a chain that is longer than `fast_blocks`: with receipts and the newest state, or by
    executing every block."""
    fast_blocks: int = FAST_BLOCKS_MIN


class StorageSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    disk_budget: int = 500 * GB
    """Bytes of shards kept at most."""
    scrub_interval_s: float = 86_400.0
    """Every held shard is hashed again this often."""
    scrub_rate: int = 50_000_000
    """Bytes of them a second, at most."""


class InferenceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cache_size: int = 32 * GB
    """Bytes of loaded models at most."""
    threads: int = 0
    """Threads torch computes with; 0: one for each core."""
    quantization: Quantization = "auto"
    """What weights are loaded in: as they are stored (`none`), in fewer bits, or the best of these that fits."""
    receipts: bool = True
    """Each answer carries a receipt that this node signs."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    node: NodeSettings = NodeSettings()
    rpc: RpcSettings = RpcSettings()
    network: NetworkSettings = NetworkSettings()
    ledger: LedgerSettings = LedgerSettings()
    storage: StorageSettings = StorageSettings()
    inference: InferenceSettings = InferenceSettings()


_TEMPLATE = """\
# Settings of this AIGEN node. A variable AIGEN_SECTION_KEY (AIGEN_RPC_PORT=9950) and then a flag of `aigen start`
# override what stands here.

[node]
# worker: replicates shards, preloads the core model, answers. storage: replicates only.
# gateway: answers RPC and holds nothing until it is asked to.
role = {role}
# The core model this worker preloads and pins. Empty: the one the ledger designates.
model = {model}

[rpc]
# Loopback needs no token; on any other address whatever uses the node needs
# `Authorization: Bearer` (`aigen token`); the public ledger stays readable.
host = {rpc_host}
port = {rpc_port}
# Host names a request may carry besides loopback's and the one above.
allowed_hosts = []
# Web pages that may call this node, such as "https://panel.example".
allowed_origins = []
# Bounds on what is taken: bytes of a body, calls of a batch, requests worked on at once.
body_bytes = 4_194_304
batch_size = 100
concurrent_requests = 64
# Bounds on Ethereum's methods: blocks that one eth_getLogs may span, gas that one eth_call may use.
log_blocks = 10_000
call_gas = 10_000_000

[network]
# What both planes bind: "0.0.0.0" for nodes on several machines.
listen = {listen}
# The name or address others reach this node at. Empty: the address above.
advertise = {advertise}
# Blocks and transactions (libp2p).
control_port = {control_port}
# Shards (TLS, unless `plain_tcp` is set).
data_port = {data_port}
# Peers to begin with, as `aigen status` prints them: "/ip4/192.0.2.7/tcp/9945/p2p/12D3KooW..."
bootstrap = {bootstrap}
# Find this network's nodes on the LAN and be found by them; not while `listen` is a loopback address.
mdns = true
# Bytes a second that go out when shards are served (shared fairly among peers) and come in when they are fetched.
# 0: no limit.
upload_rate = 0
download_rate = 0
# Connections: that shards are served on at once, of these of one node, and that one shard is fetched over.
upload_connections = 64
connections_per_peer = 8
download_connections = 8
# Weights go between nodes compressed (zstd) where that is measured to be faster.
compression = true
# Serve shards over plain TCP instead of TLS, and fetch from nodes that do the same; a node without this never does.
# Only on networks you trust: who can read or alter their packets sees the models' bytes (altered ones are refused by
# their hash).
plain_tcp = false

[ledger]
# How a new node takes in a chain of `fast_blocks` and more. fast: every block with its receipts, checked against what
# two thirds of the authorities signed, and the newest state. full: by executing every block, which takes longer and
# believes no authority.
sync = "fast"
fast_blocks = 1_024

[storage]
# Bytes of shards kept at most.
disk_budget = 500_000_000_000
# Every held shard is hashed again this often (seconds).
scrub_interval_s = 86_400.0
# Bytes of them a second, at most; 0: no limit.
scrub_rate = 50_000_000

[inference]
# Bytes of loaded models at most. Recommended: basic 8 GB, pro 16 GB, worker 32 GB and more.
cache_size = {cache_size}
# Threads torch computes with. 0: one for each core.
threads = 0
# What weights are loaded in. auto: as they are stored if that fits the cache beside the pinned model, else int8, else
# int4. none: only as they are stored. int8, int4: always so. Quantised weights are made once, from the proved shards,
# and kept in the store; they count against disk_budget.
quantization = "auto"
# Each answer carries a receipt signed with this node's key: who asked which model, by what tier check, the hashes of
# prompt and answer.
receipts = true
"""


def default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("aigen"))


def recommended_cache_size(role: str, tier_cache_size: int) -> int:
    """Bytes: a worker's cache is at least 32 GB; other roles take what the tier they serve recommends."""
    return max(32 * GB, tier_cache_size) if role == "worker" else tier_cache_size


def render(config: Config) -> str:
    """A commented config.toml with the settings that `aigen init` asks for."""
    import json

    def text(value: object) -> str:
        # A TOML basic string and an array of them are written as JSON writes them.
        return json.dumps(value, ensure_ascii=True)

    return _TEMPLATE.format(
        role=text(config.node.role),
        model=text(config.node.model),
        rpc_host=text(config.rpc.host),
        rpc_port=config.rpc.port,
        listen=text(config.network.listen),
        advertise=text(config.network.advertise),
        control_port=config.network.control_port,
        data_port=config.network.data_port,
        bootstrap=text(list(config.network.bootstrap)),
        cache_size=f"{config.inference.cache_size:_}",
    )


def write(path: Path, config: Config) -> None:
    """Write a commented config.toml. Raises Conflict when there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(render(config))
    except FileExistsError as error:
        raise Conflict(f"{path} exists: this data directory is set up already; choose another --data-dir") from error


def check_model_id(model_id: str) -> None:
    """Raise BadInput unless it is a model_id or empty."""
    if model_id and re.fullmatch(NAME_PATTERN, model_id) is None:
        raise BadInput(f"{model_id!r} is no model_id: {NAME_PATTERN} is expected")


def set_model(path: Path, model_id: str) -> None:
    """Make `model_id` the core model in the config at `path`, everything else and every comment as it was."""
    check_model_id(model_id)
    config = load(path, environment={})
    text, count = re.subn(r"(?m)^model\s*=.*$", f'model = "{model_id}"', path.read_text(), count=1)
    temporary = path.with_suffix(".toml.new")
    try:
        temporary.write_text(text)
        expected = msgspec.structs.replace(config, node=msgspec.structs.replace(config.node, model=model_id))
        if count != 1 or load(temporary, environment={}) != expected:
            raise BadInput(f"{path} has no line `model = ...` in its [node] section: edit it by hand")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, environment: Mapping[str, str] = os.environ, flags: Mapping[str, Any] | None = None) -> Config:
    """The settings in force. `flags` are `section.key` to value. Raises NotFound or BadInput naming the setting."""
    merged = _read(path)
    for section, keys in _settings().items():
        for key, kind in keys.items():
            variable = f"AIGEN_{section}_{key}".upper()
            if variable in environment:
                _override(merged, section, key, _parse(variable, environment[variable], kind))
    for name, value in (flags or {}).items():
        section, key = name.split(".")
        _override(merged, section, key, value)
    try:
        config = msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise BadInput(f"{path}: {error}") from error
    _check(path, config)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"no {path}: set the node up with `aigen init`") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > CONFIG_BYTES_MAX:
        raise BadInput(f"{path} has {len(data)} bytes, at most {CONFIG_BYTES_MAX} are read")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not TOML: {error}") from error


def _override(merged: dict[str, Any], section: str, key: str, value: Any) -> None:
    table = merged.setdefault(section, {})
    if isinstance(table, dict):  # anything else is refused as a whole, by its name, when the settings are converted
        table[key] = value


def _settings() -> dict[str, dict[str, Any]]:
    """Section to key to type."""
    return {
        section.name: {field.name: field.type for field in msgspec.structs.fields(section.type)}
        for section in msgspec.structs.fields(Config)
    }


def _parse(variable: str, text: str, kind: Any) -> Any:
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError as error:
            raise BadInput(f"{variable} is {text!r}: a number is expected") from error
    if kind is bool:
        if text not in ("true", "false"):
            raise BadInput(f"{variable} is {text!r}: true or false is expected")
        return text == "true"
    if kind == tuple[str, ...]:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _check(path: Path, config: Config) -> None:
    ports = {
        "rpc.port": config.rpc.port,
        "network.control_port": config.network.control_port,
        "network.data_port": config.network.data_port,
    }
    for name, port in ports.items():
        if not 0 <= port <= 65535:
            raise BadInput(f"{path}: {name} is {port}, a port is between 1 and 65535 (0: any free one)")
    taken = [port for port in ports.values() if port]
    if len(set(taken)) < len(taken):
        raise BadInput(f"{path}: {', '.join(f'{name} = {port}' for name, port in ports.items())}: give each its own")
    for name, rate in {
        "network.upload_rate": config.network.upload_rate,
        "network.download_rate": config.network.download_rate,
        "storage.scrub_rate": config.storage.scrub_rate,
    }.items():
        if rate != 0 and rate < RATE_MIN:
            raise BadInput(f"{path}: {name} is {rate}, it must be {RATE_MIN} bytes a second or more, or 0 for no limit")
    positive = {
        "network.upload_connections": config.network.upload_connections,
        "network.connections_per_peer": config.network.connections_per_peer,
        "network.download_connections": config.network.download_connections,
        "rpc.body_bytes": config.rpc.body_bytes,
        "rpc.batch_size": config.rpc.batch_size,
        "rpc.concurrent_requests": config.rpc.concurrent_requests,
        "rpc.log_blocks": config.rpc.log_blocks,
        "rpc.call_gas": config.rpc.call_gas,
        "ledger.fast_blocks": config.ledger.fast_blocks,
        "storage.disk_budget": config.storage.disk_budget,
        "storage.scrub_interval_s": config.storage.scrub_interval_s,
        "inference.cache_size": config.inference.cache_size,
    }
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise BadInput(f"{path}: {name} is {value}, it must be above 0 and finite")
    if config.inference.threads < 0:
        raise BadInput(f"{path}: inference.threads is {config.inference.threads}, it must be 0 or more")
