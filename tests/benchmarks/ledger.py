"""`make bench-ledger`: blocks imported and events replayed, beside eth-tester.

Ours is all that a node does with a block from a peer: seal, certificate, signatures, limits, execution, roots, event
record, and one synced write into LevelDB. eth-tester's py-evm backend (in memory, no seal, no disk, called without the
validation and normalising of the EthereumTester around it) gets the same calls to the same contracts with the same gas,
signed for its own chain id and with the fee it insists on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from eth._utils.address import generate_contract_address
from eth_account import Account
from eth_tester import PyEVMBackend
from eth_tester.backends.pyevm.main import get_default_account_state

from contracts import events
from contracts.addresses import ADDRESSES, CONTRACT_NAMES
from contracts.calls import AnnounceShards, Call, JoinNode, RegisterModel
from contracts.deployment import deployment
from contracts.types import Address
from genesis.block import set_up_calls
from ledger import record
from ledger.keys import Key
from node import state
from tests.benchmarks import replay, report
from tests.ledger import world

RUNS = 3
BLOCK_TRANSACTIONS = 100
BLOCKS = 2
SINGLES = 40
CALL_GAS = 1_000_000
SHARDS = 16
ANNOUNCED = (0, 3, 6, 9, 12)
"""Shards of one announcement: 16 shards kept three times by ten nodes are five for each."""

GOAL = 2.0
EVENTS_PER_S_GOAL = 60_000
EVENTS = 50_000

OPERATORS = [Key.from_secret(bytes([i + 10]) * 32) for i in range(10)]
CONFIG = world.make_config(accounts=OPERATORS)

Step = tuple[Key, Call]


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
            yield world.ADMIN, world.register(f"model-{i}", SHARDS)
        else:
            yield OPERATORS[i % 10], world.announce(ANNOUNCED, node_id=node_id(i % 10))


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


def imported(blocks: list[bytes], count: int) -> float:
    """Transactions a second."""
    with TemporaryDirectory() as folder, world.open_chain(Path(folder) / "ledger", CONFIG) as chain:
        world.import_block(chain, blocks[0])
        began = time.perf_counter()
        for block in blocks[1:]:
            world.import_block(chain, block)
        return count / (time.perf_counter() - began)


class Peer:
    """eth-tester with our contracts deployed and set up, and the work signed for it."""

    def __init__(self, count: int) -> None:
        keys = (world.ADMIN, *OPERATORS)
        funded = {key.address: get_default_account_state() for key in keys}
        backend = PyEVMBackend(
            genesis_parameters=PyEVMBackend.generate_genesis_params({"gas_limit": CONFIG.network.gas_limit}),
            genesis_state=funded,
        )
        self.backend = backend
        self._chain_id = backend.chain.chain_id
        self._nonces = dict.fromkeys((key.address for key in keys), 0)
        self._addresses = self._deploy(backend)
        for _, call in set_up_calls(CONFIG):
            self.seal([self._sign((world.ADMIN, call))])
        for step in setting():
            self.seal([self._sign(step)])
        self.raws = [self._sign(step) for step in work(count)]

    def _deploy(self, backend: PyEVMBackend) -> dict[Address, Address]:
        """Create the contracts by ordinary transactions of the first admin; where ours stand to where these do."""
        there = {
            name: Address(bytes(generate_contract_address(world.ADMIN.address, nonce)))
            for nonce, name in enumerate(CONTRACT_NAMES)
        }
        for deploy in deployment(world.ADMIN.address, there):
            self.seal([self._signed(world.ADMIN, b"", deploy.init_code, 10_000_000)])
        return {ADDRESSES[name]: there[name] for name in CONTRACT_NAMES}

    def _sign(self, step: Step) -> bytes:
        key, call = step
        return self._signed(key, self._addresses[call.to], call.encode(), CALL_GAS)

    def _signed(self, key: Key, to: bytes, data: bytes, gas: int) -> bytes:
        fields = {"type": 2, "chainId": self._chain_id, "nonce": self._nonces[key.address], "to": to, "value": 0}
        fees = {"gas": gas, "maxFeePerGas": 10**10, "maxPriorityFeePerGas": 10**9, "data": data}
        self._nonces[key.address] += 1
        return bytes(Account.sign_transaction({**fields, **fees}, key.secret).raw_transaction)

    def seal(self, raws: Sequence[bytes]) -> None:
        """One block of these transactions, the last of which has to succeed."""
        for raw in raws:
            last = self.backend.send_raw_transaction(raw)
        self.backend.mine_blocks(1)
        assert self.backend.get_transaction_receipt(last)["status"] == 1

    def measure(self, block_transactions: int) -> float:
        """Transactions a second."""
        began = time.perf_counter()
        for start in range(0, len(self.raws), block_transactions):
            self.seal(self.raws[start : start + block_transactions])
        return len(self.raws) / (time.perf_counter() - began)


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
            return events.ModelRegistered(*msgspec.structs.astuple(call), key.address)
    raise AssertionError(call)


def main() -> None:
    """Both sides in turns, so that a busy machine slows both."""
    rows = []
    for block_transactions, count, goal in ((BLOCK_TRANSACTIONS, BLOCKS * BLOCK_TRANSACTIONS, GOAL), (1, SINGLES, 1.0)):
        blocks = sealed(block_transactions, count)
        pairs = [(imported(blocks, count), Peer(count).measure(block_transactions)) for _ in range(RUNS)]
        ours, peer = zip(*pairs, strict=True)
        what = f"import, {block_transactions} transaction{'s' * (block_transactions > 1)} a block"
        rows.append(report.compared(what, "tx/s", ours, f"eth-tester {version('eth-tester')}", peer, goal))
    records = event_records()
    speeds = [replayed(records) for _ in range(RUNS)]
    target = [float(EVENTS_PER_S_GOAL)] * RUNS
    rows.append(report.compared("event record into all projections", "events/s", speeds, "the goal", target, 1.0))
    rows += replay.rows(CONFIG, transaction_records)
    report.publish(
        "ledger",
        rows,
        "eth-tester's py-evm backend: in memory, no seal, no disk. Medians of 3, taken in turns. Starts are of "
        "synthetic chains: valid event records, written without executing them.",
    )


if __name__ == "__main__":
    main()
