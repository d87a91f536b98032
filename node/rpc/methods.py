"""The JSON-RPC methods: decode, validate, act, answer. Knows the node through its port, and no HTTP.

Reads of the public ledger are open. Whatever uses this node's resources or keys needs to know who asks (`caller`):
a known account is enrolled or holds a tier. A signed transaction says itself who sends it, so handing one in is open.

| method                | params (in this order)                        | who may ask                             |
|-----------------------|-----------------------------------------------|-----------------------------------------|
| health                |                                               | anyone                                  |
| listModels            |                                               | anyone                                  |
| getModelInfo          | model_id, version?                            | anyone                                  |
| getShardLocations     | model_id, version?, shard_index?              | anyone                                  |
| listNodes             |                                               | anyone                                  |
| listAuthorities       |                                               | anyone                                  |
| getAccount            | account? (the caller's)                       | anyone                                  |
| getTier               | account? (the caller's)                       | anyone                                  |
| getTransactionReceipt | transaction_hash                              | anyone                                  |
| getBlock              | number? or hash? (the head)                   | anyone                                  |
| getChainInfo          |                                               | anyone                                  |
| getProof              | kind, then what it is of; see node.rpc.proofs | a known account                         |
| sendRawTransaction    | transaction                                   | anyone; the ledger judges the signer    |
| registerModel         | transaction                                   | anyone; the signer is an admin          |
| setCoreModel          | transaction                                   | anyone; the signer is an admin          |
| getNodeInfo           |                                               | a known account                         |
| getLoadState          | model_id, version?                            | a known account                         |
| listShards            | model_id?                                     | a known account                         |
| checkTier             | model_id, version?, account? (the caller's)   | a known account for itself; operator    |
| chatCompletion        | model_id, messages, version?, max_tokens?,    | an account whose tier allows the model, |
|                       | temperature?, top_p?, top_k?, min_p?, seed?,  | the operator's own too                  |
|                       | stop?, logprobs?, json_schema?, stream?       |                                         |
| getReceipt            | receipt_id                                    | the account it names; operator          |
| loadModel             | model_id, version?, wait?                     | operator; an account whose tier allows  |
| unloadModel           | model_id, version?                            | operator                                |
| verifyShards          | model_id?                                     | operator                                |
| freeSpace             | size                                          | operator                                |

Without a version the newest that is not retired is meant.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from jsonrpcserver import Error, Success

from contracts.calls import RegisterModel, SetCoreModel, decode_call
from contracts.errors import BadInput, Conflict, NotFound, Refused
from contracts.types import ModelId, Version
from ledger.history import Criteria
from node.rpc import answers, jsonrpc, params, proofs, receipts
from node.rpc.caller import Caller, is_known, require_known, require_on_ledger, require_operator
from node.rpc.checks import find_active_model, find_model, require_admin, require_tier, subject
from node.rpc.port import Emit, NodePort
from node.rpc.values import ChatChunk, LoadState

CHUNK_NOTIFICATION = "chatCompletionChunk"
"""What a stream sends for each chunk of text: params {content}, and logprobs if they are asked for."""

LOAD_NOTIFICATION = "loadProgress"
"""What a stream sends while the model is being loaded: params as getLoadState answers."""

STREAMING = frozenset({"chatCompletion"})
"""Methods that take `"stream": true`."""

ORDERED = frozenset({"sendRawTransaction", "eth_sendRawTransaction", "registerModel", "setCoreModel"})
"""Methods whose order within a batch matters: nonces follow one another."""

P = TypeVar("P", bound=params.Params)

Notify = Callable[[str, dict[str, Any]], Awaitable[None]]
"""Sends a JSON-RPC notification to the asker while its request is under way."""


class Subscriber(Protocol):
    """The connection a request came on, as one that can be told things later."""

    def open(self, criteria: Criteria | None) -> str:
        """Subscribe to new heads (no criteria) or logs; the name. Raises Busy."""
        ...

    def close(self, name: str) -> bool:
        """Whether there was such a subscription."""
        ...


@dataclass(frozen=True)
class Context:
    """What a method knows of its request. `notify` is None unless the answer is a stream, `subscriber` unless it came
    on a WebSocket."""

    caller: Caller
    notify: Notify | None = None
    subscriber: Subscriber | None = None


@dataclass(frozen=True)
class Handler(Generic[P]):
    """A method: its name, its params and what it does with them."""

    name: str
    kind: type[P]
    run: Callable[[NodePort, Context, P], Awaitable[Any]]


def table(node: NodePort) -> dict[str, jsonrpc.Method]:
    """Every method by name, over this node."""
    return {handler.name: _bound(handler, node) for handler in HANDLERS}


def _bound(handler: Handler[Any], node: NodePort) -> jsonrpc.Method:
    async def method(context: Context, /, *args: Any, **kwargs: Any) -> Any:
        try:
            decoded = params.decode(handler.name, handler.kind, args, kwargs)
            return Success(answers.answer(await handler.run(node, context, decoded)))
        except Refused as refusal:
            return Error(refusal.code, " ".join(str(refusal).splitlines()))

    return method


# Reads of the ledger


async def health(node: NodePort, _context: Context, _given: params.NoParams) -> Any:
    return node.health()


async def list_models(node: NodePort, context: Context, _given: params.NoParams) -> Any:
    known = is_known(node, context.caller)
    return {
        "models": [answers.model_summary(model, known) for model in node.models()],
        "catalogue": node.catalogue(),
    }


async def get_model_info(node: NodePort, context: Context, given: params.ModelParams) -> Any:
    return answers.model_in_full(find_model(node, given.model_id, given.version), is_known(node, context.caller))


async def get_shard_locations(node: NodePort, _context: Context, given: params.LocationsParams) -> Any:
    model = find_model(node, given.model_id, given.version)
    shards = node.shards(model.model_id, model.version)
    if given.shard_index is not None:
        if not 0 <= given.shard_index < model.shard_count:
            raise BadInput(
                f"shard_index is {given.shard_index}; {model.model_id} version {model.version} has shards 0 to "
                f"{model.shard_count - 1}"
            )
        shards = tuple(shard for shard in shards if shard.shard_index == given.shard_index)
    return answers.locations(model, shards, node.chain().redundancy)


async def list_nodes(node: NodePort, _context: Context, _given: params.NoParams) -> Any:
    return node.members()


async def list_authorities(node: NodePort, _context: Context, _given: params.NoParams) -> Any:
    return node.authorities()


async def get_account(node: NodePort, context: Context, given: params.AccountParams) -> Any:
    return node.account(subject(context.caller, "getAccount", given.account))


async def get_tier(node: NodePort, context: Context, given: params.AccountParams) -> Any:
    info = node.account(subject(context.caller, "getTier", given.account))
    return {"account": info.account, "tier": info.tier, "until": info.tier_until}


async def get_transaction_receipt(node: NodePort, _context: Context, given: params.ReceiptParams) -> Any:
    return node.receipt(params.transaction_hash("transaction_hash", given.transaction_hash))


async def get_block(node: NodePort, _context: Context, given: params.BlockParams) -> Any:
    if given.number is not None and given.hash is not None:
        raise BadInput("getBlock takes a number or a hash, both were given; without either it is the head")
    at = given.number if given.hash is None else params.block_hash("hash", given.hash)
    head = node.chain().head_number
    block = None if isinstance(at, int) and not 0 <= at <= head else node.block(at)
    if block is None:
        raise NotFound(f"no block {given.number if given.hash is None else given.hash} here: the head is block {head}")
    return block


async def get_chain_info(node: NodePort, _context: Context, _given: params.NoParams) -> Any:
    return answers.chain(node.chain(), await node.state_hashes())


async def get_proof(node: NodePort, context: Context, given: proofs.ProofParams) -> Any:
    require_known(node, context.caller, "getProof")  # the search reads the disk
    model = None if given.model_id is None else find_model(node, given.model_id, given.version)
    return await node.prove(proofs.question(node, given, model))


# Signed transactions


async def send_raw_transaction(node: NodePort, _context: Context, given: params.TransactionParams) -> Any:
    raw = params.raw_transaction("transaction", given.transaction)
    node.decode_transaction(raw)
    return {"transaction_hash": await node.submit(raw)}


async def register_model(node: NodePort, _context: Context, given: params.TransactionParams) -> Any:
    raw = params.raw_transaction("transaction", given.transaction)
    transaction = node.decode_transaction(raw)
    call = decode_call(transaction.to, transaction.data)
    if not isinstance(call, RegisterModel):
        raise BadInput(
            "registerModel takes a signed Models.register call, this transaction is another: sendRawTransaction"
        )
    require_admin(node, transaction)
    if node.model(ModelId(call.model_id), Version(call.version)) is not None:
        raise Conflict(f"{call.model_id} version {call.version} is registered already: register another version")
    transaction_hash = await node.submit(raw)
    return {"transaction_hash": transaction_hash, "model_id": call.model_id, "version": call.version}


async def set_core_model(node: NodePort, _context: Context, given: params.TransactionParams) -> Any:
    raw = params.raw_transaction("transaction", given.transaction)
    transaction = node.decode_transaction(raw)
    call = decode_call(transaction.to, transaction.data)
    if not isinstance(call, SetCoreModel):
        raise BadInput(
            "setCoreModel takes a signed Models.set_core call, this transaction is another: sendRawTransaction"
        )
    require_admin(node, transaction)
    model = find_active_model(node, ModelId(call.model_id), Version(call.version))
    transaction_hash = await node.submit(raw)
    return {"transaction_hash": transaction_hash, "model_id": model.model_id, "version": model.version}


# This node


async def get_node_info(node: NodePort, context: Context, _given: params.NoParams) -> Any:
    require_known(node, context.caller, "getNodeInfo")
    return node.node_info()


async def get_load_state(node: NodePort, context: Context, given: params.ModelParams) -> Any:
    require_known(node, context.caller, "getLoadState")
    model = find_model(node, given.model_id, given.version)
    return node.load_state(model.model_id, model.version)


async def list_shards(node: NodePort, context: Context, given: params.HeldParams) -> Any:
    require_known(node, context.caller, "listShards")
    if given.model_id is not None:
        find_model(node, given.model_id, None)
    return [shard for shard in node.held_shards() if given.model_id in {None, shard.model_id}]


async def check_tier(node: NodePort, context: Context, given: params.CheckTierParams) -> Any:
    asker = require_known(node, context.caller, "checkTier")
    account = subject(context.caller, "checkTier", given.account)
    if account != asker:
        require_operator(context.caller, "checkTier for another account")
    require_on_ledger(node, account)
    model = find_active_model(node, given.model_id, given.version)
    return await node.check_tier(account, model.model_id, model.version)


async def load_model(node: NodePort, context: Context, given: params.LoadParams) -> Any:
    account = require_known(node, context.caller, "loadModel")
    model = find_active_model(node, given.model_id, given.version)
    if not context.caller.is_operator:
        await require_tier(node, account, model)
    return await node.load_model(model.model_id, model.version, given.wait)


async def unload_model(node: NodePort, context: Context, given: params.ModelParams) -> Any:
    require_operator(context.caller, "unloadModel")
    model = find_model(node, given.model_id, given.version)
    return await node.unload_model(model.model_id, model.version)


async def free_space(node: NodePort, context: Context, given: params.FreeParams) -> Any:
    require_operator(context.caller, "freeSpace")
    if given.size <= 0:
        raise BadInput(f"size is {given.size}; it is a number of bytes above 0")
    return await node.free_space(given.size)


async def verify_shards(node: NodePort, context: Context, given: params.HeldParams) -> Any:
    require_operator(context.caller, "verifyShards")
    if given.model_id is not None:
        find_model(node, given.model_id, None)
    return await node.verify_shards(given.model_id)


async def chat_completion(node: NodePort, context: Context, given: params.ChatParams) -> Any:
    account = require_known(node, context.caller, "chatCompletion")
    if given.stream and context.notify is None:
        raise BadInput("a stream needs a POST of its own, with named params and an id: not in a batch or a WebSocket")
    parameters = given.parameters()
    model = find_active_model(node, given.model_id, given.version)
    check = await require_tier(node, account, model)
    answered = await node.chat(
        check,
        prompt=given.messages,
        parameters=parameters,
        emit=None if context.notify is None else _emitter(context.notify),
        receipt_id=receipts.new_id(),
    )
    return answers.completion(model, answered)


async def get_receipt(node: NodePort, context: Context, given: receipts.ReceiptParams) -> Any:
    return receipts.find(node, context.caller, given.receipt_id)


def _emitter(notify: Notify) -> Emit:
    async def emit(news: ChatChunk | LoadState) -> None:
        if isinstance(news, ChatChunk):
            await notify(CHUNK_NOTIFICATION, answers.chunk(news))
        else:
            await notify(LOAD_NOTIFICATION, answers.answer(news))

    return emit


HANDLERS: tuple[Handler[Any], ...] = (
    Handler("health", params.NoParams, health),
    Handler("listModels", params.NoParams, list_models),
    Handler("getModelInfo", params.ModelParams, get_model_info),
    Handler("getShardLocations", params.LocationsParams, get_shard_locations),
    Handler("listNodes", params.NoParams, list_nodes),
    Handler("listAuthorities", params.NoParams, list_authorities),
    Handler("getAccount", params.AccountParams, get_account),
    Handler("getTier", params.AccountParams, get_tier),
    Handler("getTransactionReceipt", params.ReceiptParams, get_transaction_receipt),
    Handler("getBlock", params.BlockParams, get_block),
    Handler("getChainInfo", params.NoParams, get_chain_info),
    Handler("getProof", proofs.ProofParams, get_proof),
    Handler("sendRawTransaction", params.TransactionParams, send_raw_transaction),
    Handler("registerModel", params.TransactionParams, register_model),
    Handler("setCoreModel", params.TransactionParams, set_core_model),
    Handler("getNodeInfo", params.NoParams, get_node_info),
    Handler("getLoadState", params.ModelParams, get_load_state),
    Handler("listShards", params.HeldParams, list_shards),
    Handler("checkTier", params.CheckTierParams, check_tier),
    Handler("chatCompletion", params.ChatParams, chat_completion),
    Handler("getReceipt", receipts.ReceiptParams, get_receipt),
    Handler("loadModel", params.LoadParams, load_model),
    Handler("unloadModel", params.ModelParams, unload_model),
    Handler("verifyShards", params.HeldParams, verify_shards),
    Handler("freeSpace", params.FreeParams, free_space),
)
