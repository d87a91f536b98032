"""What holds for every test."""

import sys
from collections.abc import Iterator

import pytest

from node.startup import RECURSION_LIMIT


@pytest.fixture(autouse=True)
def recursion_limit() -> Iterator[None]:
    """A node's own: importing py_ecc has raised it so far that nested brackets end the process (see node.startup)."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    yield
    sys.setrecursionlimit(before)


LONGEST = ("test_processes.py", "test_ledger_simulation.py", "test_authorities.py", "test_ledger_kill.py")
"""Files that take minutes: begun first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
