"""The `aigen` command. Owns nothing but words: each command asks a node over RPC or works on a data directory.

Commands are imported when they are named, so that `aigen --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from contracts.errors import Refused

COMMANDS = {
    "init": ("node.cli.run", "init", "Set up a node: a commented config, the node's identity and the operator's key."),
    "start": ("node.cli.run", "start", "Run the node until SIGTERM or SIGINT."),
    "status": ("node.cli.run", "status", "What this node is doing, step by step."),
    "chat": ("node.cli.chat", "chat", "Ask MODEL_ID one QUESTION, or talk with it line by line when there is none."),
    "model": ("node.cli.model", "model", "Import, register, list, load, make public and retire models."),
    "tier": ("node.cli.tier", "tier", "Grant, revoke and check tiers."),
    "account": ("node.cli.account", "account", "Keys, and who may send to the ledger."),
    "authority": ("node.cli.authority", "authority", "The accounts that make the blocks, and proofs that one lied."),
    "token": (
        "node.cli.account",
        "token",
        "A bearer token, signed offline by an account (EIP-712: chain id, account, expiry).",
    ),
    "node": ("node.cli.network", "node", "The members of the network."),
    "shard": (
        "node.cli.shard",
        "shard",
        "Shards: who holds them, whether they are whole, what others call them, a copy for a web server.",
    ),
    "mirror": ("node.cli.mirror", "mirror", "Web servers and IPFS gateways that serve a model's bytes."),
    "proof": ("node.cli.proof", "proof", "Proofs of what is on the ledger, checked with its genesis file alone."),
    "receipt": (
        "node.cli.receipt",
        "receipt",
        "What a node signed about an answer: which model, who asked, the hashes of prompt and answer.",
    ),
    "ledger": (
        "node.cli.ledger",
        "ledger",
        "The chain in a data directory: check it again from genesis, begin it anew.",
    ),
    "genesis": ("node.cli.genesis", "genesis", "Make and look at genesis files."),
    "demo": (
        "node.cli.demo",
        "demo",
        "The main job on three nodes of this machine: register, replicate, answer, refuse, repair, restart.",
    ),
}
"""Name to module, attribute and help line."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="aigen", prog_name="aigen")
def cli() -> None:
    """AIGEN: models registered on a ledger, shards proved and kept in three copies, answers from every node."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command; what was refused is one line on stderr, with exit status 1, or 2 for a wrong use of it."""
    try:
        status = cli.main(args=arguments, prog_name="aigen", standalone_mode=False)
    except Refused as error:
        _fail(str(error), 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "aigen"
        _fail(f"{error.format_message()} (see `{command} --help`)", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 1)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(line: str, status: int) -> NoReturn:
    click.echo(f"aigen: {' '.join(line.split())}", err=True)
    sys.exit(status)
