"""A chain for tests without sealing or storage: a genesis state in memory, signed transactions, a clock to set."""

import hashlib
from functools import cache
from typing import Any

import msgspec
from eth.abc import ComputationAPI
from eth.constants import ZERO_ADDRESS, ZERO_HASH32
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.cancun import CancunVM
from eth.vm.forks.cancun.state import CancunState
from eth.vm.forks.cancun.transaction_context import CancunTransactionContext
from eth.vm.message import Message
from eth_abi.abi import encode
from eth_keys.datatypes import PrivateKey

from contracts.abi import contracts, decode_result, encode_function
from contracts.addresses import ADDRESSES, ContractName
from contracts.calls import Call, JoinNode, RegisterModel, revert_reason
from contracts.events import ContractEvent, decode_log
from contracts.types import Address, ManifestHash, ModelId, NodeId, ShardHash, Version
from genesis.block import GenesisBlock, build
from genesis.config import Account, GenesisConfig
from genesis.new import new_genesis

MIB = 1 << 20
NOW = 1_700_000_000
GAS = 50_000_000


class Reverted(Exception):
    """A transaction was executed and refused; `str()` is the contract's reason."""


class Party:
    """Somebody with a key."""

    def __init__(self, name: str) -> None:
        self.key = PrivateKey(hashlib.sha256(f"aigen test {name}".encode()).digest())
        self.address = Address(self.key.public_key.to_canonical_address())


ADMIN = Party("admin")
AUTHORITY = Party("authority")
OPERATOR = Party("operator")
"""Enrolled; whether it operates a node is up to the test."""
USER = Party("user")
"""Enrolled."""
STRANGER = Party("stranger")
"""Not enrolled."""


def dev_config() -> GenesisConfig:
    """The dev network, founded by ADMIN and AUTHORITY, with two more accounts enrolled."""
    return new_genesis(
        "dev",
        admins=[ADMIN.address],
        authorities=[AUTHORITY.address],
        timestamp=NOW,
        accounts=[Account(OPERATOR.address), Account(USER.address)],
    )


@cache
def dev_block() -> GenesisBlock:
    return build(dev_config())


class Chain:
    """The state after a genesis block, and what can be done to it."""

    def __init__(self, config: GenesisConfig | None = None) -> None:
        self.config = dev_config() if config is None else config
        block = dev_block() if config is None else build(config)
        context = ExecutionContext(
            coinbase=ZERO_ADDRESS,
            timestamp=self.config.network.timestamp,
            block_number=1,
            difficulty=0,
            mix_hash=ZERO_HASH32,
            gas_limit=self.config.network.gas_limit,
            prev_hashes=(),
            chain_id=self.config.network.chain_id,
            base_fee_per_gas=0,
            excess_blob_gas=0,
        )
        self.state = CancunState(AtomicDB(MemoryDB(dict(block.state_nodes))), context, block.header.state_root)
        self.gas_used = 0

    @property
    def now(self) -> int:
        return int(self.state.timestamp)

    @now.setter
    def now(self, timestamp: int) -> None:
        self.state.execution_context._timestamp = timestamp

    def send(self, sender: Party, call: Call) -> list[ContractEvent]:
        """The events of a signed transaction. Raises Reverted with the contract's reason."""
        return self.send_raw(sender, call.to, call.encode())

    def send_raw(self, sender: Party, to: bytes, data: bytes, value: int = 0) -> list[ContractEvent]:
        return _events(self.execute(sender, to, data, value))

    def execute(self, sender: Party, to: bytes, data: bytes, value: int = 0) -> ComputationAPI:
        """A signed transaction, whatever comes of it; to nobody (b"") it creates a contract."""
        unsigned = CancunVM.get_transaction_builder().new_unsigned_dynamic_fee_transaction(
            chain_id=self.config.network.chain_id,
            nonce=self.state.get_nonce(sender.address),
            max_priority_fee_per_gas=0,
            max_fee_per_gas=0,
            gas=GAS,
            to=to,
            value=value,
            data=data,
            access_list=(),
        )
        computation = self.state.apply_transaction(unsigned.as_signed_transaction(sender.key))
        self.gas_used = GAS - computation.get_gas_remaining()
        return computation

    def attempt(self, sender: Party, to: bytes, data: bytes) -> list[ContractEvent]:
        """As `send_raw`, unsigned and undone at once: for properties that try many calls on one state."""
        snapshot = self.state.snapshot()
        message = Message(GAS, to, sender.address, 0, data, self.state.get_code(to))
        context = CancunTransactionContext(gas_price=0, origin=sender.address)
        computation = self.state.computation_class.apply_message(self.state, message, context)
        self.state.revert(snapshot)
        return _events(computation)

    def view(self, contract: ContractName, function: str, *values: object) -> Any:
        """What a view returns: the value if it is one, else all of them."""
        to = ADDRESSES[contract]
        message = Message(
            GAS, to, ZERO_ADDRESS, 0, encode_function(contract, function, values), self.state.get_code(to)
        )
        context = CancunTransactionContext(gas_price=0, origin=ZERO_ADDRESS)
        computation = self.state.computation_class.apply_message(self.state, message, context)
        if not computation.is_success:
            raise Reverted(revert_reason(computation.output))
        results = decode_result(contract, function, computation.output)
        return results[0] if len(results) == 1 else results


def _events(computation: ComputationAPI) -> list[ContractEvent]:
    if not computation.is_success:
        assert not computation.get_log_entries()
        raise Reverted(revert_reason(computation.output))
    entries = computation.get_log_entries()
    events = [decode_log(address, [t.to_bytes(32) for t in topics], data) for address, topics, data in entries]
    assert None not in events
    return [event for event in events if event is not None]


def hashes(count: int, seed: str = "shard") -> tuple[ShardHash, ...]:
    """That many different SHA-256 values."""
    return tuple(ShardHash(hashlib.sha256(f"{seed} {i}".encode()).digest()) for i in range(count))


MODEL = RegisterModel(
    model_id=ModelId("smol"),
    version=Version("1.0"),
    total_size=4 * MIB + 1,
    shard_size=MIB,
    shard_count=5,
    shard_hashes=hashes(5),
    manifest_hash=ManifestHash(hashes(1, "manifest")[0]),
    minimum_tier="basic",
    core=False,
    architecture="llama",
    metadata='{"title": "Smol"}',
)
NODE_ID = NodeId("12D3KooWGqXyU6kPJGvGXvB4sfMyzRx7ydrsT8GxGyo1vKPwmZPh")
JOIN = JoinNode(NODE_ID, "worker", ("/ip4/127.0.0.1/tcp/4001",))


def model(**changes: Any) -> RegisterModel:
    """MODEL with fields changed."""
    return msgspec.structs.replace(MODEL, **changes)


def encode_loosely(call: Call) -> bytes:
    """Call data without Python's bounds: what somebody with another client may send. Texts may also be bytes."""
    abi = contracts()[call.contract].functions[call.function]
    values = [getattr(call, argument) for argument in abi.arguments]
    # `string` and `bytes` are encoded alike, but eth-abi takes bytes only for the latter.
    types = [t.replace("string", "bytes") for t in abi.types]
    return abi.selector + encode(types, [_as_bytes(v) for v in values])


def _as_bytes(value: object) -> object:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, tuple):
        return tuple(_as_bytes(item) for item in value)
    return value
