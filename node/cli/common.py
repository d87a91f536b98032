"""What the commands share: options, passwords, tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from contracts.errors import BadInput
from node import config as settings

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

    from ledger.keys import Key
    from node.rpc.client import RpcClient

F = TypeVar("F", bound=Callable[..., Any])

RPC_URL_DEFAULT = "http://127.0.0.1:9944"
RPC_TIMEOUT_S = 60.0
PASSWORD_BYTES_MAX = 4096
PIPE_WIDTH = 1000


def data_dir_option(function: F) -> F:
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="AIGEN_DATA_DIR",
        default=settings.default_data_dir,
        show_default="the user's data directory",
        help="Where the node keeps everything.",
    )(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def password_option(function: F) -> F:
    return click.option(
        "--password-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="File whose first line is the key's password (else AIGEN_PASSWORD, else a prompt).",
    )(function)


def rpc_options(function: F) -> F:
    """The node to ask, and as whom."""
    function = click.option(
        "--rpc", "rpc_url", envvar="AIGEN_RPC", default=RPC_URL_DEFAULT, show_default=True, help="The node to ask."
    )(function)
    return click.option(
        "--token", envvar="AIGEN_TOKEN", help="Bearer token of the account that asks (see `aigen token`)."
    )(function)


def key_options(function: F) -> F:
    """The account that signs."""
    function = password_option(function)
    return click.option(
        "--key",
        "key_path",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="AIGEN_KEY",
        help="Keystore of the account that signs. Default: the operator's key in the data directory.",
    )(data_dir_option(function))


def read_password(path: Path | None, prompt: str, confirm: bool = False) -> str:
    """From a file, AIGEN_PASSWORD or the terminal, in this order."""
    if path is not None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"the password file {path} cannot be read: {error.strerror}") from error
        if len(data) > PASSWORD_BYTES_MAX:
            raise BadInput(f"{path} has {len(data)} bytes, a password has at most {PASSWORD_BYTES_MAX}")
        return data.decode(errors="replace").split("\n", 1)[0]
    if (password := os.environ.get("AIGEN_PASSWORD")) is not None:
        return password
    if not sys.stdin.isatty():
        raise BadInput("no password: set AIGEN_PASSWORD, give --password-file, or run this on a terminal")
    return str(click.prompt(prompt, hide_input=True, confirmation_prompt=confirm, err=True))


def operator_key_path(data_dir: Path) -> Path:
    return data_dir / "keys" / "operator.json"


def open_key(key_path: Path | None, data_dir: Path, password_file: Path | None) -> Key:
    """Decrypt the account that signs."""
    from ledger import keystore

    path = key_path if key_path is not None else operator_key_path(data_dir)
    keystore.address(path)
    return keystore.read(path, read_password(password_file, f"Password of {path}"))


def client(rpc_url: str, token: str | None, timeout_s: float | None = RPC_TIMEOUT_S) -> RpcClient:
    """Closed with the command. `timeout_s` None waits for as long as the node works on the answer."""
    from node.rpc.client import RpcClient

    made = RpcClient(rpc_url, token, timeout_s=timeout_s)
    click.get_current_context().call_on_close(made.close)
    return made


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Bars on stderr while something runs; nothing at all when that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def show_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows under bold headings; on a pipe, where there is no width, nothing is cut or folded."""
    _print_grid(rows, columns)


def show_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Names and values, a line each."""
    _print_grid(fields, ("", ""), heading=False)


def _print_grid(rows: Iterable[Sequence[object]], columns: Sequence[str], heading: bool = True) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, show_header=heading)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _plain(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return "-" if cell is None or cell == "" else str(cell)


def when(seconds: int | None) -> str | None:
    """A time on the ledger, in the local zone."""
    from datetime import datetime

    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):  # past the last year a calendar has
        return "without end"


def size(count: int | float) -> str:
    """Bytes for people, in powers of 1000 as disks and models are sold."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def progress(state: dict[str, Any]) -> str:
    """`1.2 GB of 4.3 GB, 80.1 MB/s, 39 s left`, of anything with bytes, a rate and a time."""
    parts = [f"{size(state['bytes_done'])} of {size(state['bytes_total'])}"]
    if state["rate"]:
        parts += [f"{size(state['rate'])}/s", f"{state['time_left_s']} s left"]
    return ", ".join(parts)


def short(hexadecimal: str) -> str:
    """The beginning and end of a hash or address."""
    return hexadecimal if len(hexadecimal) <= 14 else f"{hexadecimal[:8]}..{hexadecimal[-4:]}"


def parse_address(text: str) -> bytes:
    """An account's 20 bytes from 0x-hex. Raises BadInput."""
    try:
        value = bytes.fromhex(text.removeprefix("0x"))
    except ValueError as error:
        raise BadInput(f"{text!r} is no account: 0x and 40 hexadecimal digits are expected") from error
    if len(value) != 20:
        raise BadInput(f"{text!r} is no account: it has {len(value)} bytes, an address has 20")
    return value


UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "y": 31_536_000}


def parse_duration_s(text: str) -> int:
    """Seconds from `90s`, `15m`, `12h`, `30d` or `1y`. Raises BadInput."""
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS_S or not number.isdecimal() or not int(number):
        raise BadInput(f"{text!r} is no duration: a number and one of s, m, h, d, y, such as 30d")
    return int(number) * UNITS_S[unit]
