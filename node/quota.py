"""What an account may ask of this node: its tier's limits, and a place while there is one for others too.

Owns the counts and token buckets of the accounts that ask. A tier's limits are in the genesis file; the node's own
operator has none. Time is the caller's clock. Knows no engine and no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import msgspec

from contracts.errors import BadInput, Busy
from contracts.types import Address
from genesis.schema import CONCURRENT_ANSWERS_DEFAULT, TOKENS_PER_MINUTE_DEFAULT, Tier
from ledger.rate import Rate
from node.inference.spec import Parameters, Prompt

MINUTE_S = 60

BYTES_PER_TOKEN = 4
"""Of a prompt in UTF-8, about. It stands in until the engine has counted: what it is wrong by is taken from the bucket
or given back when the answer ends."""

PLACE_RETRY_S = 1
"""When to come again for what ends nobody knows when: an answer under way."""

LimitName = Literal["concurrent_answers", "tokens_per_minute", "places"]


class Limits(msgspec.Struct, frozen=True):
    """Of one account on one node; 0 is no limit."""

    concurrent_answers: int = CONCURRENT_ANSWERS_DEFAULT
    tokens_per_minute: int = TOKENS_PER_MINUTE_DEFAULT


NO_LIMITS = Limits(0, 0)


def limits_of(tiers: tuple[Tier, ...], name: str) -> Limits:
    """A tier that is not in the genesis file has the defaults."""
    found = (Limits(tier.concurrent_answers, tier.tokens_per_minute) for tier in tiers if tier.name == name)
    return next(found, Limits())


class QuotaStatistics(msgspec.Struct, frozen=True):
    """A frozen picture. `refused` counts by limit, since the node started; `accounts` are remembered."""

    answers: int
    accounts: int
    refused: dict[LimitName, int]


@dataclass
class Use:
    """What an answer has used so far, for whoever makes it to say."""

    tokens: int = 0


class _Account:
    """Its answers now, and its tokens of late."""

    def __init__(self, limits: Limits) -> None:
        self.answers = 0
        self.allow(limits)

    def allow(self, limits: Limits) -> None:
        """With a new bucket, a full one; what is under way still gives back to the one it took from."""
        minute = limits.tokens_per_minute
        self.limits = limits
        self.bucket = Rate(per_s=minute / MINUTE_S, burst=minute) if minute else None

    def is_idle(self, now: float) -> bool:
        """Nothing would be lost by forgetting it."""
        return not self.answers and (self.bucket is None or self.bucket.left(now) >= self.bucket.burst)


class Quota:
    """`tiers` are those of the genesis file, `places` how many answers the node takes at once."""

    def __init__(self, tiers: tuple[Tier, ...], operator: Address, places: int, clock: Callable[[], float]) -> None:
        self._tiers = tiers
        self._operator = operator
        self._places = places
        self._clock = clock
        self._accounts: dict[Address, _Account] = {}
        self._answers = 0
        self._refused: dict[LimitName, int] = dict.fromkeys(get_args(LimitName), 0)
        self._tidied_at = clock()

    def statistics(self) -> QuotaStatistics:
        """A frozen picture."""
        return QuotaStatistics(self._answers, len(self._accounts), dict(self._refused))

    @contextmanager
    def admitted(self, asker: Address, tier: str, prompt: Prompt, parameters: Parameters) -> Iterator[Use]:
        """For as long as an answer waits or is under way. Raises Busy with when to come again, or BadInput for what no
        waiting helps with.

        The most it may use is taken first, so that many at once do not pass the limit together; what it did not use is
        given back in the end, however it ends.
        """
        now = self._clock()
        self._tidy(now)
        account, held = self._account(asker, tier), tier or "none"
        tokens = estimated_tokens(prompt) + parameters.max_tokens
        self._check_size(tokens, parameters.max_tokens, account, held)
        self._check_concurrency(asker, account, held)
        self._check_places(asker, account)
        self._take(asker, account, held, tokens, now)
        self._accounts[asker] = account
        account.answers += 1
        self._answers += 1
        bucket, use = account.bucket, Use()
        try:
            yield use
        finally:
            self._answers -= 1
            account.answers -= 1
            if bucket is not None:
                bucket.give_back(self._clock(), tokens - use.tokens)

    def _account(self, asker: Address, tier: str) -> _Account:
        limits = NO_LIMITS if asker == self._operator else limits_of(self._tiers, tier)
        account = self._accounts.get(asker) or _Account(limits)
        if account.limits != limits:
            account.allow(limits)
        return account

    # Named checks

    def _check_size(self, tokens: int, max_tokens: int, account: _Account, held: str) -> None:
        minute = account.limits.tokens_per_minute
        if minute and tokens > minute:
            raise BadInput(
                f"this asks for up to {tokens} tokens (prompt about {tokens - max_tokens}, max_tokens {max_tokens}), "
                f"more than the {minute} a minute that tier {held} allows: lower max_tokens, or shorten the prompt"
            )

    def _check_concurrency(self, asker: Address, account: _Account, held: str) -> None:
        bound = account.limits.concurrent_answers
        if bound and account.answers >= bound:
            self._refuse(
                "concurrent_answers",
                f"account 0x{asker.hex()} has {account.answers} answers under way or waiting, and tier {held} allows "
                f"{bound} at once: let one end first",
                PLACE_RETRY_S,
            )

    def _check_places(self, asker: Address, account: _Account) -> None:
        """An account has at most as many places as it leaves free, whatever its tier: there is one for others then,
        and an account that is alone has half of all (dynamic thresholds: Choudhury and Hahne, IEEE/ACM ToN 1998)."""
        free = self._places - self._answers
        if account.answers >= free:
            self._refuse(
                "places",
                f"account 0x{asker.hex()} has {account.answers} of the {self._answers} answers under way or waiting; "
                f"{free} of {self._places} places are free, which are kept for others: try again in a moment",
                PLACE_RETRY_S,
            )

    def _take(self, asker: Address, account: _Account, held: str, tokens: int, now: float) -> None:
        bucket = account.bucket
        if bucket is None or bucket.take(now, tokens):
            return
        minute, left = account.limits.tokens_per_minute, int(bucket.left(now))
        after_s = int(bucket.wait_s(now, tokens)) + 1  # not a moment too early
        self._refuse(
            "tokens_per_minute",
            f"account 0x{asker.hex()} asks for up to {tokens} tokens and has {left} left of the {minute} a minute of "
            f"tier {held}: try again in {after_s} s, or set a lower max_tokens",
            after_s,
        )

    def _refuse(self, limit: LimitName, line: str, retry_after_s: int) -> NoReturn:
        self._refused[limit] += 1
        raise Busy(line, retry_after_s)

    def _tidy(self, now: float) -> None:
        """Once a minute: who uses nothing and has its whole limit again is as one who never came."""
        if now - self._tidied_at >= MINUTE_S:
            self._tidied_at = now
            self._accounts = {one: account for one, account in self._accounts.items() if not account.is_idle(now)}


def estimated_tokens(prompt: Prompt) -> int:
    texts = (prompt,) if isinstance(prompt, str) else tuple(message.content for message in prompt)
    return -(-sum(len(text.encode()) for text in texts) // BYTES_PER_TOKEN)
