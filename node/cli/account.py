"""`aigen account` and `aigen token`: keys on disk, enrolment on the ledger, bearer tokens."""

from __future__ import annotations

import time
from pathlib import Path

import click

from contracts.types import Address
from node.cli import common, signing
from node.cli.signing import Signer


@click.group()
def account() -> None:
    """Keys, and who may send to the ledger."""


@account.command("new")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@common.password_option
@common.json_option
def new(path: Path, password_file: Path | None, as_json: bool) -> None:
    """Make a key and keep it encrypted at PATH."""
    from ledger import keystore
    from ledger.keys import Key

    key = Key.generate()
    keystore.write(path, key, common.read_password(password_file, f"New password for {path}", confirm=True))
    _show_key(path, key.address, as_json)


@account.command("show")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@common.json_option
def show(path: Path, as_json: bool) -> None:
    """The address of the key at PATH."""
    from ledger import keystore

    _show_key(path, keystore.address(path), as_json)


def _show_key(path: Path, address: Address, as_json: bool) -> None:
    if as_json:
        common.show_json({"account": f"0x{address.hex()}", "path": str(path)})
    else:
        click.echo(f"0x{address.hex()}  {path}")


@account.command("info")
@click.argument("address")
@common.rpc_options
@common.json_option
def info(address: str, rpc_url: str, token: str | None, as_json: bool) -> None:
    """What the ledger knows of an account."""
    common.parse_address(address)
    answer = common.client(rpc_url, token).call("getAccount", account=address)
    if as_json:
        common.show_json(answer)
    else:
        common.show_fields((answer | {"tier_until": common.when(answer["tier_until"])}).items())


@account.command("enrol")
@click.argument("addresses", nargs=-1, required=True)
@click.option("--tier", help="Grant this tier at the same time.")
@click.option("--for", "duration", default="1y", show_default=True, help="How long the tier holds: 12h, 30d, 1y.")
@signing.options
def enrol(
    addresses: tuple[str, ...],
    tier: str | None,
    duration: str,
    signer: Signer,
) -> None:
    """Let accounts send transactions (an admin's transaction)."""
    from contracts.calls import EnrolAccounts, GrantTier

    accounts = tuple(Address(common.parse_address(address)) for address in addresses)
    until = int(time.time()) + common.parse_duration_s(duration)
    receipts = [signer.send(EnrolAccounts(accounts))]
    if tier is not None:
        receipts += [signer.send(GrantTier(address, tier, until)) for address in accounts]
    signer.show(receipts, f"enrolled {', '.join(addresses)} in block {receipts[-1]['block_number']}")


@account.command("expel")
@click.argument("address")
@signing.options
def expel(
    address: str,
    signer: Signer,
) -> None:
    """Take an account's right to send (an admin's transaction)."""
    from contracts.calls import ExpelAccount

    receipt = signer.send(ExpelAccount(Address(common.parse_address(address))))
    signer.show(receipt, f"expelled {address} in block {receipt['block_number']}")


@click.command("token")
@click.option(
    "--chain-id", type=int, help="The ledger's chain id. Default: that of the genesis file in the data directory."
)
@click.option("--for", "duration", default="30d", show_default=True, help="How long the token holds: 12h, 30d, 1y.")
@common.key_options
@common.json_option
def token(
    chain_id: int | None,
    duration: str,
    key_path: Path | None,
    data_dir: Path,
    password_file: Path | None,
    as_json: bool,
) -> None:
    """A bearer token, signed offline by an account (EIP-712: chain id, account, expiry)."""
    from node.rpc import token as tokens

    if chain_id is None:
        from genesis import config as genesis_config

        chain_id = genesis_config.load(data_dir / "genesis.toml").network.chain_id
    expiry = int(time.time()) + common.parse_duration_s(duration)
    key = common.open_key(key_path, data_dir, password_file)
    text = tokens.mint(key, chain_id, expiry)
    if as_json:
        common.show_json({"account": f"0x{key.address.hex()}", "chain_id": chain_id, "expiry": expiry, "token": text})
    else:
        click.echo(text)
