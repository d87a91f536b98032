"""Several tasks as one: the first failure is the failure of all."""

from collections.abc import Awaitable, Callable

import trio

from contracts.errors import Refused


async def first_failure(*parts: Callable[[], Awaitable[None]]) -> None:
    """Run side by side; the first that is refused ends the others, and its own error is raised, not a group of them."""
    failures: list[Refused] = []

    async def run(part: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await part()
        except Refused as error:
            failures.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for part in parts:
            nursery.start_soon(run, part, nursery.cancel_scope)
    if failures:
        raise failures[0]
