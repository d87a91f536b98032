"""The rows of `make bench-ledger` about how soon a block is final: authorities as real node processes on loopback.

A follower is handed transactions, one after the other and in small bursts, and tells of a new block as soon as it has
it (`eth_subscribe`). The authority that proposed the block says when it began to make it: all by one machine's clock.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from contracts.calls import EnrolAccounts
from contracts.types import Address
from ledger.transactions import CALL_GAS, sign
from tests.benchmarks import report
from tests.node.cluster import DEADLINE_S, Cluster, Node, until

AUTHORITIES = ("a", "b", "c", "d")
COUNTS = (1, 4)
"""Each of four authorities' nodes takes a quarter of a processor's second for a block, most of it in libp2p: seven on a
machine of two cores would tell of the machine."""

GROUPS = (1,) * 16 + (5,) * 6
"""Transactions that are sent at once; the next are when these are final."""

FINAL_S_MAX = 0.5
RECEIPT_S_MAX = FINAL_S_MAX + 1.0
"""Each block bears a later second than the one before it, so a transaction may wait for the next to begin."""


@dataclass
class Found:
    """Seconds."""

    final: list[float] = field(default_factory=list)
    """For each block, from when its proposer began to make it until the follower told of it."""
    receipt: list[float] = field(default_factory=list)
    """For each transaction, from before it was sent until the follower told of its block."""


@contextmanager
def network(count: int) -> Iterator[Cluster]:
    """So many authorities and a follower, all of them ready."""
    with TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder))
        for name in ("admin", "alice", "guest", *AUTHORITIES):
            cluster.new_key(name)
        assert cluster.new_genesis(cluster.genesis, authorities=AUTHORITIES[:count]).status == 0
        bootstrap: list[object] = []
        for name in (*AUTHORITIES[:count], "follower"):
            node = cluster.init(name, "gateway", *bootstrap, operator="alice" if name == "follower" else name)
            bootstrap += ["--bootstrap", f"/ip4/127.0.0.1/tcp/{node.rpc_port + 1}/p2p/{node.node_id}"]
        try:
            for node in cluster.nodes.values():
                node.start()
            for node in cluster.nodes.values():
                node.wait_ready()
            yield cluster
        finally:
            cluster.kill_all()


@contextmanager
def heads(node: Node) -> Iterator[SimpleQueue[tuple[int, float]]]:
    """Numbers of the node's new blocks, each with the time at which the node told of it."""
    found: SimpleQueue[tuple[int, float]] = SimpleQueue()

    def read(connection: ClientConnection) -> None:
        try:
            for message in connection:
                at, told = time.time(), json.loads(message)
                if told.get("method") == "eth_subscription":
                    found.put((int(told["params"]["result"]["number"], 16), at))
        except ConnectionClosed:
            return

    with connect(node.url.replace("http", "ws")) as connection:
        connection.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe", "params": ["newHeads"]}))
        reader = Thread(target=read, args=(connection,))
        reader.start()
        yield found
    reader.join()


def measured(count: int) -> Found:
    found = Found()
    with network(count) as cluster, heads(cluster.nodes["follower"]) as new, cluster.nodes["follower"].rpc() as rpc:
        key, chain_id = cluster.secret("admin"), rpc.call("getChainInfo")["chain_id"]
        nonces = itertools.count(rpc.call("getAccount", account=cluster.accounts["admin"])["nonce"])
        for size in GROUPS:
            waiting = {}
            for nonce in itertools.islice(nonces, size):
                call = EnrolAccounts((Address((nonce + 1).to_bytes(20)),))
                raw = sign(key, chain_id, nonce, call.to, call.encode(), CALL_GAS)
                sent = time.time()
                waiting[rpc.call("sendRawTransaction", transaction=f"0x{raw.hex()}")["transaction_hash"]] = sent
            while waiting:
                number, at = new.get(timeout=DEADLINE_S)
                block = rpc.call("getBlock", number=number)
                if inside := waiting.keys() & set(block["transactions"]):
                    found.receipt += [at - waiting.pop(transaction_hash) for transaction_hash in inside]
                    found.final.append(at - began_at(cluster, block))
    return found


def began_at(cluster: Cluster, block: dict[str, Any]) -> float:
    """When its proposer began to make a block, which is the newest of its own."""
    proposer = next(node for name, node in cluster.nodes.items() if cluster.accounts.get(name) == block["proposer"])

    def told() -> dict[str, Any] | None:
        own: dict[str, Any] = proposer.info()["consensus"]["own_blocks"]
        return own if own["newest_number"] >= block["number"] else None

    own = until(told, "the proposer has it as well", (proposer,))
    assert own is not None
    assert own["newest_number"] == block["number"]
    return float(own["newest_began_at"])


def compared(what: str, seconds: list[float], limit_s: float, is_goal: bool) -> report.Row:
    assert len(seconds) >= report.RUNS_MIN
    ratio = limit_s / median(seconds)
    ours = f"{median(seconds):.3f} s, 95 % in {quantiles(seconds, n=20)[-1]:.3f} s"
    goal, met = (1.0, ratio >= 1) if is_goal else (None, None)
    return report.Row(
        what, ours, f"{'the goal' if is_goal else 'with the wait'}: {limit_s} s", round(ratio, 3), goal, met
    )


def rows() -> list[report.Row]:
    made = []
    for count in COUNTS:
        found, who = measured(count), f"{count} {'authorities' if count > 1 else 'authority'}"
        made.append(compared(f"proposed to final on a follower, {who}", found.final, FINAL_S_MAX, True))
        made.append(compared(f"sent to receipt there, {who}", found.receipt, RECEIPT_S_MAX, False))
    return made
