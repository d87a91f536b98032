"""The genesis config: a strict schema, one clear line for each mistake, one hash for each meaning."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from eth_utils.address import to_checksum_address
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import BadInput, NotFound
from contracts.limits import AUTHORITIES_MAX
from contracts.types import Address, ModelId
from genesis import config as genesis_config
from genesis.config import (
    UNTIL_NEVER,
    Account,
    CatalogueEntry,
    GenesisConfig,
    GenesisModel,
    Network,
    Shards,
    Tier,
    canonical,
    config_hash,
    dump,
    load,
    template,
)
from genesis.toml import GENESIS_BYTES_MAX

ADMIN, AUTHORITY, USER = (f"0x{i:040x}" for i in (0xA1, 0xA2, 0xA3))
HASH = "0x" + "11" * 32

FULL = f"""
admins = ["{ADMIN}"]
authorities = ["{AUTHORITY}"]
check_period_s = 3600

[network]
name = "test"
chain_id = 7
timestamp = 1700000000
period_s = 5
gas_limit = 50000000

[shards]
size = 67108864
redundancy = 2

[[tiers]]
name = "basic"
rank = 1
cache_size = 8

[[tiers]]
name = "pro"
rank = 2
cache_size = 16
concurrent_answers = 3
tokens_per_minute = 0

[[accounts]]
address = "{USER}"
tier = "pro"
until = 1800000000

[[models]]
model_id = "smol"
version = "1.0"
total_size = 67108865
shard_size = 67108864
shard_count = 2
shard_hashes = ["{HASH}", "{HASH}"]
manifest_hash = "{HASH}"
minimum_tier = "basic"
core = true
architecture = "llama"
metadata = "{{}}"

[[catalogue]]
model_id = "smol"
title = "Smøl ☃"
minimum_tier = "basic"
approximate_size = 5
architecture = "llama"
parameters = 6
source = "somewhere"
"""

MINIMAL = f"""
admins = ["{ADMIN}"]
authorities = ["{ADMIN}"]
[network]
name = "test"
chain_id = 7
timestamp = 1
[[tiers]]
name = "basic"
rank = 1
cache_size = 8
"""


def test_every_value_arrives() -> None:
    config = load(FULL.encode())
    assert config == GenesisConfig(
        network=Network("test", 7, 1700000000, 5, 50000000),
        admins=(Address(bytes.fromhex(ADMIN[2:])),),
        authorities=(Address(bytes.fromhex(AUTHORITY[2:])),),
        tiers=(Tier("basic", 1, 8), Tier("pro", 2, 16, 3, 0)),
        check_period_s=3600,
        accounts=(Account(Address(bytes.fromhex(USER[2:])), "pro", 1800000000),),
        shards=Shards(67108864, 2),
        models=(msgspec.convert({**MODEL_FIELDS}, GenesisModel, builtin_types=(bytes,)),),
        catalogue=(CatalogueEntry(ModelId("smol"), "Smøl ☃", "basic", 5, "llama", 6, "somewhere"),),
    )


MODEL_FIELDS: dict[str, Any] = {
    "model_id": "smol",
    "version": "1.0",
    "total_size": 67108865,
    "shard_size": 67108864,
    "shard_count": 2,
    "shard_hashes": (b"\x11" * 32, b"\x11" * 32),
    "manifest_hash": b"\x11" * 32,
    "minimum_tier": "basic",
    "core": True,
    "architecture": "llama",
    "metadata": "{}",
}


def test_what_is_left_out_has_its_default() -> None:
    config = load(MINIMAL.encode())
    assert config.shards == Shards(size=4 << 30, redundancy=3)
    assert (config.network.period_s, config.network.gas_limit, config.check_period_s) == (1, 60_000_000, 86400)
    assert (config.accounts, config.models, config.catalogue) == ((), (), ())
    assert config.tiers == (Tier("basic", 1, 8, concurrent_answers=4, tokens_per_minute=40_000),)


def changed(old: str, new: str) -> bytes:
    assert FULL.count(old) >= 1, old
    return FULL.replace(old, new, 1).encode()


MANY_AUTHORITIES = ", ".join(f'"0x{i:040x}"' for i in range(1, AUTHORITIES_MAX + 2))
SECOND_MODEL = FULL[FULL.index("[[models]]") : FULL.index("[[catalogue]]")]
SECOND_ENTRY = FULL[FULL.index("[[catalogue]]") :]
SECOND_ACCOUNT = f'[[accounts]]\naddress = "{USER}"\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # the schema
        ("check_period_s", "check_period", "the top level: Object contains unknown field `check_period`"),
        ("period_s = 5", "period = 5", "network: Object contains unknown field `period`"),
        ("redundancy = 2", "copies = 2", "shards: Object contains unknown field `copies`"),
        ("rank = 2", "rank = 2\nnote = 1", "tiers[1]: Object contains unknown field `note`"),
        ("chain_id = 7", "", "network: Object missing required field `chain_id`"),
        ("chain_id = 7", 'chain_id = "7"', "network.chain_id: Expected `int`, got `str`"),
        ("core = true", "core = 1", "models[0].core: Expected `bool`, got `int`"),
        (f'admins = ["{ADMIN}"]', "admins = [7]", "admins[0]: Expected `bytes`, got `int`"),
        (f'admins = ["{ADMIN}"]', f'admins = "{ADMIN}"', "admins: Expected `array`, got `bytes`"),
        # addresses and hashes
        (ADMIN, "0xa1", "admins[0]: '0xa1' is not 0x and 40 hexadecimal digits"),
        (ADMIN, ADMIN[2:], "is not 0x and 40 hexadecimal digits"),
        (ADMIN, ADMIN[:-1] + "g", "is not 0x and 40 hexadecimal digits"),
        (USER, "0x" + "aB" * 20, "accounts[0].address: the checksum (EIP-55)"),
        (HASH, HASH + "00", "models[0].shard_hashes[0]: '0x1111"),
        (f'manifest_hash = "{HASH}"', 'manifest_hash = ""', "models[0].manifest_hash: '' is not 0x and 64"),
        # network
        ('name = "test"', 'name = "Test"', "network.name: 'Test' does not match"),
        ("chain_id = 7", "chain_id = 0", "network.chain_id: 0 is not between 1 and"),
        ("chain_id = 7", f"chain_id = {2**53}", "network.chain_id: 9007199254740992 is not between"),
        ("timestamp = 1700000000", "timestamp = 0", "network.timestamp: 0 is not between"),
        ("timestamp = 1700000000", "timestamp = -1", "network.timestamp: -1 is not between"),
        ("period_s = 5", "period_s = 3601", "network.period_s: 3601 is not between 0 and 3600"),
        ("gas_limit = 50000000", "gas_limit = 1000000", "network.gas_limit: 1000000 is not between"),
        ("check_period_s = 3600", "check_period_s = 0", "check_period_s: 0 is not between"),
        # founders
        (f'admins = ["{ADMIN}"]', "admins = []", "admins: has 0 entries"),
        (f'authorities = ["{AUTHORITY}"]', "authorities = []", "authorities: has 0 entries"),
        (f'authorities = ["{AUTHORITY}"]', f"authorities = [{MANY_AUTHORITIES}]", "authorities: has 32 entries"),
        (f'admins = ["{ADMIN}"]', f'admins = ["{ADMIN}", "{ADMIN}"]', "admins[1]: the same address is there twice"),
        (ADMIN, "0x" + "00" * 20, "admins[0]: the address is zero"),
        # tiers
        ('name = "pro"', 'name = "basic"', "tiers[1]: the same name is there twice"),
        ("rank = 2", "rank = 1", "tiers[1]: the same rank is there twice"),
        ("rank = 2", "rank = 256", "tiers[1].rank: 256 is not between 1 and 255"),
        ("rank = 1", "rank = 0", "tiers[0].rank: 0 is not between"),
        ("cache_size = 8", "cache_size = 0", "tiers[0].cache_size: 0 is not between"),
        ('name = "pro"', 'name = "-pro"', "tiers[1].name: '-pro' does not match"),
        ("concurrent_answers = 3", "concurrent_answers = -1", "tiers[1].concurrent_answers: -1 is not between 0 and"),
        ("concurrent_answers = 3", "concurrent_answers = 10001", "tiers[1].concurrent_answers: 10001 is not between"),
        ("tokens_per_minute = 0", "tokens_per_minute = -1", "tiers[1].tokens_per_minute: -1 is not between 0 and"),
        ("tokens_per_minute = 0", "tokens_per_minute = 1.5", "tiers[1].tokens_per_minute: Expected `int`"),
        # accounts
        ('tier = "pro"', 'tier = "gold"', "accounts[0].tier: there is no tier 'gold', only basic, pro"),
        ('tier = "pro"', "", "accounts[0].until: there is no tier that could end"),
        ("until = 1800000000", "until = 1700000000", "accounts[0].until: 1700000000 is not between 1700000001"),
        (USER, "0x" + "00" * 20, "accounts[0].address: the address is zero"),
        ("[[models]]", SECOND_ACCOUNT + "[[models]]", "accounts[1]: the same address is there twice"),
        # shards
        ("size = 67108864\nredundancy", "size = 67108865\nredundancy", "shards.size: 67108865 is not a multiple"),
        ("size = 67108864\nredundancy", "size = 0\nredundancy", "shards.size: 0 is not between"),
        ("redundancy = 2", "redundancy = 0", "shards.redundancy: 0 is not between"),
        # models
        ('model_id = "smol"\nversion', 'model_id = "s mol"\nversion', "models[0].model_id: 's mol' does not match"),
        ('version = "1.0"', 'version = ""', "models[0].version: '' does not match"),
        ("total_size = 67108865", "total_size = 0", "models[0].total_size: 0 is not between"),
        (
            "total_size = 67108865",
            "total_size = 67108864",
            "ceil(total_size / shard_size) is 1: the three",
        ),
        ("shard_count = 2", "shard_count = 3", "models[0].shard_count: is 3, there are 2 shard_hashes"),
        (f'["{HASH}", "{HASH}"]', f'["{HASH}"]', "models[0].shard_count: is 2, there are 1 shard_hashes"),
        (f'["{HASH}", ', f'["0x{"00" * 32}", ', "models[0].shard_hashes[0]: the hash is zero"),
        (f'manifest_hash = "{HASH}"', f'manifest_hash = "0x{"00" * 32}"', "models[0].manifest_hash: the hash is zero"),
        ("shard_size = 67108864", "shard_size = 1000", "models[0].shard_size: 1000 is not between"),
        ('minimum_tier = "basic"\ncore', 'minimum_tier = "gold"\ncore', "models[0].minimum_tier: there is no tier"),
        ('metadata = "{}"', 'metadata = "ü"', "models[0].metadata: must be at most 1024 printable ASCII"),
        ('metadata = "{}"', f'metadata = "{"m" * 1025}"', "models[0].metadata: must be at most 1024 printable ASCII"),
        ("[[catalogue]]", SECOND_MODEL + "[[catalogue]]", "models[1]: the same model_id and version is there twice"),
        (
            "[[catalogue]]",
            SECOND_MODEL.replace("1.0", "2.0") + "[[catalogue]]",
            "models[1].core: only one model can be the core",
        ),
        # catalogue
        ("[[catalogue]]", SECOND_ENTRY + "[[catalogue]]", "catalogue[1]: the same model_id is there twice"),
        ('title = "Smøl ☃"', 'title = ""', "catalogue[0].title: must be 1 to 200 printable characters, has 0"),
        ('title = "Smøl ☃"', 'title = "a\\u001bb"', "catalogue[0].title: must be 1 to 200 printable characters"),
        ("approximate_size = 5", "approximate_size = 0", "catalogue[0].approximate_size: 0 is not between"),
        ("parameters = 6", "parameters = 0", "catalogue[0].parameters: 0 is not between"),
        ('source = "somewhere"', 'source = ""', "catalogue[0].source: must be 1 to"),
        ('minimum_tier = "basic"\napp', 'minimum_tier = "gold"\napp', "catalogue[0].minimum_tier: there is no tier"),
    ],
)
def test_each_mistake_is_named_by_its_key(old: str, new: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as refused:
        load(changed(old, new))
    assert str(refused.value).startswith("genesis: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe",
        b"network = ",
        b"a = 1\na = 2",
        b"a = " + b"[" * 5000,
        b"a = " + b"9" * 5000,
        b" " * (GENESIS_BYTES_MAX + 1),
    ],
)
def test_what_is_no_genesis_file_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput, match="the genesis file"):
        load(data)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "genesis.toml"
    with pytest.raises(NotFound, match="aigen genesis new"):
        load(path)
    path.write_text(FULL, encoding="utf-8")
    assert load(path) == load(str(path)) == load(FULL.encode())
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "replace")))
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    with pytest.raises(BadInput):
        load(data)


def test_checksummed_and_plain_addresses_are_the_same() -> None:
    mixed = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
    spellings = [changed(USER, a) for a in (mixed, mixed.lower(), "0x" + mixed[2:].upper())]
    assert len({config_hash(load(s)) for s in spellings}) == 1


@pytest.mark.parametrize("text", [FULL, MINIMAL])
def test_dump_reads_back_as_the_same(text: str) -> None:
    config = load(text.encode())
    assert load(dump(config).encode()) == config
    assert to_checksum_address(config.admins[0]) in dump(config)


texts = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)  # all printable


@settings(max_examples=100, deadline=None)
@given(title=texts | st.sampled_from(['"', "\\", "\\n", '"""', "a\u00a0b"[:1], "😀", "#", "'"]), source=texts)
def test_dump_escapes_any_text(title: str, source: str) -> None:
    config = load(FULL.encode())
    entry = msgspec.structs.replace(config.catalogue[0], title=title, source=source)
    config = msgspec.structs.replace(config, catalogue=(entry,))
    assert load(dump(config).encode()) == config


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every single value in a config."""
    if isinstance(value, msgspec.Struct):
        return [leaf for f in value.__struct_fields__ for leaf in leaves(getattr(value, f), (*path, f))]
    if isinstance(value, tuple):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
    return [path]


def with_leaf(value: Any, path: tuple[Any, ...]) -> Any:
    """The same with one single value changed."""
    if not path:
        match value:
            case bool():
                return not value
            case int():
                return value + 1
            case str():
                return value + "x"
            case bytes():
                return bytes([value[0] ^ 1]) + value[1:]
        raise AssertionError(f"{value!r} is no leaf")
    if isinstance(value, tuple):
        return tuple(with_leaf(v, path[1:]) if i == path[0] else v for i, v in enumerate(value))
    return msgspec.structs.replace(value, **{path[0]: with_leaf(getattr(value, path[0]), path[1:])})


def test_the_hash_covers_every_single_value() -> None:
    config = load(FULL.encode())
    paths = leaves(config)
    assert len(paths) > 35
    hashes = {config_hash(with_leaf(config, path)) for path in paths}
    assert len(hashes | {config_hash(config)}) == len(paths) + 1


def test_the_hash_depends_on_the_meaning_and_not_on_the_text() -> None:
    reordered = FULL.replace("period_s = 5\ngas_limit = 50000000", "gas_limit = 50_000_000 # gas\n\nperiod_s = 0x5")
    assert reordered != FULL
    assert canonical(load(reordered.encode())) == canonical(load(FULL.encode()))


def test_templates_lack_only_their_founders() -> None:
    for name in genesis_config.TEMPLATES:
        config = template(name)
        assert (config.admins, config.authorities, config.network.timestamp) == ((), (), 0)
        assert config.network.name == name
        with pytest.raises(BadInput, match=r"network.timestamp"):
            load(dump(config).encode())
    with pytest.raises(NotFound, match="choose one of aigen, dev"):
        template("../dev")


def test_the_seed_is_in_the_templates() -> None:
    for name, shard_size in (("aigen", 4 << 30), ("dev", 64 << 20)):
        config = template(name)
        assert config.shards == Shards(shard_size, 3)
        assert [(t.name, t.rank, t.cache_size) for t in config.tiers] == [
            ("basic", 1, 8 * 10**9),
            ("pro", 2, 16 * 10**9),
            ("unlimited", 3, 32 * 10**9),
        ]
        assert [(t.concurrent_answers, t.tokens_per_minute) for t in config.tiers] == [
            (4, 40_000),
            (16, 200_000),
            (0, 0),
        ]
        assert [(c.model_id, c.minimum_tier, c.approximate_size) for c in config.catalogue] == [
            ("mistral-7b", "basic", 14 * 10**9),
            ("llama2-13b", "pro", 26 * 10**9),
            ("codegen-16b", "pro", 32 * 10**9),
        ]
    assert template("aigen").network.chain_id != template("dev").network.chain_id


def test_never_is_exact_in_every_client() -> None:
    assert int(float(UNTIL_NEVER)) == UNTIL_NEVER
