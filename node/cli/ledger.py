"""`aigen ledger`: the chain in a data directory."""

from __future__ import annotations

from pathlib import Path

import click

from node.cli import common

UNKNOWN_VOTES = (
    "; which those are cannot be read, so among several authorities it waits until an admin removes it from them "
    "and adds it again"
)


@click.group()
def ledger() -> None:
    """The chain in a data directory: check it again from genesis, begin it anew."""


@ledger.command("verify")
@common.data_dir_option
@common.json_option
def verify(data_dir: Path, as_json: bool) -> None:
    """Execute every block again and compare state, head, events and receipts. The node must be stopped."""
    from genesis import config as genesis_config
    from genesis.block import build
    from ledger import audit
    from node.replay import check_snapshot

    path = _ledger_of(data_dir)
    config = genesis_config.load(data_dir / "genesis.toml")
    with common.progress_bars() as progress:
        task = progress.add_task("executing blocks", total=None)
        found = audit.verify(path, config, lambda done, total: progress.update(task, completed=done, total=total))
    check_snapshot(path, build(config).hash)
    if as_json:
        common.show_json(
            {
                "blocks": found.blocks,
                "transactions": found.transactions,
                "head_hash": f"0x{found.head_hash.hex()}",
                "state_root": f"0x{found.state_root.hex()}",
            }
        )
    else:
        click.echo(
            f"{found.blocks} blocks with {found.transactions} transactions executed again: state root "
            f"0x{found.state_root.hex()} and head 0x{found.head_hash.hex()} are what the ledger holds"
        )


@ledger.command("resync")
@click.option(
    "--past",
    type=click.IntRange(min=0),
    help="For an authority whose ledger cannot be read: the newest block that other nodes have, from `aigen status`.",
)
@common.data_dir_option
@common.json_option
def resync(past: int | None, data_dir: Path, as_json: bool) -> None:
    """Set the ledger aside under a dated name; the next start takes the chain from the peers. Deletes nothing."""
    from datetime import datetime

    from contracts.errors import NotAllowed
    from genesis import config as genesis_config
    from ledger import keystore
    from ledger import resync as resyncing
    from node.storage.files import DirectoryLock

    path = _ledger_of(data_dir)
    config = genesis_config.load(data_dir / "genesis.toml")
    operator = keystore.address(common.operator_key_path(data_dir))
    with DirectoryLock(data_dir):
        known = resyncing.look(path, config)
        lost = None
        if operator in known.authorities:
            lost = known.votes if past is None else resyncing.LostVotes(past)
            if lost is None:
                raise NotAllowed(
                    f"this node's operator 0x{operator.hex()} is an authority and its ledger cannot be read: say with "
                    "--past which block is the newest that other nodes have (`aigen status` there), so that it does "
                    "not vote again on what it voted on before"
                )
        aside = resyncing.set_aside(path, datetime.now(), lost)
    if as_json:
        common.show_json({"set_aside": str(aside), "waits_for_block": lost.number if lost else None})
        return
    click.echo(f"the ledger is now {aside}; the next `aigen start` takes the chain from the peers")
    if lost is not None:
        click.echo(
            f"WARNING: this node's operator 0x{operator.hex()} is an authority, and its votes went with that folder. "
            f"It does not vote before the chain from its peers is past block {lost.number} and those votes"
            f"{'' if lost.iteration is not None else UNKNOWN_VOTES}. If no other node has the chain, rename the folder "
            "back: a chain begun anew would contradict what this authority signed.",
            err=True,
        )


def _ledger_of(data_dir: Path) -> Path:
    """Raises NotFound when no node was ever started there."""
    from contracts.errors import NotFound

    if not (data_dir / "ledger").exists():
        raise NotFound(f"no ledger in {data_dir}: start the node once, or name its --data-dir")
    return data_dir / "ledger"
