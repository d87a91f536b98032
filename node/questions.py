"""A question and its answer: may the account ask, is the model loaded, what does the engine say; and its receipt.

Tiers are decided on the ledger, once for many questions of an account to a model; how much an account may ask at once
is `quota`'s to say. Knows no HTTP and no JSON.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from contracts.calls import CheckTier
from contracts.errors import BadInput, Busy, Refused
from contracts.events import TierChecked
from contracts.types import Address, ModelId, TransactionHash, Version
from ledger.ledger import Ledger
from node.inference.engine import Engine
from node.inference.spec import Completion, Parameters, Prompt
from node.loading import PROGRESS_INTERVAL_S, Loading, engine_key
from node.quota import Quota, Use, estimated_tokens
from node.receipts import Receipts
from node.registry import Model
from node.replay import Replay
from node.replication import Replication
from node.rpc.port import Emit
from node.rpc.values import Answered, ChatChunk, TierCheck

CHECK_TIMEOUT_S = 30.0
"""How long a tier check may take to become final before its asker is told to come again."""

LOADS_MAX = 3
"""Loads for one question, when what was loaded is evicted again before the answer begins."""


class Questions:
    """Of all accounts to this node."""

    def __init__(
        self,
        replay: Replay,
        replication: Replication,
        loading: Loading,
        engine: Engine,
        ledger: Ledger,
        quota: Quota,
        receipts: Receipts | None,
    ) -> None:
        """Without `receipts`, answers carry none."""
        self.quota = quota
        self._replay = replay
        self._replication = replication
        self._loading = loading
        self._engine = engine
        self._ledger = ledger
        self._receipts = receipts
        self._checking: dict[tuple[Address, ModelId, Version], tuple[trio.Lock, int]] = {}

    async def check_tier(self, account: Address, model_id: ModelId, version: Version) -> TierCheck:
        """Many may ask at once for one account and model: the first makes the transaction, the others read it."""
        async with self._alone((account, model_id, version)):
            check = self._replay.state.tiers.standing_check(account, model_id, version, time.time())
            if check is not None:
                return TierCheck(
                    account,
                    model_id,
                    version,
                    check.held or None,
                    check.required,
                    check.granted,
                    check.until,
                    check.transaction_hash,
                    self._block_of(check.transaction_hash),
                )
            return await self._check_on_ledger(account, model_id, version)

    async def _check_on_ledger(self, account: Address, model_id: ModelId, version: Version) -> TierCheck:
        with trio.move_on_after(CHECK_TIMEOUT_S) as scope:
            receipt = await self._replication.send(CheckTier(account, model_id, version))
            await self._replay.wait_change(receipt.block_number - 1)
        if scope.cancelled_caught:
            raise Busy(
                f"the tier check of 0x{account.hex()} for {model_id} is in no block after {CHECK_TIMEOUT_S:.0f} s: "
                "ask again; is the authority's node running and reachable?"
            )
        event = next(event for event in receipt.transaction.events if isinstance(event, TierChecked))
        return TierCheck(
            account,
            model_id,
            version,
            event.held or None,
            event.required,
            event.granted,
            event.until,
            TransactionHash(receipt.transaction.hash),
            receipt.block_number,
        )

    def _block_of(self, transaction_hash: TransactionHash) -> int:
        """Of a transaction whose events were folded: it is in a final block."""
        found = self._ledger.receipt(transaction_hash)
        assert found is not None
        return found.block_number

    @asynccontextmanager
    async def _alone(self, key: tuple[Address, ModelId, Version]) -> AsyncIterator[None]:
        """One task at a time for each check; a lock is forgotten with its last user."""
        lock, users = self._checking.get(key, (trio.Lock(), 0))
        self._checking[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            users = self._checking.pop(key)[1] - 1
            if users:
                self._checking[key] = (lock, users)

    async def answer(
        self,
        check: TierCheck,
        model: Model,
        prompt: Prompt,
        parameters: Parameters,
        emit: Emit | None,
        receipt_id: str,
    ) -> Answered:
        """As `NodePort.chat`."""
        assert check.granted
        with self.quota.admitted(check.account, check.held or "", prompt, parameters) as use:
            for _ in range(LOADS_MAX):
                if self._loading.is_loaded(model):
                    break
                await self._load_with_progress(model, emit)
            # No await between that look and the engine's own: a model that is loaded now is so when the answer begins.
            precision = self._loading.precision(model)
            done = await self._complete(check, model, prompt, parameters, emit, use)
        if self._receipts is None:
            return Answered(done, None)
        assert precision is not None
        receipt = self._receipts.write(
            receipt_id,
            account=check.account,
            model_id=model.model_id,
            version=model.version,
            manifest_hash=model.manifest_hash,
            precision=precision,
            check=(check.transaction_hash, check.block_number),
            prompt=prompt,
            parameters=parameters,
            done=done,
        )
        return Answered(done, receipt)

    async def _complete(
        self, check: TierCheck, model: Model, prompt: Prompt, parameters: Parameters, emit: Emit | None, use: Use
    ) -> Completion:
        """What was used is told also when it fails or is cancelled."""
        name, weight = check.account.hex(), self._replay.state.tiers.weight(check.held or "")
        async with self._engine.generate(engine_key(model), prompt, parameters, name, weight) as answer:
            chunks = []
            try:
                async for chunk in answer:
                    chunks.append(chunk)
                    if emit is not None and (chunk.text or chunk.tokens):
                        await emit(ChatChunk(chunk.text, chunk.tokens))
            except BadInput:
                use.tokens = estimated_tokens(prompt)  # it was read to see that
                raise
            finally:
                use.tokens = max(use.tokens, answer.tokens)
        return Completion.of(chunks)

    async def _load_with_progress(self, model: Model, emit: Emit | None) -> None:
        """Wait for a load, telling the asker how far it is. Raises why it failed."""
        if emit is None:
            await self._loading.wait(model)
            return
        failure: Refused | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_progress, model, emit)
            try:
                await self._loading.wait(model)
            except Refused as error:  # a nursery would wrap it in a group, which the RPC does not know
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _tell_progress(self, model: Model, emit: Emit) -> None:
        while True:
            await emit(self._loading.state(model))
            await trio.sleep(PROGRESS_INTERVAL_S)
