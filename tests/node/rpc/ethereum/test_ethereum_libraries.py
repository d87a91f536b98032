"""web3.py, ethers and viem as an admin uses them, unchanged: each registers a model, reads it back and follows events.

The JavaScript libraries are installed by `make test` where npm is; without it those tests are skipped, except in CI.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from web3 import AsyncWeb3, HTTPProvider, Web3, WebSocketProvider
from web3.exceptions import ContractLogicError

from contracts.addresses import ADDRESSES
from contracts.types import TransactionHash
from tests.ledger.world import ADMIN, CONFIG, STRANGER, register
from tests.tools import npm_libraries, run_node

from .served import MODELS_ABI, Served, serving

HERE = Path(__file__).parent

MODEL = "my-model"
DEADLINE_S = 60
"""Of one library's whole conversation, which takes one to three seconds."""

MODELS_ADDRESS = Web3.to_checksum_address(ADDRESSES["Models"])


def registration() -> list[Any]:
    """The arguments of Models.register, as JSON and as web3.py take them."""
    return [
        [f"0x{item.hex()}" for item in value]
        if isinstance(value, tuple)
        else f"0x{value.hex()}"
        if isinstance(value, bytes)
        else value
        for value in msgspec.structs.astuple(register(MODEL))
    ]


@pytest.fixture
def libraries() -> Path:
    """Where ethers and viem are installed."""
    return npm_libraries("ethereum")


def job(served: Served) -> dict[str, Any]:
    return {
        "url": served.url,
        "key": f"0x{ADMIN.secret.hex()}",
        "strangerKey": f"0x{STRANGER.secret.hex()}",
        "abi": MODELS_ABI,
        "address": MODELS_ADDRESS,
        "registration": registration(),
        "chainId": CONFIG.network.chain_id,
    }


def check_registered(served: Served, result: dict[str, Any]) -> None:
    """What a library saw is what the ledger did."""
    receipt = served.ledger.receipt(TransactionHash(bytes.fromhex(result["hash"][2:])))
    assert receipt is not None
    assert receipt.transaction.reason is None
    assert receipt.transaction.sender == ADMIN.address
    expected = register(MODEL)
    assert result["shardCount"] == expected.shard_count
    assert result["manifestHash"] == f"0x{expected.manifest_hash.hex()}"
    hashes = [f"0x{shard_hash.hex()}" for shard_hash in expected.shard_hashes]
    assert result["logs"] == [{"modelId": MODEL, "hashes": hashes, "hash": result["hash"]}]
    assert (result["polled"], result["pushed"]) == (MODEL, MODEL)
    assert result["blockHash"] == f"0x{receipt.block_hash.hex()}"
    assert result["blockTransactions"] == [result["hash"]]


async def test_ethers(tmp_path: Path, libraries: Path) -> None:
    async with serving(tmp_path, deadline_s=DEADLINE_S) as served:
        result = await trio.to_thread.run_sync(run_node, libraries, HERE / "ethers.mjs", job(served))
        check_registered(served, result)
        typed = await served.ask("eth_getTransactionByHash", result["typedHash"])
    # With a base fee of 0 ethers holds the network for one before EIP-1559 and sends legacy transactions, unless told.
    assert result["fees"] == {"gasPrice": 0, "maxFeePerGas": None, "maxPriorityFeePerGas": None}
    assert (result["type"], result["status"], result["gasPrice"]) == (0, 1, 0)
    assert (typed["type"], typed["maxFeePerGas"], typed["maxPriorityFeePerGas"]) == ("0x2", "0x0", "0x0")
    assert result["refused"] == {"code": "CALL_EXCEPTION", "reason": "sender is not an admin"}
    assert result["late"] == "NONCE_EXPIRED"


async def test_viem(tmp_path: Path, libraries: Path) -> None:
    async with serving(tmp_path, deadline_s=DEADLINE_S) as served:
        result = await trio.to_thread.run_sync(run_node, libraries, HERE / "viem.mjs", job(served))
        check_registered(served, result)
    assert result["fees"] == {"maxFeePerGas": 0, "maxPriorityFeePerGas": 0}
    assert (result["type"], result["status"], result["effectiveGasPrice"]) == ("eip1559", "success", 0)
    assert result["shardCountBefore"] == 0, "at genesis it is not registered"
    assert result["proofNodes"] > 0
    assert result["refused"] == {"name": "ContractFunctionRevertedError", "reason": "sender is not an admin"}


def drive_web3(url: str) -> dict[str, Any]:
    """web3.py over HTTP, in a thread: it waits for every answer."""
    w3 = Web3(HTTPProvider(url))
    assert w3.is_connected()
    models = w3.eth.contract(address=MODELS_ADDRESS, abi=MODELS_ABI)
    account = w3.eth.account.from_key(ADMIN.secret)
    follows = models.events.ModelRegistered.create_filter(from_block="latest")
    # Neither nonce, gas nor fees are given: web3.py asks for each.
    unsigned = models.functions.register(*registration()).build_transaction(
        {"from": account.address, "nonce": w3.eth.get_transaction_count(account.address, "pending")}
    )
    sent = w3.eth.send_raw_transaction(account.sign_transaction(unsigned).raw_transaction)
    receipt = w3.eth.wait_for_transaction_receipt(sent, poll_latency=0.02)
    block = w3.eth.get_block(receipt["blockNumber"])
    found = models.functions.model(MODEL, "1").call()
    logs = models.events.ModelRegistered.get_logs(from_block=0)
    with pytest.raises(ContractLogicError, match="sender is not an admin"):
        models.functions.retire(MODEL, "1").call({"from": Web3.to_checksum_address(STRANGER.address)})
    assert models.functions.model(MODEL, "1").call(block_identifier=0)[0] == 0, "at genesis it is not registered"
    assert w3.eth.fee_history(4, "latest", [50])["reward"][0] == [0]
    return {
        "unsigned": unsigned,
        "hash": sent.to_0x_hex(),
        "status": receipt["status"],
        "shardCount": found[0],
        "manifestHash": f"0x{found[3].hex()}",
        "logs": [
            {
                "modelId": log["args"]["model_id"],
                "hashes": [f"0x{shard_hash.hex()}" for shard_hash in log["args"]["shard_hashes"]],
                "hash": log["transactionHash"].to_0x_hex(),
            }
            for log in logs
        ],
        "polled": follows.get_new_entries()[0]["args"]["model_id"],
        "blockHash": block["hash"].to_0x_hex(),
        "blockTransactions": [entry.to_0x_hex() for entry in block["transactions"]],
    }


async def follow_with_web3(url: str) -> dict[str, Any]:
    """The conversation above, while a subscription over WebSocket waits for its event."""
    async with AsyncWeb3(WebSocketProvider(url.replace("http", "ws"))) as w3:
        models = w3.eth.contract(address=MODELS_ADDRESS, abi=MODELS_ABI)
        await w3.eth.subscribe("logs", {"address": MODELS_ADDRESS})
        result = await asyncio.to_thread(drive_web3, url)
        async for message in w3.socket.process_subscriptions():
            event = models.events.ModelRegistered().process_log(message["result"])
            return {**result, "pushed": event["args"]["model_id"]}
    raise AssertionError("the connection ended before the event came")


async def test_web3(tmp_path: Path) -> None:
    async with serving(tmp_path, deadline_s=DEADLINE_S) as served:
        result = await trio.to_thread.run_sync(lambda: asyncio.run(follow_with_web3(served.url)))
        check_registered(served, result)
    unsigned = result["unsigned"]
    assert (unsigned["maxFeePerGas"], unsigned["maxPriorityFeePerGas"]) == (0, 0)
    assert unsigned["chainId"] == CONFIG.network.chain_id
    assert result["status"] == 1
