"""A node's RPC over a real ledger that seals, on a real socket; and the plain questions of the tests to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from contracts.calls import Call
from contracts.types import TransactionHash
from ledger.keys import Key
from ledger.ledger import Ledger, Receipt
from node.config import RpcSettings
from node.rpc.limits import RpcLimits
from node.rpc.server import RpcServer
from tests.ledger.world import ADMIN, AUTHORITY, open_ledger, quick_clock, raw_call
from tests.node.rpc.fake import NOW, FakeNode
from tests.node.rpc.wire import DEADLINE_S, post

CONTRACTS = json.loads((Path(__file__).parents[4] / "contracts" / "artifacts.json").read_text())["contracts"]
MODELS_ABI: list[dict[str, Any]] = CONTRACTS["Models"]["abi"]


@dataclass(frozen=True)
class Served:
    server: RpcServer
    ledger: Ledger
    host: str
    port: int
    nursery: trio.Nursery

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def seal(self) -> None:
        """Begin to make blocks."""
        self.nursery.start_soon(self.ledger.seal, AUTHORITY)

    async def answer(self, method: str, *params: Any) -> dict[str, Any]:
        """The whole response to one call."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        reply = await post(self, body)  # type: ignore[arg-type]
        assert reply.status == 200, reply
        content: dict[str, Any] = reply.json
        return content

    async def ask(self, method: str, *params: Any) -> Any:
        content = await self.answer(method, *params)
        assert "result" in content, content
        return content["result"]

    async def refusal(self, method: str, *params: Any) -> dict[str, Any]:
        error: dict[str, Any] = (await self.answer(method, *params))["error"]
        assert "\n" not in error["message"]
        return error

    async def send(self, call: Call, key: Key = ADMIN) -> Receipt:
        """Make a call final, past the RPC."""
        nonce = self.ledger.account(key.address).next_nonce
        return await self.ledger.wait_receipt(await self.ledger.submit(raw_call(key, nonce, call)))

    async def submit(self, call: Call, key: Key = ADMIN) -> TransactionHash:
        return await self.ledger.submit(raw_call(key, self.ledger.account(key.address).next_nonce, call))


@asynccontextmanager
async def serving(
    path: Path,
    settings: RpcSettings | None = None,
    limits: RpcLimits | None = None,
    *,
    sealing: bool = True,
    deadline_s: float = DEADLINE_S,
    clock: Callable[[], float] = lambda: NOW,
    node: FakeNode | None = None,
) -> AsyncIterator[Served]:
    """A running server over a new ledger; cancelled and gone afterwards."""
    with open_ledger(path / "ledger", clock=quick_clock) as ledger, trio.fail_after(deadline_s):
        server = RpcServer(node or FakeNode(), settings or RpcSettings(port=0), limits, ledger=ledger, clock=clock)
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(server.serve)
            served = Served(server, ledger, "127.0.0.1", int(urls[0].rpartition(":")[2]), nursery)
            if sealing:
                served.seal()
            yield served
            nursery.cancel_scope.cancel()
