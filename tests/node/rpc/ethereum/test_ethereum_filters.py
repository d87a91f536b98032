"""Filters: what is new since the last question, each log once, none lost; few, and forgotten when idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from contracts.addresses import ADDRESSES
from contracts.errors import NotFound
from ledger.history import Criteria
from node.rpc.filters import Filters
from node.rpc.following import Cursor, Threads
from node.rpc.limits import RpcLimits
from tests.ledger.world import address, enrol, open_ledger, register

from . import shapes
from .served import serving

MODELS = f"0x{ADDRESSES['Models'].hex()}"


def numbers(logs: list[dict[str, Any]]) -> list[int]:
    return [int(log["blockNumber"], 16) for log in logs]


async def test_changes_of_a_log_filter(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register("before"))
        name = await served.ask("eth_newFilter", {"fromBlock": "0x0", "address": MODELS})
        assert shapes.QUANTITY(name)
        assert await served.ask("eth_getFilterChanges", name) == []
        await served.send(register("a"))
        await served.send(enrol(address(1)))
        await served.send(register("b"))
        changes = await served.ask("eth_getFilterChanges", name)
        assert numbers(changes) == [2, 4]
        assert all(shapes.LOG(log) for log in changes)
        assert await served.ask("eth_getFilterChanges", name) == []
        assert numbers(await served.ask("eth_getFilterLogs", name)) == [1, 2, 4]
        assert await served.ask("eth_uninstallFilter", name) is True
        assert await served.ask("eth_uninstallFilter", name) is False
        error = await served.refusal("eth_getFilterChanges", name)
        assert error["code"] == -32001
        assert error["message"].startswith("filter not found")


async def test_changes_of_a_block_filter(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        name = await served.ask("eth_newBlockFilter")
        for model in ("a", "b"):
            await served.send(register(model))
        expected = [(await served.ask("eth_getBlockByNumber", number, False))["hash"] for number in ("0x1", "0x2")]
        assert await served.ask("eth_getFilterChanges", name) == expected
        assert await served.ask("eth_getFilterChanges", name) == []
        assert "has no logs" in (await served.refusal("eth_getFilterLogs", name))["message"]


async def test_a_filter_keeps_to_its_range(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        name = await served.ask("eth_newFilter", {"fromBlock": "0x2", "toBlock": "0x3"})
        for model in ("a", "b", "c", "d"):
            await served.send(register(model))
        assert numbers(await served.ask("eth_getFilterChanges", name)) == [2, 3]
        assert await served.ask("eth_getFilterChanges", name) == []


@pytest.mark.parametrize("limits", [RpcLimits(log_results=2), RpcLimits(log_blocks=2)])
async def test_changes_that_are_too_many_for_one_answer_come_with_the_next(tmp_path: Path, limits: RpcLimits) -> None:
    async with serving(tmp_path, limits=limits) as served:
        name = await served.ask("eth_newFilter", {})
        for model in ("a", "b", "c", "d", "e"):
            await served.send(register(model))
        answers = [numbers(await served.ask("eth_getFilterChanges", name)) for _ in range(4)]
    assert answers == [[1, 2], [3, 4], [5], []]


async def test_two_who_ask_at_once_do_not_get_the_same(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        filters = Filters(served.ledger, Threads(8), RpcLimits())
        name = filters.add(Cursor(Criteria(), 1), None)
        for model in ("a", "b", "c"):
            await served.send(register(model))
        found: list[int] = []

        async def ask() -> None:
            found.extend(numbers(await filters.changes(name)))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask)
    assert found == [1, 2, 3]


async def test_filters_are_few(tmp_path: Path) -> None:
    async with serving(tmp_path, limits=RpcLimits(filters=2)) as served:
        names = [await served.ask("eth_newFilter", {}), await served.ask("eth_newBlockFilter")]
        error = await served.refusal("eth_newFilter", {})
        assert error["code"] == -32008
        assert "2 filters are kept already" in error["message"]
        assert len(set(names)) == 2
        await served.ask("eth_uninstallFilter", names[0])
        await served.ask("eth_newFilter", {})


async def test_a_filter_nobody_asks_for_is_forgotten(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    with open_ledger(tmp_path / "ledger") as ledger:
        filters = Filters(ledger, Threads(1), RpcLimits(filters=2, filter_idle_s=300))
        asked_for = filters.add(Cursor(None, 1), None)
        idle = filters.add(Cursor(Criteria(), 1), None)
        mock_clock.jump(200)
        assert await filters.changes(asked_for) == []
        mock_clock.jump(200)
        filters.add(Cursor(None, 1), None)  # there is room again
        with pytest.raises(NotFound, match="nobody asked for it for 300 s"):
            filters.get(idle)
        assert filters.get(asked_for)
        assert filters.remove(asked_for)
