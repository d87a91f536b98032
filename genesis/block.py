"""The genesis block: a config executed. Owns the set-up calls and the state they leave; knows no storage of it.

The contracts are created at their fixed addresses and set up by ordinary calls of the first admin, unsigned and
without a gas bound, through the same EVM and the same rules as every later transaction. The same config gives the
same block on every machine. The header has the fields of Cancun (https://eips.ethereum.org/EIPS/eip-4844).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from eth.abc import BlockHeaderAPI, ComputationAPI, StateAPI
from eth.constants import BLANK_ROOT_HASH, CREATE_CONTRACT_ADDRESS, ZERO_ADDRESS, ZERO_HASH32
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth.vm.execution_context import ExecutionContext
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from eth.vm.forks.cancun.state import CancunState
from eth.vm.forks.cancun.transaction_context import CancunTransactionContext
from eth.vm.message import Message

from contracts.calls import (
    AddAdmin,
    AddAuthority,
    Call,
    DefineTier,
    EnrolAccounts,
    GrantTier,
    RegisterModel,
    SetCheckPeriod,
    revert_reason,
)
from contracts.deployment import deployment
from contracts.errors import BadInput
from contracts.events import ContractEvent, decode_log
from contracts.limits import ACCOUNTS_PER_CALL_MAX
from contracts.types import Address
from genesis.checks import check
from genesis.config import config_hash
from genesis.schema import UNTIL_NEVER, GenesisConfig

_GAS: Final = 2**62
"""More than any set-up call can use: genesis is bounded by the config's own limits, not by gas."""


@dataclass(frozen=True, slots=True)
class GenesisBlock:
    """Block 0: its header and hash, the trie nodes and code of its state by their hash, and its events in order."""

    header: BlockHeaderAPI
    hash: bytes
    state_nodes: dict[bytes, bytes]
    events: tuple[ContractEvent, ...]


def build(config: GenesisConfig) -> GenesisBlock:
    """The genesis block of a config. Raises BadInput naming the key that is wrong."""
    check(config)
    nodes: dict[bytes, bytes] = {}
    state = _empty_state(config, nodes)
    admin = config.admins[0]
    events: list[ContractEvent] = []
    for deploy in deployment(admin):
        message = Message(_GAS, CREATE_CONTRACT_ADDRESS, admin, 0, b"", deploy.init_code, create_address=deploy.address)
        computation = state.computation_class.apply_create_message(state, message, _context(admin))
        assert computation.is_success, f"{deploy.contract} cannot be created: {computation.error!r}"
        events += _events(computation)
    for key, call in set_up_calls(config):
        message = Message(_GAS, call.to, admin, 0, call.encode(), state.get_code(call.to))
        computation = state.computation_class.apply_message(state, message, _context(admin))
        if not computation.is_success:
            raise BadInput(f"genesis: {key}: the contract refuses it: {revert_reason(computation.output)}")
        events += _events(computation)
    state.persist()
    header = CancunBlockHeader(
        difficulty=0,
        block_number=0,
        gas_limit=config.network.gas_limit,
        timestamp=config.network.timestamp,
        state_root=state.state_root,
        extra_data=config_hash(config),
        nonce=bytes(8),
        base_fee_per_gas=0,
    )
    return GenesisBlock(header, header.hash, nodes, tuple(events))


def set_up_calls(config: GenesisConfig) -> Iterator[tuple[str, Call]]:
    """What the first admin calls after deployment, in order, each with the key of the config that asks for it."""
    yield "check_period_s", SetCheckPeriod(config.check_period_s)
    for i, tier in enumerate(config.tiers):
        yield f"tiers[{i}]", DefineTier(tier.name, tier.rank, tier.cache_size)
    for i, admin in enumerate(config.admins[1:], start=1):
        yield f"admins[{i}]", AddAdmin(admin)
    for i, authority in enumerate(config.authorities):
        yield f"authorities[{i}]", AddAuthority(authority)
    enrolled = {*config.admins, *config.authorities}
    others = [a.address for a in config.accounts if a.address not in enrolled]
    for start in range(0, len(others), ACCOUNTS_PER_CALL_MAX):
        yield "accounts", EnrolAccounts(tuple(others[start : start + ACCOUNTS_PER_CALL_MAX]))
    for i, account in enumerate(config.accounts):
        if account.tier is not None:
            until = UNTIL_NEVER if account.until is None else account.until
            yield f"accounts[{i}]", GrantTier(account.address, account.tier, until)
    for i, model in enumerate(config.models):
        yield (
            f"models[{i}]",
            RegisterModel(
                model_id=model.model_id,
                version=model.version,
                total_size=model.total_size,
                shard_size=model.shard_size,
                shard_count=model.shard_count,
                shard_hashes=model.shard_hashes,
                manifest_hash=model.manifest_hash,
                minimum_tier=model.minimum_tier,
                core=model.core,
                architecture=model.architecture,
                metadata=model.metadata,
            ),
        )


def _empty_state(config: GenesisConfig, nodes: dict[bytes, bytes]) -> StateAPI:
    context = ExecutionContext(
        coinbase=ZERO_ADDRESS,
        timestamp=config.network.timestamp,
        block_number=0,
        difficulty=0,
        mix_hash=ZERO_HASH32,
        gas_limit=config.network.gas_limit,
        prev_hashes=(),
        chain_id=config.network.chain_id,
        base_fee_per_gas=0,
        excess_blob_gas=0,
    )
    return CancunState(AtomicDB(MemoryDB(nodes)), context, BLANK_ROOT_HASH)


def _context(sender: Address) -> CancunTransactionContext:
    return CancunTransactionContext(gas_price=0, origin=sender)


def _events(computation: ComputationAPI) -> list[ContractEvent]:
    events = []
    for address, topics, data in computation.get_log_entries():
        event = decode_log(address, [topic.to_bytes(32) for topic in topics], data)
        assert event is not None, f"the contract at {address.hex()} logged something that is no event of ours"
        events.append(event)
    return events
