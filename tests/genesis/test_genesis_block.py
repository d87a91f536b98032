"""The genesis block: the config executed, the same everywhere, and whole."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from eth.db.atomic import AtomicDB
from eth.db.backends.memory import MemoryDB
from eth_hash.auto import keccak
from trie.hexary import HexaryTrie
from trie.iter import NodeIterator

from contracts import events
from contracts.addresses import ADDRESSES
from contracts.calls import RegisterModel
from contracts.errors import BadInput
from contracts.types import Address
from genesis import block as genesis_block
from genesis.block import GenesisBlock, build, set_up_calls
from genesis.config import UNTIL_NEVER, Account, GenesisConfig, GenesisModel, config_hash, dump, load
from genesis.new import new_genesis
from tests.contracts.chain import ADMIN, AUTHORITY, NOW, OPERATOR, STRANGER, USER, Chain, dev_block, dev_config, hashes
from tests.contracts.chain import MODEL as REGISTER

MODEL = GenesisModel(**{f: getattr(REGISTER, f) for f in REGISTER.__struct_fields__})


def rich_config() -> GenesisConfig:
    """Two admins, two authorities of which one is an admin, accounts with and without a tier, and models."""
    base = new_genesis(
        "dev",
        admins=[ADMIN.address, USER.address],
        authorities=[AUTHORITY.address, USER.address],
        timestamp=NOW,
        accounts=[
            Account(USER.address, "unlimited"),
            Account(OPERATOR.address, "basic", NOW + 5),
            Account(STRANGER.address),
        ],
        name="rich",
        chain_id=77,
        shard_size=1 << 20,
    )
    core = msgspec.structs.replace(MODEL, version="2.0", core=True)
    return msgspec.structs.replace(base, models=(MODEL, core))


def test_the_header() -> None:
    config, block = dev_config(), dev_block()
    header = block.header
    assert (header.block_number, header.timestamp, header.gas_limit, header.base_fee_per_gas) == (0, NOW, 60_000_000, 0)
    assert (header.gas_used, header.difficulty, header.parent_hash) == (0, 0, bytes(32))
    assert header.extra_data == config_hash(config)
    assert header.hash == block.hash
    assert header.is_genesis


def test_the_same_config_gives_the_same_block_in_any_process(tmp_path: Path) -> None:
    path = tmp_path / "genesis.toml"
    path.write_text(dump(rich_config()), encoding="utf-8")
    script = "import sys; from genesis import block, config; print(block.build(config.load(sys.argv[1])).hash.hex())"
    root = Path(genesis_block.__file__).parent.parent
    outputs = set()
    for seed in ("1", "271828"):
        result = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed, "TZ": "Asia/Tokyo", "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        outputs.add(result.stdout.strip())
    assert outputs == {build(rich_config()).hash.hex()}
    assert build(load(path)) == build(rich_config())


def test_what_the_contracts_never_see_is_in_the_hash_too() -> None:
    config = dev_config()
    other = msgspec.structs.replace(config, catalogue=config.catalogue[:2])
    assert build(other).header.state_root == dev_block().header.state_root
    assert build(other).hash != dev_block().hash


def test_the_state_is_five_contracts_and_named_by_its_content() -> None:
    block = build(rich_config())
    assert all(keccak(value) == key for key, value in block.state_nodes.items())
    accounts = NodeIterator(HexaryTrie(dict(block.state_nodes), block.header.state_root)).keys()
    assert set(accounts) == {keccak(address) for address in ADDRESSES.values()}


def test_the_state_holds_what_the_config_says() -> None:
    chain = Chain(rich_config())
    assert chain.view("Accounts", "authorities") == (AUTHORITY.address, USER.address)
    for party in (ADMIN, AUTHORITY, OPERATOR, USER, STRANGER):
        assert chain.view("Accounts", "is_enrolled", party.address)
    assert [chain.view("Accounts", "is_admin", p.address) for p in (ADMIN, USER, AUTHORITY)] == [True, True, False]
    assert chain.view("Tiers", "check_period_s") == 86400
    assert chain.view("Tiers", "grant_of", USER.address) == ("unlimited", UNTIL_NEVER)
    assert chain.view("Tiers", "grant_of", OPERATOR.address) == ("basic", NOW + 5)
    assert chain.view("Tiers", "held", STRANGER.address) == ""
    assert chain.view("Models", "core_version") == "2.0"
    assert chain.view("Models", "active_shard_count", "smol", "1.0") == 5
    assert chain.state.get_nonce(ADMIN.address) == 0


def test_the_events_tell_it_in_order() -> None:
    block = build(rich_config())
    admin = ADMIN.address
    fields = {f: getattr(REGISTER, f) for f in REGISTER.__struct_fields__}
    assert list(block.events) == [
        events.Enrolled(admin),
        events.AdminAdded(admin),
        events.CheckPeriodSet(86400),
        events.TierDefined("basic", 1, 8 * 10**9),
        events.TierDefined("pro", 2, 16 * 10**9),
        events.TierDefined("unlimited", 3, 32 * 10**9),
        events.Enrolled(USER.address),
        events.AdminAdded(USER.address),
        events.Enrolled(AUTHORITY.address),
        events.AuthorityAdded(AUTHORITY.address),
        events.AuthorityAdded(USER.address),
        events.Enrolled(OPERATOR.address),
        events.Enrolled(STRANGER.address),
        events.TierGranted(USER.address, "unlimited", UNTIL_NEVER),
        events.TierGranted(OPERATOR.address, "basic", NOW + 5),
        events.ModelRegistered(**fields, admin=admin),
        events.ModelRegistered(**{**fields, "version": "2.0", "core": True}, admin=admin),
        events.CoreModelSet(MODEL.model_id, msgspec.structs.replace(MODEL, version="2.0").version),
    ]


def test_more_accounts_than_one_call_takes() -> None:
    accounts = [Account(Address(h[:20])) for h in hashes(600, "account")]
    config = msgspec.structs.replace(dev_config(), accounts=tuple(accounts))
    enrolled = [e.account for e in build(config).events if isinstance(e, events.Enrolled)]
    assert enrolled == [ADMIN.address, AUTHORITY.address, *(a.address for a in accounts)]


def test_the_ledger_can_go_on_from_it() -> None:
    # The block's nodes alone are a state on which the first transaction runs.
    chain = Chain()
    before = chain.state.state_root
    chain.send(ADMIN, REGISTER)
    chain.state.persist()
    assert chain.state.state_root != before


def test_a_wrong_config_gives_no_block() -> None:
    with pytest.raises(BadInput, match="admins"):
        build(msgspec.structs.replace(dev_config(), admins=()))


def test_what_a_contract_refuses_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    # The checks leave nothing for the contracts to refuse; without them, the contracts do.
    monkeypatch.setattr(genesis_block, "check", lambda config: None)
    bad = msgspec.structs.replace(MODEL, shard_count=4)
    with pytest.raises(BadInput, match=r"models\[0\]: the contract refuses it: shard_count is not ceil"):
        build(msgspec.structs.replace(dev_config(), models=(bad,)))


def test_the_set_up_calls_are_the_registrations_arguments() -> None:
    calls = [call for _, call in set_up_calls(rich_config()) if isinstance(call, RegisterModel)]
    assert calls[0] == REGISTER
    assert GenesisModel.__struct_fields__ == RegisterModel.__struct_fields__


def test_building_leaves_nothing_behind() -> None:
    first: GenesisBlock = build(dev_config())
    first.state_nodes.clear()
    assert build(dev_config()).state_nodes == dev_block().state_nodes
    db = AtomicDB(MemoryDB(dict(dev_block().state_nodes)))
    assert dev_block().header.state_root in db
