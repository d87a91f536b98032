"""Ethereum's JSON-RPC methods over the ledger, so that wallets and libraries made for Ethereum work unchanged.

Names, params and answers are those of the execution-apis specification (https://github.com/ethereum/execution-apis).
Every block here is final: `latest`, `safe` and `finalized` are the head. `pending` is the head looked at from within a
block made now, and for eth_getTransactionCount it counts the account's transactions in the pool. There is no coin, so
every price is 0. All of it is the public ledger, open to anyone; a signed transaction says itself who sends it.

Reads of final blocks and calls run in worker threads. Knows no HTTP.
"""

from __future__ import annotations

import platform
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Any, TypeVar

from jsonrpcserver import Error, Success

from contracts.errors import BadInput, NotFound, Refused, Reverted
from contracts.types import Address, TransactionHash
from ledger.history import Criteria
from ledger.ledger import Ledger
from ledger.view import CallRequest, View
from node.network.sync import SyncStatistics
from node.rpc import ethereum_encoding as encoding
from node.rpc import ethereum_params as params
from node.rpc import following
from node.rpc.ethereum_params import CallObject, LogFilter, Param, Tag
from node.rpc.filters import Filters
from node.rpc.following import Cursor, Threads
from node.rpc.jsonrpc import Method
from node.rpc.limits import RpcLimits
from node.rpc.methods import Context
from node.rpc.params import shown
from node.rpc.subscriptions import Subscriptions

FEE_HISTORY_BLOCKS_MAX = 1024
"""Blocks of one eth_feeHistory; more are asked for in vain, as with other clients."""

BLOB_BASE_FEE_MIN = 1
"""Of EIP-4844: the price of blob gas while no blobs are used."""

BlockReference = int | Tag | bytes

T = TypeVar("T")


class Ethereum:
    """The methods, and what they share: the ledger, the threads and the filters."""

    def __init__(self, ledger: Ledger, limits: RpcLimits, sync: Callable[[], SyncStatistics]) -> None:
        self._ledger = ledger
        self._sync = sync
        self._limits = limits
        self._threads = Threads(limits.ledger_threads)
        self._filters = Filters(ledger, self._threads, limits)

    def subscriptions(self) -> Subscriptions:
        """Those of one connection, none yet."""
        return Subscriptions(self._ledger, self._threads, self._limits)

    # Which block is meant

    def _number(self, reference: int | Tag) -> int:
        """A number may lie above the head."""
        match reference:
            case "latest" | "safe" | "finalized" | "pending":
                return self._ledger.head.number
            case "earliest":
                return 0
            case number:
                return number

    def _find(self, reference: BlockReference) -> int | None:
        """The number of a final block; None when there is no such block."""
        if isinstance(reference, bytes):
            try:
                number = self._ledger.number_of(reference)
            except NotFound:
                return None
        else:
            number = self._number(reference)
        return number if number <= self._ledger.head.number else None

    def _must_find(self, reference: BlockReference) -> int:
        number = self._find(reference)
        if number is None:
            what = encoding.data(reference) if isinstance(reference, bytes) else reference
            raise NotFound(f"unknown block {what}: the head is block {self._ledger.head.number}")
        return number

    async def _look(self, reference: BlockReference, read: Callable[[View], T]) -> T:
        """Read the state of a block. Raises NotFound when there is no such block."""
        history = self._ledger.history
        if reference == "pending":
            return await self._threads.run(read, history.view_ahead())
        number = self._must_find(reference)
        return await self._threads.run(lambda: read(history.view(number)))

    # The chain

    async def chain_id(self, _context: Context) -> str:
        return encoding.quantity(self._ledger.chain_id)

    async def net_version(self, _context: Context) -> str:
        return str(self._ledger.chain_id)

    async def client_version(self, _context: Context) -> str:
        system = f"{platform.system().lower()}-{platform.machine()}"
        return f"aigen/v{package_version('aigen')}/{system}/python{platform.python_version()}"

    async def syncing(self, _context: Context) -> dict[str, str] | bool:
        """False but while blocks come in that peers have had for longer; what is answered then is whole up to the head,
        and old."""
        sync = self._sync()
        if sync.mode == "idle":
            return False
        return {
            "startingBlock": encoding.quantity(sync.start),
            "currentBlock": encoding.quantity(self._ledger.head.number),
            "highestBlock": encoding.quantity(sync.target),
        }

    async def accounts(self, _context: Context) -> list[str]:
        """Keys never travel: this node signs for nobody."""
        return []

    async def block_number(self, _context: Context) -> str:
        return encoding.quantity(self._ledger.head.number)

    async def get_block(self, _context: Context, reference: BlockReference, full: bool) -> Any:
        number = self._find(reference)
        return None if number is None else await self._threads.run(self._read_block, number, full)

    def _read_block(self, number: int, full: bool) -> Any:
        history = self._ledger.history
        found = history.block(number)
        if not full:
            return encoding.block(found, None)
        count = range(len(found.raw_transactions))
        whole = [encoding.transaction(history.transaction(found, index), found.record, index) for index in count]
        return encoding.block(found, whole)

    # Transactions

    async def get_transaction_count(self, _context: Context, account: Address, reference: BlockReference) -> str:
        if reference == "pending":
            return encoding.quantity(self._ledger.account(account).next_nonce)
        return encoding.quantity(await self._look(reference, lambda view: view.nonce(account)))

    async def send_raw_transaction(self, _context: Context, raw: bytes) -> str:
        """Answers once the transaction is on disk in the pool's journal."""
        return encoding.data(await self._ledger.submit(raw))

    async def get_transaction(self, _context: Context, transaction_hash: TransactionHash) -> Any:
        waiting = self._ledger.pending_transaction(transaction_hash)
        if waiting is not None:
            return encoding.transaction(waiting, None, 0)
        return await self._threads.run(self._read_transaction, transaction_hash, self._ledger.head.number)

    def _read_transaction(self, transaction_hash: TransactionHash, head: int) -> Any:
        history = self._ledger.history
        place = history.place_of(transaction_hash)
        if place is None or place[0] > head:
            return None
        number, index = place
        found = history.block(number)
        return encoding.transaction(history.transaction(found, index), found.record, index)

    async def get_receipt(self, _context: Context, transaction_hash: TransactionHash) -> Any:
        return await self._threads.run(self._read_receipt, transaction_hash, self._ledger.head.number)

    def _read_receipt(self, transaction_hash: TransactionHash, head: int) -> Any:
        history = self._ledger.history
        place = history.place_of(transaction_hash)
        if place is None or place[0] > head:
            return None
        number, index = place
        return encoding.receipt(history.receipts(number)[index], history.block(number).record, index)

    # Prices: there is no coin

    async def no_price(self, _context: Context) -> str:
        return encoding.quantity(0)

    async def fee_history(
        self, _context: Context, count: int, newest: int | Tag, percentiles: tuple[float, ...] | None
    ) -> Any:
        if count == 0:
            raise BadInput("eth_feeHistory: blockCount is 0x0; it is 0x1 or more")
        last = self._must_find(newest)
        first = max(0, last + 1 - min(count, FEE_HISTORY_BLOCKS_MAX))
        return await self._threads.run(self._read_fees, range(first, last + 1), percentiles)

    def _read_fees(self, numbers: range, percentiles: tuple[float, ...] | None) -> Any:
        headers = (self._ledger.history.header(number) for number in numbers)
        content = {
            "oldestBlock": encoding.quantity(numbers.start),
            "baseFeePerGas": [encoding.quantity(0)] * (len(numbers) + 1),
            "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
            "baseFeePerBlobGas": [encoding.quantity(BLOB_BASE_FEE_MIN)] * (len(numbers) + 1),
            "blobGasUsedRatio": [0.0] * len(numbers),
        }
        if percentiles is not None:
            content["reward"] = [[encoding.quantity(0)] * len(percentiles)] * len(numbers)
        return content

    # State

    async def get_balance(self, _context: Context, account: Address, reference: BlockReference) -> str:
        return encoding.quantity(await self._look(reference, lambda view: view.balance(account)))

    async def get_code(self, _context: Context, account: Address, reference: BlockReference) -> str:
        return encoding.data(await self._look(reference, lambda view: view.code(account)))

    async def get_storage_at(self, _context: Context, account: Address, slot: int, reference: BlockReference) -> str:
        return encoding.word(await self._look(reference, lambda view: view.storage(account, slot)))

    async def get_proof(
        self, _context: Context, account: Address, keys: tuple[str, ...], reference: BlockReference
    ) -> Any:
        slots = [int(key, 16) for key in keys]
        return encoding.proof(await self._look(reference, lambda view: view.proof(account, slots)), keys)

    async def call(self, _context: Context, asked: CallObject, reference: BlockReference) -> str:
        request = self._request("eth_call", asked)
        return encoding.data(await self._look(reference, lambda view: view.call(request)))

    async def estimate_gas(self, _context: Context, asked: CallObject, reference: BlockReference) -> str:
        """Without a block: as the transaction would run if it were sent now."""
        request = self._request("eth_estimateGas", asked)
        return encoding.quantity(await self._look(reference, lambda view: view.estimate_gas(request)))

    def _request(self, method: str, asked: CallObject) -> CallRequest:
        """A call with its gas bounded. Raises BadInput for what this ledger never runs."""
        if asked.to is None:
            raise BadInput(f"{method}: the call has no destination: this ledger creates no contracts")
        if asked.chain_id not in {None, self._ledger.chain_id}:
            ours = self._ledger.chain_id
            raise BadInput(f"{method}: the call is for chain id {asked.chain_id}, this ledger has {ours}")
        gas = min(asked.gas or self._limits.call_gas, self._limits.call_gas, self._ledger.config.network.gas_limit)
        return CallRequest(asked.sender, asked.to, asked.data, gas, asked.access_list)

    # Logs

    async def get_logs(self, _context: Context, asked: LogFilter) -> list[Any]:
        if asked.block_hash is not None:
            start = stop = self._must_find(asked.block_hash)
        else:
            start, stop = self._number(asked.start), min(self._number(asked.stop), self._ledger.head.number)
            if self._number(asked.start) > self._number(asked.stop):
                raise BadInput(f"fromBlock {asked.start} is after toBlock {asked.stop}")
        return await self._threads.run(
            following.search, self._ledger.history, asked.criteria, start, stop + 1, self._limits
        )

    async def new_filter(self, _context: Context, asked: LogFilter) -> str:
        """Its changes are the logs of blocks to come; eth_getFilterLogs gives those of the whole range."""
        if asked.block_hash is not None:
            raise BadInput("eth_newFilter: a filter follows blocks to come: ask eth_getLogs for those of one block")
        after_head = self._ledger.head.number + 1
        start = max(after_head, asked.start) if isinstance(asked.start, int) else after_head
        stop = asked.stop + 1 if isinstance(asked.stop, int) else None
        return self._filters.add(Cursor(asked.criteria, start, stop), asked)

    async def new_block_filter(self, _context: Context) -> str:
        return self._filters.add(Cursor(None, self._ledger.head.number + 1), None)

    async def get_filter_changes(self, _context: Context, name: str) -> list[Any]:
        return await self._filters.changes(name)

    async def get_filter_logs(self, context: Context, name: str) -> list[Any]:
        asked = self._filters.get(name).asked
        if asked is None:
            raise BadInput("the filter is one of blocks and has no logs: ask eth_getFilterChanges")
        return await self.get_logs(context, asked)

    async def uninstall_filter(self, _context: Context, name: str) -> bool:
        return self._filters.remove(name)

    # Subscriptions

    async def subscribe(self, context: Context, kind: str, criteria: Criteria | None) -> str:
        if context.subscriber is None:
            raise BadInput("eth_subscribe needs a WebSocket: open one at this address, or poll with eth_newFilter")
        if kind == "newHeads" and criteria is None:
            return context.subscriber.open(None)
        if kind == "logs":
            return context.subscriber.open(criteria or Criteria())
        what = shown(kind) if kind != "newHeads" else "newHeads with a filter"
        raise BadInput(f"eth_subscribe: there is no subscription to {what}: newHeads, or logs with address and topics")

    async def unsubscribe(self, context: Context, name: str) -> bool:
        if context.subscriber is None:
            raise BadInput("eth_unsubscribe needs the WebSocket that the subscription was opened on")
        return context.subscriber.close(name)

    def table(self) -> dict[str, Method]:
        """Every method by name."""
        return {handler.name: _bound(handler, self) for handler in HANDLERS}


@dataclass(frozen=True)
class Handler:
    """A method: its name, what it does, and its params in order."""

    name: str
    run: Callable[..., Awaitable[Any]]
    takes: tuple[Param, ...] = ()


def _bound(handler: Handler, ethereum: Ethereum) -> Method:
    async def method(context: Context, /, *args: Any, **named: Any) -> Any:
        try:
            values = params.decode(handler.name, handler.takes, args, named)
            return Success(await handler.run(ethereum, context, *values))
        except Reverted as refusal:
            return Error(refusal.code, _line(refusal), encoding.data(refusal.data))
        except Refused as refusal:
            return Error(refusal.code, _line(refusal))

    return method


def _line(refusal: Refused) -> str:
    return " ".join(str(refusal).splitlines())


_BLOCK = Param("block", params.block, "latest")
_BLOCK_NUMBER = Param("block", params.block_number)
_ADDRESS = Param("address", params.address)
_CALL = Param("transaction", params.call)
_FILTER = Param("filter", params.log_filter)
_FULL = Param("full transactions", params.boolean, default=False)
_HASH = Param("transaction hash", params.transaction_hash)
_NAME = Param("filter id", params.text)

HANDLERS = (
    Handler("eth_chainId", Ethereum.chain_id),
    Handler("eth_blockNumber", Ethereum.block_number),
    Handler("eth_getBlockByNumber", Ethereum.get_block, (_BLOCK_NUMBER, _FULL)),
    Handler("eth_getBlockByHash", Ethereum.get_block, (Param("block hash", params.hash32), _FULL)),
    Handler("eth_getTransactionCount", Ethereum.get_transaction_count, (_ADDRESS, _BLOCK)),
    Handler("eth_gasPrice", Ethereum.no_price),
    Handler("eth_maxPriorityFeePerGas", Ethereum.no_price),
    Handler(
        "eth_feeHistory",
        Ethereum.fee_history,
        (
            Param("blockCount", params.quantity),
            Param("newestBlock", params.block_number),
            Param("rewardPercentiles", params.percentiles, None),
        ),
    ),
    Handler("eth_estimateGas", Ethereum.estimate_gas, (_CALL, Param("block", params.block, "pending"))),
    Handler(
        "eth_sendRawTransaction", Ethereum.send_raw_transaction, (Param("transaction", params.signed_transaction),)
    ),
    Handler("eth_getTransactionByHash", Ethereum.get_transaction, (_HASH,)),
    Handler("eth_getTransactionReceipt", Ethereum.get_receipt, (_HASH,)),
    Handler("eth_getLogs", Ethereum.get_logs, (_FILTER,)),
    Handler("eth_newFilter", Ethereum.new_filter, (_FILTER,)),
    Handler("eth_newBlockFilter", Ethereum.new_block_filter),
    Handler("eth_getFilterChanges", Ethereum.get_filter_changes, (_NAME,)),
    Handler("eth_getFilterLogs", Ethereum.get_filter_logs, (_NAME,)),
    Handler("eth_uninstallFilter", Ethereum.uninstall_filter, (_NAME,)),
    Handler("eth_call", Ethereum.call, (_CALL, _BLOCK)),
    Handler("eth_getCode", Ethereum.get_code, (_ADDRESS, _BLOCK)),
    Handler("eth_getBalance", Ethereum.get_balance, (_ADDRESS, _BLOCK)),
    Handler("eth_getStorageAt", Ethereum.get_storage_at, (_ADDRESS, Param("slot", params.slot), _BLOCK)),
    Handler("eth_getProof", Ethereum.get_proof, (_ADDRESS, Param("slots", params.slots), _BLOCK)),
    Handler("eth_syncing", Ethereum.syncing),
    Handler("eth_accounts", Ethereum.accounts),
    Handler(
        "eth_subscribe",
        Ethereum.subscribe,
        (Param("subscription", params.text), Param("filter", params.log_criteria, None)),
    ),
    Handler("eth_unsubscribe", Ethereum.unsubscribe, (Param("subscription id", params.text),)),
    Handler("net_version", Ethereum.net_version),
    Handler("web3_clientVersion", Ethereum.client_version),
)
