"""`aigen authority`: who makes the blocks, and the proofs that one of them lied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from contracts.errors import BadInput, NotFound
from contracts.types import Address, EvidenceHash
from node.cli import common, signing
from node.cli.signing import Signer

EVIDENCE_FILE_BYTES_MAX = 16_384


@click.group()
def authority() -> None:
    """The accounts that make the blocks, and proofs that one lied."""


@authority.command("list")
@common.rpc_options
@common.json_option
def list_authorities(rpc_url: str, token: str | None, as_json: bool) -> None:
    """Every authority, and whoever was seen to contradict itself."""
    rows = common.client(rpc_url, token).call("listAuthorities")
    if as_json:
        common.show_json(rows)
        return
    common.show_table(
        ("account", "in force", "evidence against it"),
        [(row["account"], row["in_force"], row["evidence_hash"]) for row in rows],
    )


@authority.command("add")
@click.argument("address")
@signing.options
def add(
    address: str,
    signer: Signer,
) -> None:
    """Let an account propose blocks and vote (an admin's transaction)."""
    from contracts.calls import AddAuthority

    receipt = signer.send(AddAuthority(Address(common.parse_address(address))))
    signer.show(receipt, f"{address} is an authority after block {receipt['block_number']}")


@authority.command("remove")
@click.argument("address")
@click.option("--cite", is_flag=True, help="Cite the proof this node has that it contradicted itself.")
@signing.options
def remove(
    address: str,
    cite: bool,
    signer: Signer,
) -> None:
    """Take an account's vote (an admin's transaction)."""
    from contracts.calls import RemoveAuthority

    target = Address(common.parse_address(address))
    evidence = bytes.fromhex(_evidence(signer.rpc, address)["evidence_hash"].removeprefix("0x")) if cite else bytes(32)
    receipt = signer.send(RemoveAuthority(target, EvidenceHash(evidence)))
    signer.show(receipt, f"{address} is no authority after block {receipt['block_number']}")


@authority.command("evidence")
@click.argument("address")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
@common.rpc_options
@common.json_option
def evidence(address: str, out: Path, rpc_url: str, token: str | None, as_json: bool) -> None:
    """Write the proof that an authority contradicted itself to a file that anyone can check."""
    from contracts.errors import Conflict
    from node.storage.files import explained

    found = _evidence(common.client(rpc_url, token), address)
    try:
        with explained("writing", out), out.open("x") as file:
            file.write(found["evidence"] + "\n")
    except FileExistsError as error:
        raise Conflict(f"{out} exists: it is not overwritten; choose another name") from error
    if as_json:
        common.show_json(found)
    else:
        click.echo(f"evidence {found['evidence_hash']} against {found['account']} is in {out}")


@authority.command("check")
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@common.json_option
def check(path: Path, as_json: bool) -> None:
    """Who is shown by a file of evidence to have contradicted itself. Offline; exit status 1 when nobody is."""
    from ledger.votes import decode_evidence, liar

    with path.open("rb") as file:
        text = file.read(EVIDENCE_FILE_BYTES_MAX).strip()
    try:
        proof = decode_evidence(bytes.fromhex(text.decode("ascii").removeprefix("0x")))
    except ValueError as error:
        raise BadInput(f"{path} is no evidence: 0x and hexadecimal digits are expected") from error
    fields: dict[str, Any] = {
        "account": f"0x{liar(proof).hex()}",
        "evidence_hash": f"0x{proof.hash.hex()}",
        "epoch": f"0x{proof.epoch.hex()}",
    }
    if as_json:
        common.show_json(fields)
    else:
        common.show_fields(fields.items())


def _evidence(rpc: Any, address: str) -> dict[str, Any]:
    wanted = f"0x{bytes(common.parse_address(address)).hex()}"
    rows: list[dict[str, Any]] = rpc.call("listAuthorities")
    found = next((row for row in rows if row["account"] == wanted and row["evidence"]), None)
    if found is None:
        raise NotFound(f"this node has no evidence against {wanted}: `aigen authority list` shows what it has")
    return found
