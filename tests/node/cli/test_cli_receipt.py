"""`aigen receipt`: on a machine without a node, what it holds a receipt against, what it refuses, each in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contracts.calls import GrantTier
from contracts.types import Address, TransactionHash
from genesis.config import dump
from ledger import prover
from node.inference.spec import Completion, Message, Parameters, Usage
from node.network.identity import NodeIdentity
from node.receipts import Receipt, Receipts
from tests.ledger.proofs import KEYS, QUESTIONS, UNTIL, Network
from tests.ledger.world import MODEL, OPERATOR, STRANGER, VERSION, announce, join, make_config, open_chain, register
from tests.node.cli.test_cli_proof import ALONE
from tests.node.cluster import Done, aigen
from tests.node.rpc.fake import NOW, FakeNode
from tests.node.rpc.wire import Served, serving

US, OTHERS = (NodeIdentity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)) for seed in (1, 2))
QUESTION = (Message("system", "Be brief."), Message("user", "Wie heißt Paris?"))
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wie heißt Paris?"}]
ANSWER = "Paris heißt\nParis."


@dataclass(frozen=True)
class Files:
    """What somebody was sent: a receipt, the genesis file, proofs."""

    path: Path
    receipt: Receipt

    @property
    def genesis(self) -> Path:
        return self.path / "genesis.toml"

    @property
    def file(self) -> Path:
        return self.path / "receipt.json"

    def write(self, name: str, content: Any) -> Path:
        path = self.path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def proof(self, question: str) -> Path:
        return self.path / f"{question}.proof.json"

    def check(self, *words: object) -> Done:
        return aigen("receipt", "check", self.file, *words)


def write_receipt(receipts: Receipts, **more: Any) -> Receipt:
    given = {
        "account": STRANGER.address,
        "model_id": MODEL,
        "version": VERSION,
        "manifest_hash": register().manifest_hash,
        "precision": "bf16",
        "check": (TransactionHash(b"\x0c" * 32), 3),
        "prompt": QUESTION,
        "parameters": Parameters(seed=5),
        "done": Completion(ANSWER, "stop", Usage(9, 5)),
    }
    return receipts.write("ab" * 16, **{**given, **more})


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Of a network on which our node announced what it has, and whose admin granted the account a tier."""
    path = tmp_path_factory.mktemp("sent")
    config = make_config(KEYS[:1])
    (path / "genesis.toml").write_text(dump(config))
    with open_chain(tmp_path_factory.mktemp("ledger"), config) as chain:
        grown = Network(chain)
        grown.grow(register())
        grown.grow(join(US.node_id), announce(node_id=US.node_id), sender=OPERATOR)
        grown.grow(GrantTier(STRANGER.address, "pro", UNTIL))
        receipt = write_receipt(Receipts(US, chain.chain_id, chain.genesis_hash, clock=lambda: NOW))
        made = Files(path, receipt)
        for question, shows in QUESTIONS.items():
            made.proof(question).write_bytes(prover.prove(chain.store, chain.tip.number, shows).encode())
    return made


@pytest.fixture
def files(network: Files) -> Files:
    network.file.write_bytes(msgspec.json.encode(network.receipt))
    return network


def test_a_process_without_a_node_checks_everything(files: Files, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    words = ["--prompt", files.write("prompt.json", MESSAGES), "--answer", files.write("answer.txt", ANSWER)]
    words += ["--genesis", files.genesis, "--node-id", US.node_id]
    words += [word for question in QUESTIONS for word in ("--proof", files.proof(question))]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "receipt", "check", files.file, *words],
        cwd=folder,
        env={"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"node {US.node_id}" in done.stdout
    assert f"{MODEL} version {VERSION} in bf16, manifest 0x{register().manifest_hash.hex()}" in done.stdout
    assert "block 3, transaction 0x0c0c" in done.stdout
    assert f", that of {files.path}/prompt.json" in done.stdout
    assert f", that of {files.path}/answer.txt" in done.stdout
    assert "seed 5" in done.stdout
    assert f"an admin registered {MODEL} version 1 with that manifest, block 1" in done.stdout
    assert "the account was granted pro until 2024-03-" in done.stdout
    assert f"the signer is a node of the network: it announced shards of {MODEL}, block 2" in done.stdout
    assert (
        done.stdout.splitlines()[-1].split("  ")[-1].strip()
        == "whether that model gave the answer: it is the node's word"
    )
    assert not [*home.rglob("*"), *folder.rglob("*")], "it leaves something behind"


def test_it_says_what_is_not_shown_and_where_to_get_it(files: Files) -> None:
    out = files.check().out
    assert f"(`aigen proof model {MODEL}`)" in out
    assert "(`aigen node list`, `aigen proof shard`)" in out
    assert "that of" not in out


def test_json_tells_the_same(files: Files) -> None:
    answer = files.write("answer.txt", ANSWER)
    told = files.check("--answer", answer, "--genesis", files.genesis, "--proof", files.proof("model"), "--json").json
    assert told["receipt"] == msgspec.to_builtins(files.receipt)
    assert told["matches"] == {"prompt": None, "answer": str(answer), "genesis": str(files.genesis)}
    assert len(told["proven"]) == 1
    assert len(told["not_shown"]) == 2


@pytest.mark.parametrize(
    "form",
    [
        lambda receipt: json.dumps(msgspec.to_builtins(receipt), indent=2),
        lambda receipt: receipt.header(),
        lambda receipt: f"x-aigen-receipt: {receipt.header()}\r\n",
    ],
    ids=["JSON", "header", "line"],
)
def test_both_forms_on_standard_input(files: Files, form: Callable[[Receipt], str]) -> None:
    done = aigen("receipt", "check", "-", typed=form(files.receipt))
    assert done.out == files.check().out


# Prompt and answer


@pytest.mark.parametrize(
    "content",
    [
        MESSAGES,
        {"model": MODEL, "messages": MESSAGES, "seed": 5},
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wie heißt "}, {"type": "text", "text": "Paris?"}]},
        ],
    ],
    ids=["messages", "request", "OpenAI's"],
)
def test_a_conversation_as_it_was_sent(files: Files, content: Any) -> None:
    assert files.check("--prompt", files.write("prompt.json", content)).status == 0


@pytest.mark.parametrize("content", ["def f(", "def f(\n", {"model": MODEL, "prompt": "def f("}, '"def f("'])
def test_a_plain_text(files: Files, content: Any) -> None:
    receipt = write_receipt(Receipts(US, 1, b"\x0e" * 32), prompt="def f(")
    files.file.write_bytes(msgspec.json.encode(receipt))
    assert files.check("--prompt", files.write("prompt.txt", content)).status == 0


@pytest.mark.parametrize(
    "content", [[*MESSAGES, MESSAGES[1]], [{}], "Wie heißt Paris?", "", [1], {"messages": 1}, "[" * 100_000]
)
def test_another_prompt(files: Files, content: Any) -> None:
    line = files.check("--prompt", files.write("prompt.json", content)).refused("prompt.json is not the prompt")
    assert files.receipt.prompt_hash in line


def test_the_answer(files: Files) -> None:
    for text in (ANSWER, ANSWER + "\n"):
        assert files.check("--answer", files.write("answer.txt", text)).status == 0
    for text in (ANSWER + "\n\n", ANSWER[:-1], ""):
        files.check("--answer", files.write("answer.txt", text)).refused(
            "answer.txt is not the answer of this receipt", files.receipt.answer_hash
        )
    (files.path / "answer.txt").write_bytes(b"\xff")
    files.check("--answer", files.path / "answer.txt").refused("no text in UTF-8")
    files.check("--answer", files.path / "nowhere").refused("no such file")


# What it refuses


@pytest.mark.parametrize("name", [name for name in Receipt.__struct_fields__ if name not in {"format", "parameters"}])
def test_a_changed_receipt(files: Files, name: str) -> None:
    plain = msgspec.to_builtins(files.receipt)
    before = plain[name]
    plain[name] = before + 1 if isinstance(before, int) else before[:-1] + ("1" if before[-1] != "1" else "2")
    files.file.write_text(json.dumps(plain))
    done = files.check()
    done.refused("receipt.json: ")
    assert done.out == ""


@pytest.mark.parametrize("text", ["", "{}", "[" * 1_000, "x", "x" * 20_000])
def test_what_is_no_receipt(files: Files, text: str) -> None:
    files.write("receipt.json", text)
    files.check().refused("receipt.json")
    aigen("receipt", "check", "-", typed=text).refused("-: ")


def test_another_signer(files: Files) -> None:
    files.check("--node-id", OTHERS.node_id).refused(f"node {US.node_id} signed the receipt, not {OTHERS.node_id}")


def test_another_network(files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(dump(make_config(KEYS[1:2])))
    files.check("--genesis", other).refused("the receipt is of the network with genesis 0x", "other.toml is of 0x")
    files.check("--proof", files.proof("model")).refused("name it with --genesis")


@pytest.mark.parametrize(
    ("question", "more", "words"),
    [
        ("model", {"manifest_hash": b"\x08" * 32}, "the receipt is of tiny-llama version 1 with manifest 0x0808"),
        ("model", {"version": "2"}, "the receipt is of tiny-llama version 2"),
        ("tier", {"account": Address(b"\xbb" * 20)}, "the receipt is of account 0xbbbb"),
    ],
)
def test_a_proof_of_something_else(files: Files, question: str, more: dict[str, Any], words: str) -> None:
    genesis_hash, chain_id = bytes.fromhex(files.receipt.genesis_hash[2:]), files.receipt.chain_id
    files.file.write_bytes(msgspec.json.encode(write_receipt(Receipts(US, chain_id, genesis_hash), **more)))
    proof = files.proof(question)
    files.check("--genesis", files.genesis, "--proof", proof).refused(words, proof.name)


def test_a_proof_of_another_node(files: Files) -> None:
    genesis_hash, chain_id = bytes.fromhex(files.receipt.genesis_hash[2:]), files.receipt.chain_id
    files.file.write_bytes(msgspec.json.encode(write_receipt(Receipts(OTHERS, chain_id, genesis_hash))))
    files.check("--genesis", files.genesis, "--proof", files.proof("shard")).refused(f"signed by {OTHERS.node_id}")


# From the node


async def typed(served: Served, *words: object, text: str | None = None) -> Done:
    """A command that asks the node."""
    return await trio.to_thread.run_sync(partial(aigen, *words, "--rpc", served.url, typed=text))


async def test_chat_names_the_receipt_and_get_fetches_it() -> None:
    async with serving() as served:
        chat = await typed(served, "chat", "mistral-7b", "one two", "--receipt")
        assert chat.out == "one two\n"
        receipt_id = chat.err.splitlines()[-1].removeprefix("receipt ")
        whole = (await typed(served, "chat", "mistral-7b", "one two", "--json")).json
        got = await typed(served, "receipt", "get", receipt_id, "--json")
        shown = await typed(served, "receipt", "get", receipt_id)
        (await typed(served, "receipt", "get", "nothing")).refused("no receipt 'nothing' of yours here")
    assert got.json["receipt_id"] == receipt_id != whole["receipt"]["receipt_id"]
    assert aigen("receipt", "check", "-", typed=got.out).out.startswith(shown.out.rstrip())


async def test_a_node_without_receipts() -> None:
    node = FakeNode()
    node.written = None
    async with serving(node) as served:
        assert "no receipt" in (await typed(served, "chat", "mistral-7b", "one", "--receipt")).err
        assert "receipt" not in (await typed(served, "chat", "mistral-7b", "one", "--json")).json
        (await typed(served, "receipt", "get", "x")).refused("inference.receipts is false")


class BadNode(FakeNode):
    """Answers with what a test sets, whatever it is asked for."""

    bad: Receipt

    def answer_receipt(self, receipt_id: str) -> Receipt | None:
        return self.bad


async def test_a_node_that_gives_a_bad_receipt() -> None:
    node = BadNode()
    receipt = write_receipt(Receipts(US, 1, b"\x0e" * 32))
    async with serving(node) as served:
        node.bad = msgspec.structs.replace(receipt, precision="fp32")
        (await typed(served, "receipt", "get", receipt.receipt_id)).refused("does not hold", "is not what node")
        node.bad = receipt
        (await typed(served, "receipt", "get", "another")).refused("does not hold", "another was asked for")
