"""`aigen init`, `aigen start`, `aigen status`: one node from nothing to ready."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadInput, Conflict, Refused
from contracts.types import ModelId
from node import config as settings
from node.cli import common
from node.importing import importing

if TYPE_CHECKING:
    from genesis.config import GenesisConfig
    from ledger.keys import Key

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@click.command("init")
@click.option("--model", default="", help="The core model of a worker: preloaded and pinned. Default: the ledger's.")
@click.option("--role", type=click.Choice(["worker", "storage", "gateway"]), default="worker", show_default=True)
@click.option(
    "--genesis",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The network to join. Default: a new network of your own, with this node's operator as admin and authority.",
)
@click.option(
    "--bootstrap", multiple=True, help="A peer to begin with: /ip4/HOST/tcp/PORT/p2p/NODE_ID. May be repeated."
)
@click.option("--listen", default="127.0.0.1", show_default=True, help="Address for other nodes; 0.0.0.0 for all.")
@click.option("--advertise", default="", help="Name or address others reach this node at. Default: --listen.")
@click.option("--rpc-host", default="127.0.0.1", show_default=True, help="Where JSON-RPC listens.")
@click.option("--rpc-port", type=int, default=9944, show_default=True, help="JSON-RPC.")
@click.option("--control-port", type=int, default=9945, show_default=True, help="Blocks and transactions (libp2p).")
@click.option(
    "--data-port",
    type=int,
    default=9946,
    show_default=True,
    help="Shards (TLS, unless the config sets network.plain_tcp).",
)
@click.option(
    "--operator-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keystore of the operator's account. Default: a new key.",
)
@common.data_dir_option
@common.password_option
@common.json_option
def init(
    model: str,
    role: settings.Role,
    genesis: Path | None,
    bootstrap: tuple[str, ...],
    listen: str,
    advertise: str,
    rpc_host: str,
    rpc_port: int,
    control_port: int,
    data_port: int,
    operator_key: Path | None,
    data_dir: Path,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """Set up a node: a commented config, the node's identity and the operator's key. Overwrites nothing."""
    from ledger import keystore
    from ledger.keys import Key
    from node.network.addresses import parse_control

    if data_dir.parent.exists() and not data_dir.parent.is_dir():
        raise BadInput(f"{data_dir.parent} is a file, it cannot hold a node's directory: choose another --data-dir")
    if data_dir.exists() and any(data_dir.iterdir()):
        raise Conflict(f"{data_dir} is not empty: a node is set up there already; choose another --data-dir")
    settings.check_model_id(model)
    for peer in bootstrap:
        parse_control(peer)
    password = common.read_password(password_file, "Password for the operator's key", confirm=operator_key is None)
    key = Key.generate() if operator_key is None else keystore.read(operator_key, password)
    network, genesis_text = _network(genesis, key)
    config = settings.Config(
        node=settings.NodeSettings(role=role, model=model),
        rpc=settings.RpcSettings(host=rpc_host, port=rpc_port),
        network=settings.NetworkSettings(listen, advertise, control_port, data_port, bootstrap),
        inference=settings.InferenceSettings(
            cache_size=settings.recommended_cache_size(role, _tier_cache(network, model))
        ),
    )
    node_id = _write(data_dir, config, genesis_text, key, password)
    _show_init(data_dir, node_id, key, network, founded=genesis is None, as_json=as_json)


def _network(path: Path | None, operator: Key) -> tuple[GenesisConfig, bytes]:
    """The genesis to use and its TOML: the named file's, or that of a new network with this operator as its founder."""
    from genesis import config as genesis_config
    from genesis.config import Account
    from genesis.new import new_genesis
    from genesis.toml import dump

    if path is not None:
        loaded = genesis_config.load(path)
        return loaded, path.read_bytes()
    founded = new_genesis(
        "aigen",
        admins=[operator.address],
        authorities=[operator.address],
        accounts=[Account(operator.address, "unlimited")],
        timestamp=int(time.time()),
    )
    return founded, dump(founded).encode()


def _tier_cache(network: GenesisConfig, model: str) -> int:
    """The recommended cache of the tier that the model needs; of the lowest tier for a model not in the catalogue."""
    sizes = {tier.name: tier.cache_size for tier in network.tiers}
    needed = {entry.model_id: entry.minimum_tier for entry in network.catalogue} | {
        entry.model_id: entry.minimum_tier for entry in network.models
    }
    lowest = min(network.tiers, key=lambda tier: tier.rank).name
    return sizes[needed.get(ModelId(model), lowest)]


def _write(data_dir: Path, config: settings.Config, genesis_text: bytes, key: Key, password: str) -> str:
    """Everything into a new directory beside, then one rename: a data directory is there whole or not at all."""
    from ledger import keystore
    from node.network.identity import NodeIdentity
    from node.storage.files import explained, sync_directory

    with explained("setting up", data_dir):
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{data_dir.name}-", dir=data_dir.parent))
        try:
            settings.write(draft / "config.toml", config)
            settings.load(draft / "config.toml", environment={})
            (draft / "genesis.toml").write_bytes(genesis_text)
            identity = NodeIdentity.create(draft / "node.key")
            keystore.write(draft / "keys" / "operator.json", key, password)
            sync_directory(draft)
            draft.rename(data_dir)
            sync_directory(data_dir.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    return identity.node_id


def _enrolled(network: GenesisConfig) -> set[bytes]:
    """The accounts that may send from block 0 on."""
    return {*network.admins, *network.authorities, *(account.address for account in network.accounts)}


def _show_init(data_dir: Path, node_id: str, key: Key, network: GenesisConfig, founded: bool, as_json: bool) -> None:
    fields = {
        "data_dir": str(data_dir),
        "node_id": node_id,
        "operator": f"0x{key.address.hex()}",
        "network": network.network.name,
        "chain_id": network.network.chain_id,
    }
    if as_json:
        common.show_json(fields)
        return
    common.show_fields(fields.items())
    click.echo()
    if founded:
        click.echo(f"This founds a network; others join it with a copy of {data_dir / 'genesis.toml'} and --genesis.")
    elif key.address not in _enrolled(network):
        click.echo(f"Before it can join, an admin of the network runs: aigen account enrol {fields['operator']}")
    named = data_dir != settings.default_data_dir()
    click.echo(f"Next: aigen start{f' --data-dir {data_dir}' if named else ''}")


@click.command("start")
@click.option("--rpc-host", help="Where RPC listens, instead of the config's rpc.host.")
@click.option("--rpc-port", type=int, help="Instead of the config's rpc.port.")
@click.option("--control-port", type=int, help="Instead of the config's network.control_port.")
@click.option("--data-port", type=int, help="Instead of the config's network.data_port.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@common.data_dir_option
@common.password_option
def start(
    rpc_host: str | None,
    rpc_port: int | None,
    control_port: int | None,
    data_port: int | None,
    log_level: str,
    data_dir: Path,
    password_file: Path | None,
) -> None:
    """Run the node until SIGTERM or SIGINT."""
    given = {
        "rpc.host": rpc_host,
        "rpc.port": rpc_port,
        "network.control_port": control_port,
        "network.data_port": data_port,
    }
    with _handling_signals(_stop_early):
        # What is cheap to refuse comes before the imports, which take seconds.
        config = settings.load(data_dir / "config.toml", flags={k: v for k, v in given.items() if v is not None})
        operator = common.open_key(None, data_dir, password_file)
        _log_to_stderr(log_level)
        _run_node(data_dir, config, operator)


@contextmanager
def _handling_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _stop_early(number: int, _frame: Any) -> None:
    """Before the node runs there is nothing to stop but the command itself."""
    _say_stopping(number)
    raise SystemExit(0)


def _say_stopping(number: int) -> None:
    click.echo(f"aigen: {signal.Signals(number).name}, stopping", err=True)


def _log_to_stderr(level: str) -> None:
    import logging

    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    for room in ("node", "ledger", "aigen"):
        logging.getLogger(room).setLevel(level.upper())


def _run_node(data_dir: Path, config: settings.Config, operator: Key) -> None:
    with importing():
        import trio

        from node import startup
        from node.assembly import DataDirectory

    early: list[int] = []
    """Signals that came before trio took them over."""

    async def stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        async for number in signals:
            if not scope.cancel_called:
                _say_stopping(number)
            scope.cancel()

    async def run_until_stopped() -> None:
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_on_signal, signals, nursery.cancel_scope)
                if early:
                    nursery.cancel_scope.cancel()
                await startup.run(DataDirectory(data_dir), config, operator)

    try:
        with _handling_signals(lambda number, frame: early.append(number)):
            trio.run(run_until_stopped, strict_exception_groups=True)
    except* Refused as group:
        # Of what went wrong the user gets to see one line; the others followed from it.
        raise _first(group) from None


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@click.command("status")
@common.rpc_options
@common.json_option
def status(rpc_url: str, token: str | None, as_json: bool) -> None:
    """What this node is doing, step by step. Exit status 1 until it is ready."""
    rpc = common.client(rpc_url, token)
    node, chain = rpc.call("getNodeInfo"), rpc.call("getChainInfo")
    if as_json:
        common.show_json({"node": node, "chain": chain})
    else:
        liars = [row for row in rpc.call("listAuthorities") if row["evidence"] and row["in_force"]]
        _show_status(node, chain, liars)
    if node["status"] != "ready":
        raise SystemExit(1)


def _sync(sync: dict[str, Any]) -> str:
    import msgspec

    from node.network.sync import SyncStatistics

    return str(msgspec.convert(sync, SyncStatistics))


def _show_status(node: dict[str, Any], chain: dict[str, Any], liars: list[dict[str, Any]]) -> None:
    voting = f"votes, iteration {node['consensus']['iteration']}" if node["consensus"]["is_voting"] else "no"
    common.show_fields(
        [
            ("status", node["status"]),
            ("node", f"{node['node_id']} ({node['role']})"),
            ("operator", node["operator"]),
            ("network", f"{chain['name']}, chain id {chain['chain_id']}, block {chain['head_number']}"),
            *([] if node["sync"]["mode"] == "idle" else [("sync", _sync(node["sync"]))]),
            ("state", "{hash} after block {number}".format_map(chain["state_hashes"][-1])),
            *(("ALARM", alarm) for alarm in node["state_alarms"]),
            ("authority", voting),
            *(("LIAR", f"{row['account']}: evidence {row['evidence_hash']}") for row in liars),
            ("peers", len(node["peers"])),
            *(("LAGGING", f"{peer} stays behind what others have") for peer in node["lagging_peers"]),
            *(("endpoint", endpoint) for endpoint in node["endpoints"]),
            ("disk", f"{common.size(node['disk_used'])} of {common.size(node['disk_budget'])}"),
            ("cache", f"{common.size(node['cache_used'])} of {common.size(node['cache_budget'])}"),
        ]
    )
    common.show_table(("step", "state", ""), [(step["name"], step["state"], step["detail"]) for step in node["steps"]])
    rows = [
        (
            f"{state['model_id']} {state['version']}",
            ", ".join(filter(None, (state["state"], state["precision"], "pinned" if state["pinned"] else ""))),
            common.progress(state),
            state["detail"],
        )
        for state in node["models"]
    ]
    if rows:
        common.show_table(("model", "state", "bytes", ""), rows)
    _show_fetching(node["fetching"])


def _show_fetching(fetching: dict[str, Any]) -> None:
    """Shards on their way, and the sources that are at it or gave trouble."""
    flights = [(row["shard_hash"], common.progress(row), row["connections"]) for row in fetching["flights"]]
    if flights:
        common.show_table(("shard on its way", "bytes", "connections"), flights)
    sources = [
        (row["source"], row["state"], common.size(row["bytes_fetched"]), row["failures"], row["trouble"])
        for row in fetching["sources"]
        if row["state"] != "idle" or row["trouble"]
    ]
    if sources:
        common.show_table(("source", "state", "bytes", "failures", "last trouble"), sources)
