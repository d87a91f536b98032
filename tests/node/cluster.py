"""Real nodes for process tests: their processes, a tiny model of many shards, and the `aigen` command in this process.

Waiting is done in one place, `until`, under a deadline and with the nodes' logs in its message.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from contracts.types import Address
from ledger import keystore
from ledger.keys import Key
from node.cli import main
from node.cli.machines import PASSWORD, NodeProcess
from tests.node.inference.tiny import save

MIB = 1 << 20
MODEL = "tiny-llama"
DEADLINE_S = 60.0
POLL_S = 0.02
SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "tie_word_embeddings": True}
"""Some 15 MiB in fp32: a dozen and more shards of one MiB."""


T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status == 0, self
        return json.loads(self.out)

    @property
    def cells(self) -> list[list[str]]:
        """The table it printed, its heading first."""
        assert self.status == 0, self
        return [re.split(r"\s{2,}", line.strip()) for line in self.out.splitlines()]

    def refused(self, *parts: str, status: int = 1) -> str:
        """The one line it ended with, which says each of `parts`."""
        assert self.status == status, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        for part in parts:
            assert part in lines[0], lines[0]
        return lines[0]


def aigen(*words: object, password: str | None = PASSWORD, typed: str | None = None, **environment: str) -> Done:
    """The command as a user types it, in this process. `typed` is what comes on its standard input."""
    out, err = io.StringIO(), io.StringIO()
    if password is not None:
        environment["AIGEN_PASSWORD"] = password
    status: object = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _environment(environment),
        _standard_input(typed),
    ):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            status = end.code or 0
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _standard_input(typed: str | None) -> Iterator[None]:
    before = sys.stdin
    if typed is not None:
        sys.stdin = io.StringIO(typed)
    try:
        yield
    finally:
        sys.stdin = before


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: value for name, value in os.environ.items() if name.startswith("AIGEN_")}
    for name in before:
        del os.environ[name]
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes:
            os.environ.pop(name, None)
        os.environ.update(before)


def until(ask: Callable[[], T], what: str, machines: tuple[NodeProcess, ...] = (), timeout_s: float = DEADLINE_S) -> T:
    """What `ask` answers, once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := ask()):
        for machine in machines:
            assert machine.is_running(), f"{machine.name} ended while waiting until {what}:\n{machine.log_tail()}"
        logs = "\n".join(f"{machine.name}:\n{machine.log_tail()}" for machine in machines)
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain until {what}\n{logs}"
        time.sleep(POLL_S)
    return found


_ports_given: set[int] = set()


def free_ports() -> int:
    """The first of three ports in a row that nobody listens on, outside of those the kernel gives to connections.
    None is given out twice: a node that was set up and not started yet keeps its own."""
    for _ in range(100):
        first = random.randrange(15_000, 32_000)
        if not _ports_given.isdisjoint(range(first, first + 3)):
            continue
        try:
            with contextlib.ExitStack() as stack:
                for port in range(first, first + 3):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            continue
        _ports_given.update(range(first, first + 3))
        return first
    raise AssertionError("no three free ports in a row were found")


class Node(NodeProcess):
    """A node process that can also be killed."""

    def start(self) -> None:
        assert not self.is_running(), f"{self.name} runs already"
        super().start()

    def kill(self) -> None:
        """SIGKILL: nothing is said and nothing is written any more."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal_and_wait(self, number: int, timeout_s: float = DEADLINE_S) -> int:
        """Its exit status after a signal."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout_s)

    def info(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("getNodeInfo")
        return found

    def log(self) -> str:
        return (self.data_dir / "node.log").read_text()

    def tracebacks(self) -> list[str]:
        """Log lines that a traceback follows. What libp2p raises for a stream that a peer broke off is logged with
        one, and is no bug of the node's."""
        lines = self.log().splitlines()
        starts = [n for n, line in enumerate(lines) if "Traceback (most recent call last)" in line]
        before = [lines[n - 1] if n else "" for n in starts]
        return [line for line in before if "an inbound stream of" not in line and line.strip()]

    def cli(self, *words: object, typed: str | None = None) -> Done:
        return aigen(*words, "--rpc", self.url, typed=typed)

    def held(self) -> set[str]:
        return {path.name for path in (self.data_dir / "store" / "shards").iterdir()}

    def copies(self, model_id: str = MODEL) -> list[int]:
        return [shard["copies"] for shard in self.ask("getShardLocations", model_id=model_id)["shards"]]


@dataclass
class Cluster:
    """A network's files and nodes under one directory."""

    path: Path
    accounts: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)

    def key(self, name: str) -> Path:
        return self.path / "keys" / f"{name}.json"

    def new_key(self, name: str) -> str:
        """An account whose keystore opens fast."""
        key = Key.generate()
        keystore.write(self.key(name), key, PASSWORD, work_factor=2)
        self.accounts[name] = f"0x{key.address.hex()}"
        return self.accounts[name]

    def secret(self, name: str) -> Key:
        return keystore.read(self.key(name), PASSWORD)

    def address(self, name: str) -> Address:
        return keystore.address(self.key(name))

    @property
    def genesis(self) -> Path:
        return self.path / "genesis.toml"

    def new_genesis(self, path: Path, *options: object, authorities: tuple[str, ...] = ("a",)) -> Done:
        accounts = [f"{self.accounts[n]}=basic" for n in ("a", "b", "c", "d", "alice")] + [self.accounts["guest"]]
        return aigen(
            *("genesis", "new", path, "--template", "dev", "--shard-size", MIB),
            *("--admin", self.accounts["admin"]),
            *(word for name in authorities for word in ("--authority", self.accounts[name])),
            *(word for account in accounts for word in ("--account", account)),
            *options,
            "--json",
        )

    def init(
        self, name: str, role: str, *options: object, operator: str | None = None, genesis: Path | None = None
    ) -> Node:
        """A node's data directory; the process is not started."""
        port, data_dir = free_ports(), self.path / name
        made = aigen(
            *("init", "--role", role, "--genesis", genesis or self.genesis),
            *("--operator-key", self.key(operator or name), "--data-dir", data_dir),
            *("--rpc-port", port, "--control-port", port + 1, "--data-port", port + 2),
            *options,
            "--json",
        ).json
        node = self.nodes[name] = Node(name, data_dir, port, made["node_id"])
        return node

    def kill_all(self) -> None:
        for node in self.nodes.values():
            if node.is_running():
                node.kill()


def write_model(path: Path, **changes: object) -> Path:
    """A random Llama with its tokenizer as a Hugging Face directory."""
    return save(path, "llama", torch.float32, **{**SIZES, **changes})


def flip(path: Path, offset: int) -> None:
    """One bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
