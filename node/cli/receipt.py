"""`aigen receipt`: the receipts that answers carry, fetched from the node that gave them and checked without any."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from contracts.errors import BadInput, BadPeer
from node.cli import common

if TYPE_CHECKING:
    from ledger.proof import Proven
    from node.receipts import Receipt

TEXT_BYTES_MAX = 16 << 20
"""Of a file with a prompt or an answer; the longest prompt a node takes fits, with room for escapes."""

file_type = click.Path(path_type=Path, dir_okay=False)


@click.group()
def receipt() -> None:
    """What a node signed about an answer: which model, who asked, the hashes of prompt and answer."""


@receipt.command("get")
@click.argument("receipt_id")
@common.rpc_options
@common.json_option
def get(receipt_id: str, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Fetch a receipt from the node that gave the answer, by its id, once the answer has ended."""
    import msgspec

    from node import receipts

    answer = common.client(rpc_url, token).call("getReceipt", receipt_id=receipt_id)
    try:
        found = receipts.decode(msgspec.json.encode(answer))
        if found.receipt_id != receipt_id:
            raise BadInput(f"it is {found.receipt_id}, {receipt_id} was asked for")
    except BadInput as error:
        raise BadPeer(f"{rpc_url} answered with a receipt that does not hold: {error}") from error
    if as_json:
        common.show_json(answer)
    else:
        common.show_fields(_lines(found))


@receipt.command("check")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option("--prompt", type=file_type, help="The prompt: a text, the messages in JSON, or the request with them.")
@click.option("--answer", type=file_type, help="The text of the answer.")
@click.option("--node-id", help="The node that should have signed it.")
@click.option("--genesis", "genesis_path", type=file_type, help="The genesis file of the network it should be of.")
@click.option(
    "--proof",
    "proof_paths",
    type=file_type,
    multiple=True,
    help="A file of `aigen proof` to hold against it: of the model, the account's tier, a shard the node announced.",
)
@common.json_option
def check(
    file: Path,
    prompt: Path | None,
    answer: Path | None,
    node_id: str | None,
    genesis_path: Path | None,
    proof_paths: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check a receipt without a node; FILE has it as JSON or as it stands in the header, `-` is the standard input.

    Exit status 0 only if everything holds.
    """
    from node import receipts

    data = _read(file, receipts.RECEIPT_BYTES_MAX)
    try:
        found = receipts.decode(data)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    if node_id not in {None, found.node_id}:
        raise BadInput(f"node {found.node_id} signed the receipt, not {node_id}: it is of another node's answer")
    if prompt is not None:
        _check_hash(prompt, "prompt", _prompt_hashes(prompt), found.prompt_hash)
    if answer is not None:
        _check_hash(answer, "answer", [receipts.answer_hash(text) for text in _texts(answer)], found.answer_hash)
    proven = _check_proofs(found, genesis_path, proof_paths)
    not_shown = _not_shown(found, proven)
    if as_json:
        told = {"prompt": prompt, "answer": answer, "genesis": genesis_path}
        files = {name: None if path is None else str(path) for name, path in told.items()}
        shown = [_says(found, one) for one in proven]
        common.show_json({"receipt": _object(found), "matches": files, "proven": shown, "not_shown": not_shown})
        return
    lines = _lines(found, prompt, answer)
    if genesis_path is not None:
        lines.append(("network", f"the one of {genesis_path}"))
    lines += [("proven", _says(found, one)) for one in proven]
    common.show_fields([*lines, ("not shown", "; ".join(not_shown))])


def _read(path: Path, bytes_max: int) -> bytes:
    from node.storage.files import read_file

    # One more than allowed: the reader of it says what is too much.
    if path != Path("-"):
        return read_file(path, bytes_max)
    try:
        return sys.stdin.read(bytes_max + 1).encode()
    except UnicodeDecodeError as error:
        raise BadInput(f"what comes in is no text in UTF-8: {error.reason}") from error


def _texts(path: Path) -> list[str]:
    """What the file says; the line break at its end may be the editor's."""
    try:
        text = _read(path, TEXT_BYTES_MAX).decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    return [text, text.removesuffix("\n")]


def _prompt_hashes(path: Path) -> list[str]:
    """Of everything that the file may stand for."""
    import msgspec

    from node import receipts
    from node.inference.spec import Message

    texts = _texts(path)
    found = [receipts.prompt_hash(text) for text in texts]
    try:
        sent = msgspec.json.decode(texts[0])
        if isinstance(sent, dict):
            sent = sent.get("messages", sent.get("prompt"))
        if isinstance(sent, list):
            sent = msgspec.convert([_turn(turn) for turn in sent], tuple[Message, ...])
        if isinstance(sent, str | tuple):
            found.append(receipts.prompt_hash(sent))
    except (msgspec.MsgspecError, RecursionError):
        pass  # then it is a text and no more
    return found


def _turn(turn: Any) -> Any:
    """A message as the model is asked with it, from one as OpenAI's clients may send it."""
    if not isinstance(turn, dict):
        return turn
    role, content = turn.get("role"), turn.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {"role": "system" if role == "developer" else role, "content": content}


def _check_hash(path: Path, what: str, found: list[str], expected: str) -> None:
    if expected not in found:
        raise BadInput(
            f"{path} is not the {what} of this receipt: its SHA-256 is {found[-1]}, the receipt's {expected}"
        )


def _check_proofs(found: Receipt, genesis_path: Path | None, paths: tuple[Path, ...]) -> list[Proven]:
    """What the files prove, all of it about what the receipt names."""
    if genesis_path is None:
        if paths:
            raise BadInput("a proof is checked with the network's genesis file: name it with --genesis")
        return []
    from genesis import block, config
    from ledger import proof as proofs
    from node.storage.files import read_file

    loaded = config.load(genesis_path)
    genesis = block.build(loaded)
    if (found.genesis_hash, found.chain_id) != (f"0x{genesis.hash.hex()}", loaded.network.chain_id):
        raise BadInput(
            f"the receipt is of the network with genesis {found.genesis_hash} and chain id {found.chain_id}, "
            f"{genesis_path} is of 0x{genesis.hash.hex()} and {loaded.network.chain_id}"
        )
    proven = []
    for path in paths:
        try:
            one = proofs.check(read_file(path, proofs.PROOF_BYTES_MAX), genesis, loaded.network.chain_id)
            _says(found, one)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        proven.append(one)
    return proven


def _says(found: Receipt, proven: Proven) -> str:
    """What a proof says of the receipt. Raises BadInput when it is about something else."""
    from contracts.events import ModelRegistered, ShardsAnnounced, TierGranted

    event, number = proven.event, proven.block.number
    match event:
        case ModelRegistered():
            registered = (event.model_id, event.version, f"0x{event.manifest_hash.hex()}")
            if registered != (found.model_id, found.version, found.manifest_hash):
                model_id, version, manifest = registered
                raise BadInput(
                    f"registered is {model_id} version {version} with manifest {manifest}, the receipt is of "
                    f"{found.model_id} version {found.version} with manifest {found.manifest_hash}"
                )
            return f"an admin registered {event.model_id} version {event.version} with that manifest, block {number}"
        case TierGranted():
            if f"0x{event.account.hex()}" != found.account:
                raise BadInput(f"0x{event.account.hex()} was granted a tier, the receipt is of account {found.account}")
            return f"the account was granted {event.tier} until {common.when(event.until)}, block {number}"
        case ShardsAnnounced():
            if event.node_id != found.node_id:
                raise BadInput(f"node {event.node_id} announced a shard, the receipt is signed by {found.node_id}")
            return f"the signer is a node of the network: it announced shards of {event.model_id}, block {number}"
    raise AssertionError(f"no proof is about {type(event).__name__}")


def _not_shown(found: Receipt, proven: list[Proven]) -> list[str]:
    """Where the receipt ends, and how to go on."""
    from contracts.events import ModelRegistered, ShardsAnnounced

    kinds = {type(one.event) for one in proven}
    lines = ["whether that model gave the answer: it is the node's word"]
    if ModelRegistered not in kinds:
        lines.append(f"whether that manifest is the registered one (`aigen proof model {found.model_id}`)")
    if ShardsAnnounced not in kinds:
        lines.append("whether the signer is a node of the network (`aigen node list`, `aigen proof shard`)")
    return lines


def _object(found: Receipt) -> dict[str, Any]:
    import msgspec

    told: dict[str, Any] = msgspec.to_builtins(found)
    return told


def _lines(found: Receipt, prompt: Path | None = None, answer: Path | None = None) -> list[tuple[str, object]]:
    parameters = ", ".join(f"{name} {value}" for name, value in sorted(found.parameters.items()))
    return [
        ("receipt", found.receipt_id),
        ("signed by", f"node {found.node_id}"),
        ("ledger", f"chain id {found.chain_id}, genesis {found.genesis_hash}"),
        ("model", f"{found.model_id} version {found.version} in {found.precision}, manifest {found.manifest_hash}"),
        ("account", found.account),
        ("tier check", f"block {found.check_block_number}, transaction {found.check_transaction_hash}"),
        ("prompt", found.prompt_hash if prompt is None else f"{found.prompt_hash}, that of {prompt}"),
        ("answer", found.answer_hash if answer is None else f"{found.answer_hash}, that of {answer}"),
        ("parameters", parameters),
        ("tokens", f"{found.prompt_tokens} and {found.completion_tokens}, ended by {found.finish_reason}"),
        ("time", common.when(found.time)),
    ]
