"""`aigen ledger`: the chain in a data directory."""

from __future__ import annotations

from pathlib import Path

import click

from node.cli import common


@click.group()
def ledger() -> None:
    """The chain in a data directory, checked again from genesis."""


@ledger.command("verify")
@common.data_dir_option
@common.json_option
def verify(data_dir: Path, as_json: bool) -> None:
    """Execute every block again and compare state, head, events and receipts. The node must be stopped."""
    from contracts.errors import NotFound
    from genesis import config as genesis_config
    from ledger import audit

    if not (data_dir / "ledger").exists():
        raise NotFound(f"no ledger in {data_dir}: start the node once, or name its --data-dir")
    config = genesis_config.load(data_dir / "genesis.toml")
    with common.progress_bars() as progress:
        task = progress.add_task("executing blocks", total=None)
        found = audit.verify(
            data_dir / "ledger", config, lambda done, total: progress.update(task, completed=done, total=total)
        )
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
