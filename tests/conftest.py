"""What holds for every test."""

import sys
from collections.abc import Generator, Iterator

import pytest

from node.importing import importing

with importing():
    from node.startup import RECURSION_LIMIT


@pytest.fixture(autouse=True)
def recursion_limit() -> Iterator[None]:
    """A node's own: importing py_ecc has raised it so far that nested brackets end the process (see node.startup)."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    yield
    sys.setrecursionlimit(before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Test modules import nearly everything there is."""
    with importing():
        return (yield)


LONGEST = (
    "test_processes.py",
    "test_ledger_simulation.py",
    "test_authorities.py",
    "test_quality.py",
    "test_processes_ended.py",
    "test_engine.py",
    "test_processes_loading.py",
    "test_lost_holder.py",
    "test_engine_quantised.py",
    "test_ledger_kill.py",
    "test_cli_mirror.py",
    "test_ipfs_processes.py",
    "test_public_nodes.py",
    "test_plain_nodes.py",
)
"""Files that take longest are begun first, in this order: at the end no process is left alone with one. Those with
networks of node processes are mixed with those that keep one CPU busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
