"""`aigen genesis`: the file all nodes of a network agree on before block 1."""

from __future__ import annotations

import time
from pathlib import Path

import click

from contracts.types import Address
from node.cli import common


@click.group()
def genesis() -> None:
    """Make and look at genesis files."""


@genesis.command("new")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--template", default="dev", show_default=True, help="A ready-made network (dev, aigen) to begin from.")
@click.option("--name", help="The network's name. Default: the template's.")
@click.option("--chain-id", type=int, help="Default: the template's.")
@click.option("--shard-size", type=int, help="Bytes of a shard, a multiple of 1 MiB. Default: the template's.")
@click.option("--admin", "admins", multiple=True, required=True, help="Address of an admin; may be repeated.")
@click.option("--authority", "authorities", multiple=True, required=True, help="Who makes blocks; may be repeated.")
@click.option("--account", "accounts", multiple=True, help="ADDRESS or ADDRESS=TIER to enrol; may be repeated.")
@common.json_option
def new(
    path: Path,
    template: str,
    name: str | None,
    chain_id: int | None,
    shard_size: int | None,
    admins: tuple[str, ...],
    authorities: tuple[str, ...],
    accounts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a genesis file to PATH."""
    from contracts.errors import Conflict
    from genesis.config import Account
    from genesis.new import new_genesis
    from genesis.toml import dump
    from node.storage.files import explained

    enrolled = []
    for text in accounts:
        address, _, tier = text.partition("=")
        enrolled.append(Account(Address(common.parse_address(address)), tier or None))
    config = new_genesis(
        template,
        admins=[Address(common.parse_address(admin)) for admin in admins],
        authorities=[Address(common.parse_address(authority)) for authority in authorities],
        timestamp=int(time.time()),
        accounts=enrolled,
        name=name,
        chain_id=chain_id,
        shard_size=shard_size,
    )
    text = dump(config)
    try:
        with explained("writing", path), path.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise Conflict(f"{path} exists: a genesis file is never overwritten; choose another name") from error
    _show(path, as_json)


@genesis.command("show")
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@common.json_option
def show(path: Path, as_json: bool) -> None:
    """The hash of a genesis file, and what it sets."""
    _show(path, as_json)


def _show(path: Path, as_json: bool) -> None:
    from genesis import block, config

    loaded = config.load(path)
    built = block.build(loaded)
    fields = {
        "name": loaded.network.name,
        "chain_id": loaded.network.chain_id,
        "genesis_hash": f"0x{built.hash.hex()}",
        "shard_size": loaded.shards.size,
        "redundancy": loaded.shards.redundancy,
        "lease_s": loaded.shards.lease_s,
        "tiers": [tier.name for tier in loaded.tiers],
        "catalogue": [entry.model_id for entry in loaded.catalogue],
    }
    if as_json:
        common.show_json(fields)
    else:
        common.show_fields(
            (key, ", ".join(value) if isinstance(value, list) else value) for key, value in fields.items()
        )
