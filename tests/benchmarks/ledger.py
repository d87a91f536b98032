"""`make bench-ledger`: blocks imported beside eth-tester, hardhat and anvil; what they take on disk; events replayed.

Ours is all that a node does with a block from a peer: seal, certificate, signatures, limits, execution, roots, event
record, and one synced write into LevelDB. What the peers are and do is in tests.benchmarks.peers.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from contracts import events
from contracts.calls import AnnounceShards, Call, JoinNode, RegisterModel
from contracts.types import ShardHash
from genesis.block import set_up_calls
from ledger import keys, record, trie
from ledger.keys import Key
from node import state
from tests.benchmarks import authorities, finality, joining, peers, replay, report
from tests.benchmarks.disk import Disk
from tests.benchmarks.peers import Peer, Step
from tests.ledger import world

RUNS = 3
BLOCK_TRANSACTIONS = 100
BLOCKS = 3
SINGLES = 60
DISK_BLOCKS = 10
CALL_GAS = 1_000_000
SHARDS = 16
ANNOUNCED = (0, 3, 6, 9, 12)
"""Shards of one announcement: 16 shards kept three times by ten nodes are five for each."""

GOALS = {"eth-tester": 2.0, "hardhat": 1.0, "anvil": None}
DISK_GOAL_BYTES = 1_500.0
EVENTS_PER_S_GOAL = 60_000
EVENTS = 50_000

OPERATORS = [Key.from_secret(bytes([i + 10]) * 32) for i in range(10)]
CONFIG = world.make_config(accounts=OPERATORS)

NOTE = """Medians of 3, taken in turns. Ours checks seal, certificate, signatures and roots, decodes events and writes \
to disk, synced, blocks in batches as sync takes them in. The peers only execute, in memory: no seal, no disk. \
eth-tester is called in its own process; hardhat and anvil are sent JSON-RPC over HTTP, which is part of their time. \
Starts are of synthetic chains: valid event records, written without executing them. Times to final and to a receipt \
are of node processes that share this machine's cores."""


def node_id(operator: int) -> str:
    return f"12D3KooW{chr(ord('a') + operator)}"


def setting() -> list[Step]:
    """What must be there first: a model and ten nodes."""
    joins: list[Step] = [(key, world.join(node_id(i))) for i, key in enumerate(OPERATORS)]
    return [(world.ADMIN, world.register(shards=SHARDS)), *joins]


def work(count: int) -> Iterator[Step]:
    """90 % announcements, 10 % registrations of 16 hashes."""
    for i in range(count):
        if i % 10 == 9:
            yield world.ADMIN, _registration(f"model-{i}")
        else:
            yield OPERATORS[i % 10], world.announce(ANNOUNCED, node_id=node_id(i % 10))


def _registration(model_id: str) -> RegisterModel:
    """With hashes as they are in earnest, which no compression makes smaller."""
    hashes = tuple(ShardHash(hashlib.sha256(f"{model_id} {i}".encode()).digest()) for i in range(SHARDS))
    return msgspec.structs.replace(world.register(model_id, SHARDS), shard_hashes=hashes)


def sealed(block_transactions: int, count: int) -> list[bytes]:
    """The blocks to import: the setting, then the work."""
    nonces = dict.fromkeys((key.address for key in (world.ADMIN, *OPERATORS)), 0)

    def sign(step: Step) -> bytes:
        key, call = step
        nonces[key.address] += 1
        return world.raw_call(key, nonces[key.address] - 1, call, CALL_GAS)

    with TemporaryDirectory() as folder, world.open_chain(Path(folder) / "ledger", CONFIG) as chain:
        builder = world.Builder(chain)
        found = [builder.grow(*map(sign, setting()))]
        raws = [sign(step) for step in work(count)]
        for start in range(0, count, block_transactions):
            found.append(builder.grow(*raws[start : start + block_transactions]))
        records = chain.store.records(1, chain.tip.number + 1)
        assert all(transaction.reason is None for block in records for transaction in block.transactions)
        return found


def forget() -> None:
    """Make this process what it was before it saw the blocks: nothing of them is read, decoded or recovered already."""
    keys.recover.cache_clear()
    trie._decoded.cache_clear()
    trie._path.cache_clear()


def imported(blocks: list[bytes], count: int) -> float:
    """Transactions a second."""
    forget()
    with TemporaryDirectory() as folder, world.open_chain(Path(folder) / "ledger", CONFIG) as chain:
        world.import_block(chain, blocks[0])
        waiting = deque(blocks[1:])
        began = time.perf_counter()
        while waiting:
            world.import_batch(chain, waiting)
        return count / (time.perf_counter() - began)


def eth_tester(count: int) -> Peer:
    peer = peers.EthTester(world.ADMIN, OPERATORS, CALL_GAS, CONFIG.network.gas_limit)
    prepare(peer, count)
    return peer


def prepare(peer: Peer, count: int) -> None:
    set_up: list[Step] = [(world.ADMIN, call) for _, call in set_up_calls(CONFIG)]
    peer.prepare([*set_up, *setting()], list(work(count)))


def compare_imports(block_transactions: int, count: int, nodes: Sequence[str]) -> list[report.Row]:
    """All sides in turns, so that a busy machine slows all of them."""
    blocks = sealed(block_transactions, count)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {which: [] for which in ("eth-tester", *nodes)}
    names = {"eth-tester": peers.EthTester.name}
    with ExitStack() as stack:
        running: dict[str, Peer] = {}
        for which in nodes:
            node = peers.running(which, world.ADMIN, OPERATORS, CALL_GAS, CONFIG.network.gas_limit)
            running[which] = stack.enter_context(node)
            names[which] = running[which].name
            prepare(running[which], count)
        for _ in range(RUNS):
            ours.append(imported(blocks, count))
            for which, speeds in theirs.items():
                # A chain of eth-tester's cannot be put back to where it was: a new one for each run.
                peer = running[which] if which in running else eth_tester(count)
                speeds.append(peer.measure(block_transactions))
    what = f"import, {block_transactions} transaction{'s' * (block_transactions > 1)} a block"
    return [report.compared(what, "tx/s", ours, names[which], speeds, GOALS[which]) for which, speeds in theirs.items()]


def disk_of(block_transactions: int, count: int) -> Disk:
    """What the work takes on disk, beyond what genesis and the setting do."""
    blocks = sealed(block_transactions, count)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ledger"
        with world.open_chain(path, CONFIG) as chain:
            world.import_block(chain, blocks[0])
            before = Disk.of(chain.store)
            for block in blocks[1:]:
                world.import_block(chain, block)
            return Disk.of(chain.store).beyond(before)


def replayed(records: Sequence[bytes]) -> float:
    """Events a second from the bytes of the event record into all projections."""
    began = time.perf_counter()
    after = state.fold(state.State(), map(record.decode, records))
    taken = time.perf_counter() - began
    assert len(after.members.members) == len(OPERATORS)
    return EVENTS / taken


def event_records() -> list[bytes]:
    """The record of EVENTS events as a chain would have it."""
    transactions = transaction_records(EVENTS)
    blocks = []
    for number, start in enumerate(range(0, EVENTS, BLOCK_TRANSACTIONS)):
        block_hash = hashlib.sha256(f"block {number}".encode()).digest()
        some = tuple(transactions[start : start + BLOCK_TRANSACTIONS])
        blocks.append(record.encode(record.BlockRecord(number, block_hash, number, some)))
    return blocks


def transaction_records(count: int) -> list[record.TransactionRecord]:
    """The setting and the work as executing them would leave it: the calls' own arguments are the events' fields."""
    made = []
    for i, (key, call) in enumerate([*setting(), *work(count - len(setting()))]):
        name, done = hashlib.sha256(f"{i}".encode()).digest(), (_event(key, call),)
        made.append(record.TransactionRecord(name, key.address, i, call.to, 65_000, None, done))
    return made


def _event(key: Key, call: Call) -> events.ContractEvent:
    match call:
        case JoinNode():
            return events.NodeJoined(call.node_id, key.address, call.role, call.endpoints)
        case AnnounceShards():
            return events.ShardsAnnounced(*msgspec.structs.astuple(call))
        case RegisterModel():
            return events.ModelRegistered(**msgspec.structs.asdict(call), admin=key.address)
    raise AssertionError(call)


def compare_replay() -> report.Row:
    records = event_records()
    speeds = [replayed(records) for _ in range(RUNS)]
    target = [float(EVENTS_PER_S_GOAL)] * RUNS
    return report.compared("event record into all projections", "events/s", speeds, "the goal", target, 1.0)


def main() -> None:
    rows = []
    if missing := peers.install():
        print(f"without hardhat and anvil: {missing}")
    nodes = () if missing else tuple(peers.NODES)
    for block_transactions, count in ((BLOCK_TRANSACTIONS, BLOCKS * BLOCK_TRANSACTIONS), (1, SINGLES)):
        rows += compare_imports(block_transactions, count, nodes)
    count = DISK_BLOCKS * BLOCK_TRANSACTIONS
    disk = disk_of(BLOCK_TRANSACTIONS, count)
    taken, target = [disk.file_bytes / count] * RUNS, [DISK_GOAL_BYTES] * RUNS
    what = f"disk for each transaction, {BLOCK_TRANSACTIONS} a block"
    rows.append(report.compared(what, "bytes", taken, "the goal", target, 1.0, less_is_better=True))
    rows.append(joining.row(CONFIG, sealed(BLOCK_TRANSACTIONS, count), count, imported, forget))
    rows.append(compare_replay())
    rows += replay.rows(CONFIG, transaction_records)
    rows += authorities.rows()
    rows += finality.rows()
    report.publish("ledger", rows, NOTE)
    disk.show(f"on disk at {BLOCK_TRANSACTIONS} transactions a block, bytes for each transaction", count)


if __name__ == "__main__":
    main()
