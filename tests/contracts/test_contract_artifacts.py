"""The artifacts in the repository are what the sources compile to, on any machine and in any place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from eth_hash.auto import keccak
from rlp import encode as rlp_encode

from contracts import compile as compiler
from contracts.addresses import ADDRESSES, CONTRACT_AT, CONTRACT_NAMES
from contracts.calls import Call, CheckTier, DefineTier, SetCheckPeriod, revert_reason
from contracts.deployment import deployment
from contracts.errors import BadInput
from contracts.types import Address
from tests.contracts.chain import ADMIN, JOIN, MODEL, STRANGER, Chain


def test_the_artifacts_are_the_same_whatever_the_hash_seed() -> None:
    # Of one contract, which uses the shared module too; `make lint` compares all of them.
    script = "import json; from contracts.compile import *; print(json.dumps(compile_one('Members', SOURCES)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=compiler.SOURCES.parent,
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(result.stdout) == json.loads(compiler.ARTIFACTS.read_text())["contracts"]["Members"]


def test_a_change_in_a_source_changes_the_artifacts_and_its_place_does_not(tmp_path: Path) -> None:
    for source in compiler.SOURCES.glob("*.vy"):
        shutil.copy(source, tmp_path)
    committed = json.loads(compiler.ARTIFACTS.read_text())["contracts"]["Members"]
    assert compiler.compile_one("Members", tmp_path) == committed
    changed = tmp_path / "text.vy"  # the alphabets, which Members uses
    changed.write_text(changed.read_text().replace("((1 << 94) - 1) << 33", "((1 << 93) - 1) << 33"))
    assert compiler.compile_one("Members", tmp_path) != committed


def test_usage_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiler.main(["--frob"]) == 2
    assert "usage" in capsys.readouterr().err
    monkeypatch.setattr(compiler, "ARTIFACTS", tmp_path / "artifacts.json")
    monkeypatch.setattr(compiler, "compile_all", lambda: "fresh")
    assert compiler.main(["--check"]) == 1
    assert "make contracts" in capsys.readouterr().err
    assert compiler.main([]) == 0
    assert compiler.main(["--check"]) == 0
    assert (tmp_path / "artifacts.json").read_text() == "fresh"


def test_each_contract_compiles_alone_to_the_same() -> None:
    contracts = json.loads(compiler.ARTIFACTS.read_text())["contracts"]
    assert tuple(contracts) == CONTRACT_NAMES
    assert all(c["init_code"].startswith("0x") and c["abi"] for c in contracts.values())


def test_addresses() -> None:
    assert [a.hex() for a in ADDRESSES.values()] == [f"{0xA16E0001 + i:040x}" for i in range(5)]
    assert {n: CONTRACT_AT[a] for n, a in ADDRESSES.items()} == {n: n for n in CONTRACT_NAMES}


def test_the_contracts_know_one_another() -> None:
    chain = Chain()
    for contract, others in {
        "Tiers": ("accounts", "models", "members"),
        "Models": ("accounts", "tiers"),
        "Members": ("accounts",),
        "Shards": ("accounts", "models", "members"),
    }.items():
        for other in others:
            assert chain.view(contract, other) == ADDRESSES[other.capitalize()]  # type: ignore[arg-type, index]


def test_deployment_elsewhere_uses_the_addresses_given() -> None:
    # On a foreign network a contract's address follows from the deployer and its nonce.
    derived = [Address(keccak(rlp_encode([ADMIN.address, nonce]))[12:]) for nonce in range(5)]
    addresses = dict(zip(CONTRACT_NAMES, derived, strict=True))
    here, there = deployment(ADMIN.address), deployment(ADMIN.address, addresses)
    assert [d.contract for d in there] == list(CONTRACT_NAMES)
    assert [d.address for d in there] == derived
    assert here[0].init_code == there[0].init_code
    for deploy in there[1:]:
        assert bytes(addresses["Accounts"]) in deploy.init_code
        assert bytes(ADDRESSES["Accounts"]) not in deploy.init_code
    with pytest.raises(BadInput):
        deployment(Address(b"short"))


def test_the_same_code_runs_elsewhere_by_ordinary_transactions() -> None:
    chain = Chain()
    derived = [Address(keccak(rlp_encode([STRANGER.address, nonce]))[12:]) for nonce in range(5)]
    addresses = dict(zip(CONTRACT_NAMES, derived, strict=True))
    for deploy in deployment(STRANGER.address, addresses):
        created = chain.execute(STRANGER, b"", deploy.init_code)
        assert created.is_success
        assert created.msg.storage_address == deploy.address
    check = CheckTier(ADMIN.address, MODEL.model_id, MODEL.version)
    set_up: list[Call] = [DefineTier("basic", 1, 1), MODEL, JOIN]
    for call in set_up:
        assert chain.execute(STRANGER, addresses[call.contract], call.encode()).is_success
    early = chain.execute(STRANGER, addresses["Tiers"], check.encode())
    assert revert_reason(early.output) == "check period is not set"
    for call in (SetCheckPeriod(60), check):
        done = chain.execute(STRANGER, addresses["Tiers"], call.encode())
        assert [address for address, _, _ in done.get_log_entries()] == [addresses["Tiers"]]
    # The admin of one network is nobody in the other.
    refused = chain.execute(ADMIN, addresses["Tiers"], DefineTier("pro", 2, 1).encode())
    assert revert_reason(refused.output) == "sender is not an admin"
