"""`aigen tier`: who may use which models."""

from __future__ import annotations

import time

import click

from contracts.types import Address
from node.cli import common, signing
from node.cli.signing import Signer


@click.group()
def tier() -> None:
    """Grant, revoke and check tiers."""


@tier.command("list")
@common.rpc_options
@common.json_option
def list_tiers(rpc_url: str, token: str | None, as_json: bool) -> None:
    """The tiers of this network."""
    tiers = common.client(rpc_url, token).call("getChainInfo")["tiers"]
    if as_json:
        common.show_json(tiers)
    else:
        rows = [
            (
                row["name"],
                row["rank"],
                common.size(row["cache_size"]),
                row["concurrent_answers"] or "any",
                row["tokens_per_minute"] or "any",
            )
            for row in tiers
        ]
        common.show_table(("tier", "rank", "recommended cache", "answers at once", "tokens a minute"), rows)


@tier.command("grant")
@click.argument("address")
@click.argument("name", metavar="TIER")
@click.option("--for", "duration", default="1y", show_default=True, help="How long it holds: 12h, 30d, 1y.")
@signing.options
def grant(
    address: str,
    name: str,
    duration: str,
    signer: Signer,
) -> None:
    """Let an account use models of TIER and below (an admin's transaction)."""
    from contracts.calls import GrantTier

    target = Address(common.parse_address(address))
    until = int(time.time()) + common.parse_duration_s(duration)
    receipt = signer.send(GrantTier(target, name, until))
    signer.show(receipt, f"{address} holds {name} for {duration}, granted in block {receipt['block_number']}")


@tier.command("revoke")
@click.argument("address")
@signing.options
def revoke(
    address: str,
    signer: Signer,
) -> None:
    """Take an account's tier (an admin's transaction)."""
    from contracts.calls import RevokeTier

    receipt = signer.send(RevokeTier(Address(common.parse_address(address))))
    signer.show(receipt, f"{address} holds no tier any more, revoked in block {receipt['block_number']}")


@tier.command("check")
@click.argument("model_id")
@click.option("--account", "address", help="The account to check. Default: the one that asks.")
@click.option("--version", "version", help="Default: the newest.")
@common.rpc_options
@common.json_option
def check(
    model_id: str, address: str | None, version: str | None, rpc_url: str, token: str | None, as_json: bool
) -> None:
    """May an account use a model? The decision is recorded on the ledger. Exit status 1 if not."""
    params = {"model_id": model_id, "version": version, "account": address}
    answer = common.client(rpc_url, token).call("checkTier", **{k: v for k, v in params.items() if v is not None})
    if as_json:
        common.show_json(answer)
    else:
        verdict = "may use" if answer["granted"] else "may not use"
        click.echo(
            f"{answer['account']} {verdict} {answer['model_id']} {answer['version']}: holds "
            f"{answer['held'] or 'no tier'}, {answer['required']} is needed (transaction {answer['transaction_hash']})"
        )
    if not answer["granted"]:
        raise SystemExit(1)
