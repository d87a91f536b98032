"""Node processes on this machine, for the demo: started, watched, stopped; and the `aigen` command typed for it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadPeer, Busy, Conflict, NotFound, Refused

if TYPE_CHECKING:
    from node.rpc.client import RpcClient

START_TIMEOUT_S = 120.0
CONDITION_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2
LOG_LINES_SHOWN = 15
PASSWORD = "demo"
"""Of the keys of a throw-away network on this machine."""


def _environment() -> dict[str, str]:
    return {**os.environ, "AIGEN_PASSWORD": PASSWORD}


def aigen(*arguments: object, quiet: bool = False, show: bool = False) -> Any:
    """Type an `aigen` command; its JSON answer, or with `show` its output on the terminal. Raises Refused."""
    words = [str(argument) for argument in arguments]
    if not quiet:
        click.secho(f"   $ aigen {shlex.join(words)}", fg="bright_black")
    result = subprocess.run(
        [sys.executable, "-m", "node", *words], env=_environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    if result.returncode != 0:
        raise Refused(f"`aigen {shlex.join(words)}` ended with exit status {result.returncode}")
    if show:
        click.echo("".join(f"   {line}\n" for line in result.stdout.splitlines()), nl=False)
        return None
    return json.loads(result.stdout)


@dataclass
class NodeProcess:
    """One node: its data directory, its process, its RPC."""

    name: str
    data_dir: Path
    rpc_port: int
    node_id: str
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.rpc_port}"

    @property
    def _log(self) -> Path:
        return self.data_dir / "node.log"

    def rpc(self, token: str | None = None) -> RpcClient:
        from node.rpc.client import RpcClient

        return RpcClient(self.url, token, timeout_s=None)

    def ask(self, method: str, /, **params: Any) -> Any:
        """One call over RPC, as the node's operator."""
        with self.rpc() as rpc:
            return rpc.call(method, **params)

    def start(self) -> None:
        """A process of its own, which goes on when this one ends."""
        click.secho(f"   $ aigen start --data-dir {self.data_dir} &", fg="bright_black")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "node", "start", "--data-dir", str(self.data_dir)],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.data_dir / "node.pid").write_text(f"{self._process.pid}\n")

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait_ready(self) -> None:
        wait_for(lambda: self._health() == "ready", f"{self.name} is ready", [self], START_TIMEOUT_S)

    def _health(self) -> str:
        try:
            status: str = self.ask("health")["status"]
        except (NotFound, Busy, BadPeer):  # nothing listens yet
            return "unreachable"
        return status

    def stop(self) -> None:
        """SIGTERM, and the clean end it has to have."""
        if not self.is_running():
            return
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise Refused(f"{self.name} did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM") from None
        (self.data_dir / "node.pid").unlink(missing_ok=True)
        if status != 0:
            raise Refused(f"{self.name} stopped with exit status {status}: {self.log_tail()}")

    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])

    def ask_piece(self, holder: NodeProcess, shard_hash: str, size: int, piece: int) -> str | None:
        """Ask another node for one piece on the data plane, as this node; None when it came, else the refusal."""
        import trio

        from contracts.types import NodeId, ShardHash
        from node.network.addresses import parse_data
        from node.network.client import connected
        from node.network.identity import NodeIdentity
        from node.network.sources import PeerSource
        from node.network.wire import DataLimits

        async def ask() -> None:
            source = PeerSource(NodeId(holder.node_id), parse_data(f"aigen+tls://127.0.0.1:{holder.rpc_port + 2}"))
            async with connected(source, NodeIdentity.load(self.data_dir / "node.key"), DataLimits()) as peer:
                shard = ShardHash(bytes.fromhex(shard_hash.removeprefix("0x")))
                await peer.run(lambda: list(peer.pieces(shard, size, piece, 1)))

        try:
            trio.run(ask)
        except Refused as error:
            return str(error)
        return None


def wait_for(
    holds: Callable[[], bool], what: str, machines: Sequence[NodeProcess], timeout_s: float = CONDITION_TIMEOUT_S
) -> None:
    """Return once it holds. Raises Refused when time is up or one of `machines` ends."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        for machine in machines:
            if not machine.is_running():
                raise Refused(f"node {machine.name} ended by itself:\n{machine.log_tail()}")
        if time.monotonic() > deadline:
            logs = "\n".join(f"{machine.name}:\n{machine.log_tail()}" for machine in machines)
            raise Refused(f"waited {timeout_s:.0f} s in vain until {what}\n{logs}")
        time.sleep(POLL_S)


def check_ports_free(first: int) -> None:
    """Raise Conflict when something listens on one of a node's three ports: it would be taken for the node."""
    for port in range(first, first + 3):
        with socket.socket() as probe:
            # As the node's own listener does it: a port whose connections have just ended is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise Conflict(
                    f"port {port} cannot be used ({error.strerror}): stop what listens there; "
                    "`aigen demo --stop` stops the nodes of an earlier demo in the same --work"
                ) from error


def stop_recorded(work: Path) -> int:
    """Stop the nodes that an earlier demo left running in `work`; how many there were."""
    import psutil

    found = 0
    for file in work.glob("*/node.pid"):
        try:
            process = psutil.Process(int(file.read_text()))
            # The number may by now be another process's: only one that runs in this very directory is ours.
            if str(file.parent) in process.cmdline():
                process.terminate()
                process.wait(STOP_TIMEOUT_S)
                found += 1
        except psutil.NoSuchProcess:
            click.echo(f"the node of {file.parent} had ended already")
        except psutil.TimeoutExpired as error:
            raise Refused(f"the node of {file.parent} did not stop within {STOP_TIMEOUT_S:.0f} s: kill it") from error
        file.unlink(missing_ok=True)
    return found
