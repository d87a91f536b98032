"""An account that sends calls to the contracts through a ledger in this process, one after the other."""

from __future__ import annotations

import trio

from contracts.calls import Call
from contracts.errors import NotAllowed
from contracts.types import Address, TransactionHash
from ledger.answers import Receipt
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.transactions import CALL_GAS, sign


class Wallet:
    """Takes nonces in order. Whoever else sends with the same key at the same time may get Conflict, or cause it."""

    def __init__(self, key: Key, ledger: Ledger) -> None:
        self._key = key
        self._ledger = ledger
        self._sending = trio.Lock()
        self._waiting: dict[Call, TransactionHash] = {}

    @property
    def address(self) -> Address:
        return self._key.address

    async def send(self, call: Call) -> Receipt:
        """Sign and submit `call`, and wait until it is final. Raises NotAllowed with the contract's reason when it is
        refused, and what Ledger.submit raises. The same call again while it still waits, after its sender gave up, is
        waited for and not sent a second time."""
        async with self._sending:
            waiting = self._waiting.get(call)
            if waiting is None or not self._ledger.is_pending(waiting):
                nonce = self._ledger.account(self._key.address).next_nonce
                raw = sign(self._key, self._ledger.chain_id, nonce, call.to, call.encode(), CALL_GAS)
                waiting = await self._ledger.submit(raw)
            self._waiting = {other: sent for other, sent in self._waiting.items() if self._ledger.is_pending(sent)} | {
                call: waiting
            }
        receipt = await self._ledger.wait_receipt(waiting)
        if receipt.transaction.reason is not None:
            raise NotAllowed(f"{type(call).__name__} was refused by the contract: {receipt.transaction.reason}")
        return receipt
