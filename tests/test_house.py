"""The rules of the house that no single room can keep: directions of imports, a fast command, the packages in use."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from node.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
ROOMS = ("contracts", "genesis", "ledger", "node")

HEAVY = ("torch", "transformers", "eth", "libp2p", "trio", "httpx", "rich")
"""What `aigen --help` must not import."""

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

STANDS_ON = {
    "eth": "ledger",
    "eth_abi": "contracts",
    "eth_hash": "ledger",
    "eth_keys": "ledger",
    "eth_keyfile": "ledger",
    "eth_account": "ledger",
    "plyvel": "ledger",
    "rlp": "ledger",
    "trio": "node",
    "zstandard": "node",
    "immutables": "node",
    "jsonrpcserver": "node",
    "cryptography": "node",
    "torch": "node",
    "transformers": "node",
    "gguf": "node",
    "libp2p": "node",
    "hypercorn": "node",
    "starlette": "node",
    "httpx": "node",
    "msgspec": "node",
    "click": "node",
    "rich": "node",
    "platformdirs": "node",
    "psutil": "node",
    "vyper": "contracts",
}
"""Packages the product stands on, and a room that has to import each."""

NO_DATA = {
    "aigen start": "runs until it is stopped",
    "aigen demo": "tells a story and ends with a table",
}
"""Commands without --json: they print no data."""


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The top-level packages a module imports, anywhere in it."""
    found = set()
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Import):
            found |= {name.name.split(".")[0] for name in part.names}
        elif isinstance(part, ast.ImportFrom) and part.module:
            found.add(part.module.split(".")[0])
    return found


def commands() -> dict[str, click.Command]:
    """Every command, groups too, by what is typed."""
    found: dict[str, click.Command] = {"aigen": cli}

    def walk(prefix: str, group: click.Group) -> None:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            found[f"{prefix} {name}"] = command
            if isinstance(command, click.Group):
                walk(f"{prefix} {name}", command)

    walk("aigen", cli)
    return found


def test_imports_point_downwards_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom node.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout.splitlines()[-1]
    assert "Run the node until SIGTERM or SIGINT." in done.stdout


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help(name: str) -> None:
    command = commands()[name]
    done = CliRunner().invoke(cli, [*name.split()[1:], "--help"])
    assert done.exit_code == 0, done.output
    assert command.help, name
    undocumented = [
        parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not (parameter.help or parameter.show_default)
    ]
    assert not undocumented, f"{name}: options that say nothing of themselves: {undocumented}"


def test_the_list_of_commands_says_what_each_command_says() -> None:
    for name, (_, _, line) in COMMANDS.items():
        assert line == commands()[f"aigen {name}"].get_short_help_str(200), name


def test_every_command_that_prints_data_has_json() -> None:
    for name, command in commands().items():
        if isinstance(command, click.Group) or name in NO_DATA:
            continue
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, f"{name} has no --json"


@pytest.mark.parametrize("package", sorted(STANDS_ON))
def test_the_product_runs_on_the_packages_it_stands_on(package: str) -> None:
    assert importlib.util.find_spec(package) is not None
    room = STANDS_ON[package]
    users = [path for path in modules() if path.relative_to(ROOT).parts[0] == room and package in imports(path)]
    assert users, f"nothing in {room}/ imports {package}"


def test_signatures_run_on_coincurve() -> None:
    """eth_keys falls back to pure Python, 7 to 15 times slower, when coincurve is not there."""
    from eth_keys.backends import CoinCurveECCBackend, get_backend

    assert isinstance(get_backend(), CoinCurveECCBackend)


def test_modules_and_functions_stay_readable() -> None:
    for path in modules():
        text = path.read_text()
        lines = len(text.splitlines())
        assert lines <= MODULE_LINES_MAX, f"{path.relative_to(ROOT)} has {lines} lines"
        for part in ast.walk(ast.parse(text)):
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                assert part.end_lineno is not None
                length = part.end_lineno - part.lineno + 1
                assert length <= FUNCTION_LINES_MAX, f"{path.relative_to(ROOT)}: {part.name} has {length} lines"
        assert ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)} does not say what it owns"
