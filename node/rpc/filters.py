"""Filters: what a client that polls has not seen yet. Kept in memory, few, and forgotten when nobody asks for them.

Their names are random, so that a client cannot take the changes meant for another. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import trio

from contracts.errors import Busy, NotFound
from ledger.ledger import Ledger
from node.rpc import following
from node.rpc.ethereum_encoding import quantity
from node.rpc.ethereum_params import LogFilter
from node.rpc.following import Cursor, Threads
from node.rpc.limits import RpcLimits
from node.rpc.params import shown

NAME_BITS = 128


@dataclass
class Filter:
    """`asked` is None for one of blocks."""

    cursor: Cursor
    asked: LogFilter | None
    used_at: float
    one_at_a_time: trio.Lock = field(default_factory=trio.Lock)


class Filters:
    def __init__(self, ledger: Ledger, threads: Threads, limits: RpcLimits) -> None:
        self._ledger = ledger
        self._threads = threads
        self._limits = limits
        self._filters: dict[str, Filter] = {}

    def add(self, cursor: Cursor, asked: LogFilter | None) -> str:
        """The name of a new filter. Raises Busy when there are too many."""
        self._forget_idle()
        if len(self._filters) >= self._limits.filters:
            raise Busy(
                f"{self._limits.filters} filters are kept already: uninstall some, or wait until they have been idle "
                f"for {self._limits.filter_idle_s:g} s"
            )
        name = random_name()
        self._filters[name] = Filter(cursor, asked, trio.current_time())
        return name

    def get(self, name: str) -> Filter:
        """Raises NotFound for one that never was, was uninstalled or forgotten."""
        self._forget_idle()
        found = self._filters.get(name)
        if found is None:
            raise NotFound(
                f"filter not found: {shown(name)} was uninstalled, or nobody asked for it for "
                f"{self._limits.filter_idle_s:g} s"
            )
        found.used_at = trio.current_time()
        return found

    def remove(self, name: str) -> bool:
        self._forget_idle()
        return self._filters.pop(name, None) is not None

    async def changes(self, name: str) -> list[Any]:
        """What came since the last question."""
        found = self.get(name)
        async with found.one_at_a_time:  # two questions at once must not get the same logs
            history, cursor, head = self._ledger.history, found.cursor, self._ledger.head.number
            look = following.new_hashes if cursor.criteria is None else following.new_logs
            items, cursor.next_block = await self._threads.run(look, history, cursor, head, self._limits)
            return items

    def _forget_idle(self) -> None:
        oldest = trio.current_time() - self._limits.filter_idle_s
        self._filters = {name: kept for name, kept in self._filters.items() if kept.used_at >= oldest}


def random_name() -> str:
    """A quantity nobody guesses."""
    return quantity(secrets.randbits(NAME_BITS) | 1 << (NAME_BITS - 1))
