"""Whose answer is next: what waits, account by account, each with the service it has had.

Owns the virtual times: an account's grows by the tokens that are worked on for it over its weight, and who has had the
least is next, in its own order of arrival. So accounts that always have something waiting get tokens as their weights
are to one another, whatever they send, and nobody waits for ever (start-time fair queueing: Goyal, Vin and Cheng,
SIGCOMM 1996; with tokens known only as they come, the virtual token counter: Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024). Knows no models and no clock: what waits is the caller's.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Account(Generic[T]):
    weight: int
    virtual_time: float = 0.0
    under_way: int = 0
    waiting: deque[tuple[int, T]] = field(default_factory=deque)
    """With the number of its arrival."""

    @property
    def turn(self) -> tuple[float, int]:
        """The least is next; of two that have had the same, who came first."""
        return self.virtual_time, self.waiting[0][0]


class FairQueue(Generic[T]):
    """What was put waits; what was taken is under way until it is `done`. Only accounts with something here are known,
    and those that had more than another that still waits."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account[T]] = {}
        self._arrivals = itertools.count()
        self._next: _Account[T] | None = None
        self._taken_at = 0.0
        """The virtual time of the account that was last chosen."""

    def __len__(self) -> int:
        return sum(len(account.waiting) for account in self._accounts.values())

    def put(self, name: str, weight: int, item: T) -> None:
        """Behind what the account has waiting. `weight` is how much of the whole it gets beside others."""
        assert weight > 0, f"a weight of {weight}"
        account = self._accounts.setdefault(name, _Account(weight))
        account.weight = weight
        if not account.waiting:
            # Who waited for nothing is not owed for it: it begins where the others are.
            account.virtual_time = max(account.virtual_time, self._least(self._taken_at))
        account.waiting.append((next(self._arrivals), item))

    def first(self) -> T | None:
        """What is next. It stays the same until it is taken or removed, whoever comes meanwhile: what needs much room
        is waited for, not passed by until it never gets it."""
        if self._next is None:
            waiting = [account for account in self._accounts.values() if account.waiting]
            if not waiting:
                return None
            self._next = min(waiting, key=lambda account: account.turn)
            self._taken_at = self._next.virtual_time
        return self._next.waiting[0][1]

    def take(self) -> T:
        """What is next, from now on under way."""
        item = self.first()
        assert item is not None, "nothing waits"
        assert self._next is not None
        self._next.waiting.popleft()
        self._next.under_way += 1
        self._next = None
        self._forget()
        return item

    def remove(self, is_meant: Callable[[T], bool]) -> list[T]:
        """What waits and is meant leaves, in the order it came."""
        chosen = None if self._next is None else self._next.waiting[0]
        removed = []
        for account in self._accounts.values():
            removed += [entry for entry in account.waiting if is_meant(entry[1])]
            account.waiting = deque(entry for entry in account.waiting if not is_meant(entry[1]))
        if chosen in removed:
            self._next = None
        self._forget()
        return [item for _, item in sorted(removed, key=lambda entry: entry[0])]

    def charge(self, name: str, tokens: int) -> None:
        """So many tokens are worked on for an account that has something under way."""
        account = self._accounts[name]
        account.virtual_time += tokens / account.weight

    def had(self, name: str) -> float:
        """The virtual time of an account with something here: of two, the lesser has had less."""
        return self._accounts[name].virtual_time

    def done(self, name: str) -> None:
        """Something of the account's is no longer under way."""
        self._accounts[name].under_way -= 1
        self._forget()

    def _least(self, otherwise: float) -> float:
        """Of those that wait."""
        return min((one.virtual_time for one in self._accounts.values() if one.waiting), default=otherwise)

    def _forget(self) -> None:
        """Who has nothing here and is not ahead of anybody who waits: it would begin anew just there."""
        least = self._least(float("inf"))
        gone = [
            name
            for name, account in self._accounts.items()
            if not account.waiting and not account.under_way and account.virtual_time <= least
        ]
        for name in gone:
            del self._accounts[name]
