"""The subscriptions of one WebSocket connection: new heads and logs, told as they become final.

A subscription is opened by its call and begins once the answer to that call is sent, with the block after the head at
the time of the call: no notification comes before the client knows its name, and none is missed. Knows no socket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from contracts.errors import Busy
from ledger.history import Criteria
from ledger.ledger import Ledger
from node.rpc import following
from node.rpc.filters import random_name
from node.rpc.following import Cursor, Threads
from node.rpc.limits import RpcLimits

NOTIFICATION = "eth_subscription"

Tell = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Sends a notification: method and params. Waits while the client reads slowly."""


@dataclass(frozen=True)
class Subscription:
    name: str
    cursor: Cursor


class Subscriptions:
    def __init__(self, ledger: Ledger, threads: Threads, limits: RpcLimits) -> None:
        self._ledger = ledger
        self._threads = threads
        self._limits = limits
        self._all: dict[str, Subscription] = {}
        self._begun: dict[str, Subscription] = {}
        self._idle = trio.CancelScope()

    def open(self, criteria: Criteria | None) -> Subscription:
        """A subscription to new heads (no criteria) or logs. Raises Busy when the connection has too many."""
        if len(self._all) >= self._limits.subscriptions:
            raise Busy(
                f"this connection has {self._limits.subscriptions} subscriptions already: unsubscribe from some, or "
                "open another connection"
            )
        opened = Subscription(random_name(), Cursor(criteria, self._ledger.head.number + 1))
        self._all[opened.name] = opened
        return opened

    def begin(self, opened: Subscription) -> None:
        """The client knows its name: tell what is new, unless it has unsubscribed meanwhile."""
        if opened.name in self._all:
            self._begun[opened.name] = opened
            self._idle.cancel()

    def close(self, name: str) -> bool:
        self._begun.pop(name, None)
        return self._all.pop(name, None) is not None

    async def run(self, tell: Tell) -> None:
        """Tell what is new, for as long as the connection lasts."""
        while True:
            for subscription in tuple(self._begun.values()):
                await self._catch_up(subscription, tell)
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        """Until there is a block that some subscription has not seen, or another one begins."""
        with trio.CancelScope() as self._idle:
            if self._begun:
                await self._ledger.wait_head(min(begun.cursor.next_block for begun in self._begun.values()) - 1)
            else:
                await trio.sleep_forever()

    async def _catch_up(self, subscription: Subscription, tell: Tell) -> None:
        history, cursor = self._ledger.history, subscription.cursor
        while cursor.next_block <= (head := self._ledger.head.number):
            if cursor.criteria is None:
                items, reached = await self._threads.run(following.new_heads, history, cursor, head)
            else:
                items, reached = await self._threads.run(following.new_logs, history, cursor, head, self._limits)
            for item in items:
                if subscription.name not in self._begun:
                    return
                await tell(NOTIFICATION, {"subscription": subscription.name, "result": item})
            cursor.next_block = reached
