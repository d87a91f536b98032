"""What every benchmark ends with: one table on the terminal, the same rows in build/bench/PART.json."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

BUILD = Path(__file__).resolve().parents[2] / "build" / "bench"

RUNS_MIN = 3
"""A median of fewer says nothing."""


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` and `goal` are such that more is better; `ours` and `peer` are for people to read.

    Without a goal the peer is there to be seen.
    """

    what: str
    ours: str
    peer: str
    ratio: float
    goal: float | None
    met: bool | None


def compared(
    what: str,
    unit: str,
    ours: Sequence[float],
    peer_name: str,
    peer: Sequence[float],
    goal: float | None,
    less_is_better: bool = False,
) -> Row:
    """A row from the measurements of both sides, which must have been taken in turns in one run."""
    assert len(ours) >= RUNS_MIN, f"{len(ours)} runs of ours"
    assert len(peer) >= RUNS_MIN, f"{len(peer)} runs of {peer_name}"
    mine, theirs = median(ours), median(peer)
    ratio = theirs / mine if less_is_better else mine / theirs
    met = None if goal is None else ratio >= goal
    return Row(what, f"{mine:,.4g} {unit}", f"{peer_name}: {theirs:,.4g} {unit}", round(ratio, 3), goal, met)


def publish(part: str, rows: Sequence[Row], note: str = "") -> None:
    """Print the table and write the file. The exit status is not touched: a goal missed is a finding, not a fault."""
    BUILD.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"make bench-{part}", caption=note or None)
    for column in ("what", "ours", "the peer"):
        table.add_column(column, overflow="fold")
    for column in ("ratio", "goal", "met"):
        table.add_column(column, justify="right")
    for row in rows:
        goal = ("-", "-") if row.goal is None else (f"{row.goal:.2f}", "yes" if row.met else "no")
        table.add_row(row.what, row.ours, row.peer, f"{row.ratio:.2f}", *goal)
    Console(width=max(120, Console().width)).print(table)
    path = BUILD / f"{part}.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
