"""`aigen proof check`: on a machine without a node, and what it refuses, each in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contracts.calls import GrantTier
from genesis.config import dump
from ledger import prover
from ledger.proof import PROOF_BYTES_MAX
from node.storage.importer import import_model
from node.storage.store import ShardStore
from tests.ledger.proofs import KEYS, QUESTIONS, UNTIL, Network
from tests.ledger.world import ADMIN, MODEL, NODE, OPERATOR, STRANGER, announce, join, make_config, open_chain, register
from tests.node.cluster import MIB, Done, aigen, flip, write_model

WEIGHTS = "model.safetensors"

ALONE = """\
import sys
sys.modules["plyvel"] = None  # no LevelDB

def hook(name, details):
    if name in {"socket.connect", "socket.bind", "socket.getaddrinfo"}:
        raise AssertionError(f"it looks for a network: {name} {details}")

sys.addaudithook(hook)
from node.cli import main
main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Files:
    """What somebody was sent: the genesis file, the proofs, the model."""

    path: Path

    @property
    def genesis(self) -> Path:
        return self.path / "genesis.toml"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def proof(self, question: str) -> Path:
        return self.path / f"{question}.proof.json"

    def check(self, question: str, *words: object) -> Done:
        return aigen("proof", "check", self.proof(question), *words, "--genesis", self.genesis)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a network whose four authorities became five, and then registered a real directory's model."""
    made = Files(tmp_path_factory.mktemp("sent"))
    config = make_config(KEYS[:4])
    made.genesis.write_text(dump(config))
    scratch = tmp_path_factory.mktemp("scratch")
    imported = import_model(write_model(made.model), ShardStore(scratch / "store"), MIB)
    manifest = imported.manifest
    call = msgspec.structs.replace(
        register(),
        total_size=manifest.total_size,
        shard_size=manifest.shard_size,
        shard_count=len(manifest.shards),
        shard_hashes=manifest.shard_hashes,
        manifest_hash=imported.manifest_hash,
    )
    with open_chain(scratch / "ledger", config) as chain:
        network = Network(chain)
        network.add(KEYS[4])
        network.grow(call)
        network.grow(join(), announce(), sender=OPERATOR)
        network.grow(GrantTier(STRANGER.address, "pro", UNTIL))
        for question, shows in QUESTIONS.items():
            made.proof(question).write_bytes(prover.prove(chain.store, chain.tip.number, shows).encode())
    return made


def test_a_process_without_a_node_checks_everything(files: Files, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "proof", "check", files.proof("model"), files.model, "--genesis", files.genesis],
        cwd=folder,
        env={"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{MODEL} version 1 was registered: manifest 0x" in done.stdout
    assert f"admin 0x{ADMIN.address.hex()}, transaction 0x" in done.stdout
    assert done.stdout.count("final by 4 of 5 authorities\n") == 2
    assert sum(f"0x{key.address.hex()}" in done.stdout for key in KEYS[:5]) == 4
    assert "the authorities changed in block 1, as shown" in done.stdout
    assert "registered and not retired in block 4, 0x" in done.stdout
    assert "whether it was retired after block 4" in done.stdout
    assert "shards and the manifest have the SHA-256 that was registered" in done.stdout
    assert not [*home.rglob("*"), *folder.rglob("*")], "it leaves something behind"


def test_json_tells_the_same(files: Files) -> None:
    told = files.check("model", files.model, "--json").json
    assert told["event"]["name"] == "ModelRegistered"
    assert told["event"]["fields"]["model_id"] == MODEL
    assert told["sender"] == told["event"]["fields"]["admin"] == f"0x{ADMIN.address.hex()}"
    assert (told["block"]["number"], told["block"]["authority_count"], len(told["block"]["signers"])) == (2, 5, 4)
    assert told["standing"]["number"] == 4
    assert told["authorities_changed_in"] == [1]
    assert WEIGHTS in told["artifact"]["files"]


def test_tier_and_shard_are_told(files: Files) -> None:
    tier = files.check("tier").out
    assert f"0x{STRANGER.address.hex()} was granted pro until 2024-03-" in tier
    assert "whether it was revoked or replaced after block 4" in tier
    shard = files.check("shard").out
    assert f"node {NODE} announced shards 0, 1, 2 of {MODEL} version 1" in shard
    assert f"the node's operator 0x{OPERATOR.address.hex()}" in shard
    assert "whether it was withdrawn, or the node left, after block 3; whether the node has the bytes" in shard
    assert "still so" not in shard
    told = files.check("shard", "--json").json
    assert told["standing"] is None
    assert told["artifact"] is None


def test_one_flipped_byte_of_the_artifact(files: Files, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(files.model, copy)
    assert files.check("model", copy).status == 0
    flip(copy / WEIGHTS, 3 * MIB + 17)
    files.check("model", copy).refused("shard 3 of", "registered is 0x", WEIGHTS)
    files.check("model", copy, "--json").refused("shard 3 of")
    assert files.check("model").status == 0, "without the directory only the proof is looked at"


def test_artifact_goes_with_a_model(files: Files, tmp_path: Path) -> None:
    files.check("tier", files.model).refused("the proof is of TierGranted", "proof of a model")
    files.check("model", tmp_path).refused("no config.json")
    files.check("model", tmp_path / "nowhere").refused("nowhere")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut, "not a proof"),
        (lambda data: b"", "not a proof"),
        (lambda data: b"[" * 1_000_000, "not a proof"),
        (lambda data: b'{"way":' * 100_000, "not a proof"),
        (lambda data: data.replace(b" ", b""), "written anew"),
        (lambda data: data.replace(b'"0x', b'"0X'), "not a proof"),
        (lambda data: data + bytes(PROOF_BYTES_MAX), "more than"),
    ],
    ids=range(7),
)
def test_files_that_are_no_proof(files: Files, tmp_path: Path, change: Callable[[bytes], bytes], words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(change(files.proof("model").read_bytes()))
    done = aigen("proof", "check", path, files.model, "--genesis", files.genesis)
    done.refused(words, "bad.json")
    assert done.out == ""


def test_what_is_needed_to_check(files: Files, tmp_path: Path) -> None:
    proof = files.proof("model")
    other = tmp_path / "other.toml"
    other.write_text(dump(make_config(KEYS[1:5])))
    aigen("proof", "check", proof, "--genesis", other).refused("of the network with genesis 0x")
    aigen("proof", "check", proof, "--genesis", tmp_path / "none.toml").refused("no genesis file")
    aigen("proof", "check", proof, "--genesis", proof).refused("not TOML")
    aigen("proof", "check", tmp_path / "none.json", "--genesis", files.genesis).refused("no such file")
    aigen("proof", "check", proof).refused("--genesis", status=2)


class Node:
    """Stands for the RPC client."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    def call(self, method: str, /, **params: Any) -> Any:
        assert method == "getProof"
        self.asked.append(params)
        return self.answer


@pytest.mark.parametrize(
    ("words", "asked", "name"),
    [
        (("model", "m", "--version", "2"), {"kind": "model", "model_id": "m", "version": "2"}, "m.proof.json"),
        (("tier", "AB" * 20), {"kind": "tier", "account": "0x" + "ab" * 20}, f"tier-0x{'ab' * 20}.proof.json"),
        (
            ("shard", "m", 3, "12D3"),
            {"kind": "shard", "model_id": "m", "shard_index": 3, "node_id": "12D3"},
            "m-3-12D3.proof.json",
        ),
    ],
)
def test_file_is_written_as_the_prover_made_it_and_over_none(
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    asked: dict[str, Any],
    name: str,
) -> None:
    expected = files.proof("model").read_bytes()
    node = Node(msgspec.json.decode(expected))
    monkeypatch.setattr("node.cli.common.client", lambda *_: node)
    monkeypatch.chdir(tmp_path)
    assert name in aigen("proof", *words).out
    assert node.asked == [asked]
    assert (tmp_path / name).read_bytes() == expected
    aigen("proof", *words).refused("exists", name)
    told = aigen("proof", *words, "--out", tmp_path / "out.json", "--json").json
    assert told["size"] == len(expected)
    aigen("proof", *words, "--out", tmp_path / "no" / "out.json").refused("no such file")


def test_answer_that_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.cli.common.client", lambda *_: Node({"format": "aigen-proof-9"}))
    monkeypatch.chdir(tmp_path)
    aigen("proof", "model", "m").refused("answered with no proof", "aigen-proof-9")
    assert not list(tmp_path.iterdir())
