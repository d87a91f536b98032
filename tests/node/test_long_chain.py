"""A chain of 100,000 transactions is joined by a new node, from a real one and without executing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import monotonic

import pytest

from genesis import toml
from ledger import keystore, seal, shortcut
from ledger.block import child_header, earliest_timestamp
from ledger.chain import Chain
from ledger.execution import Executed
from ledger.keys import Key
from tests.benchmarks.ledger import CALL_GAS, CONFIG, OPERATORS, Step, setting, work
from tests.ledger.world import ADMIN, AUTHORITY, open_chain, raw_call
from tests.node.cluster import PASSWORD, Cluster, Node, until
from tests.node.test_authorities import ethereum, same_head

TRANSACTIONS = 100_000
BLOCK_TRANSACTIONS = 80
"""So that there are more blocks than a new node executes by default."""
JOIN_S_MAX = 900.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An authority's node that has the chain, and a new one. Neither is started."""
    cluster = Cluster(tmp_path)
    cluster.genesis.write_text(toml.dump(CONFIG))
    for name, key in (("authority", AUTHORITY), ("new", OPERATORS[0])):
        keystore.write(cluster.key(name), key, PASSWORD, work_factor=2)
    source = cluster.init("authority", "gateway")
    bootstrap = f"/ip4/127.0.0.1/tcp/{source.rpc_port + 1}/p2p/{source.node_id}"
    cluster.init("new", "gateway", "--bootstrap", bootstrap)
    with open_chain(source.data_dir / "ledger", CONFIG) as chain:
        grow(chain, [*setting(), *work(TRANSACTIONS - len(setting()))])
    yield cluster
    cluster.kill_all()


def grow(chain: Chain, steps: list[Step]) -> None:
    """Blocks of these calls, made the short way: py-evm would take ten minutes and more."""
    nonces = dict.fromkeys((key.address for key in (ADMIN, *OPERATORS)), 0)

    def sign(key: Key, call: object) -> bytes:
        nonces[key.address] += 1
        return raw_call(key, nonces[key.address] - 1, call, CALL_GAS)

    left = iter(steps)
    while some := list(islice(left, BLOCK_TRANSACTIONS)):
        executed = made(chain, [sign(*step) for step in some])
        assert all(transaction.reason is None for transaction in executed.records)
        certificate = seal.certify(chain.tip.epoch, executed.header, [AUTHORITY])
        chain.tip = chain.write(chain.tip.after(executed), [certificate])


def made(chain: Chain, raws: list[bytes]) -> Executed:
    parent, epoch = chain.tip.header, chain.tip.epoch
    extra_data = seal.unsealed_extra_data(epoch, seal.iteration_of(parent) + 1)
    start = child_header(parent, earliest_timestamp(parent, CONFIG), AUTHORITY.address, extra_data)
    executed = shortcut.execute(start, [chain.decode(raw) for raw in raws], chain.store.state_node)
    return replace(executed, header=seal.seal(executed.header, AUTHORITY))


@pytest.mark.soak
def test_a_long_chain_is_joined_without_executing_it(cluster: Cluster) -> None:
    source, new = cluster.nodes["authority"], cluster.nodes["new"]
    source.start()
    source.wait_ready()
    began = monotonic()
    new.start()
    until(lambda: is_there(new, source), "the new node has the chain", (new, source), JOIN_S_MAX)
    taken_s = monotonic() - began
    new.wait_ready()
    head = same_head([new, source])
    assert head >= TRANSACTIONS // BLOCK_TRANSACTIONS
    refused = ethereum(new, "eth_getBalance", f"0x{'00' * 20}", "0x1")
    assert "the state of block 1 is not here" in refused["message"]
    for number in (1, head // 2, head):
        shown = [ethereum(node, "eth_getBlockByNumber", hex(number), True) for node in (new, source)]
        assert shown[0] == shown[1]
    peak = next(line for line in Path(f"/proc/{new.pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"{TRANSACTIONS:,} transactions joined in {taken_s:.0f} s, {peak}")
    assert not new.tracebacks()


def is_there(new: Node, source: Node) -> bool:
    if new._health() == "unreachable":
        return False
    sync = new.info()["sync"]
    return bool(sync["mode"] == "idle" and sync["number"] == source.info()["sync"]["number"])
