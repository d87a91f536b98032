"""Ethereum's methods over a real ledger: the specification's encodings, what each tag means, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import rlp
from eth_account import Account
from eth_hash.auto import keccak
from eth_utils import to_checksum_address

from contracts.abi import decode_result, encode_function
from contracts.addresses import ADDRESSES
from contracts.calls import Call
from node.config import RpcSettings
from node.network.sync import SyncStatistics
from node.rpc.limits import RpcLimits
from tests.ledger.world import (
    ADMIN,
    AUTHORITY,
    CONFIG,
    EPOCH,
    MODEL,
    OPERATOR,
    STRANGER,
    address,
    enrol,
    join,
    raw_call,
    register,
)
from tests.node.rpc.fake import FakeNode
from tests.node.rpc.wire import post

from . import shapes
from .served import serving

MODELS = f"0x{ADDRESSES['Models'].hex()}"
ADMIN_ADDRESS = f"0x{ADMIN.address.hex()}"
NOWHERE = "0x" + "ab" * 32


def call_object(call: Call, **members: Any) -> dict[str, Any]:
    return {"from": ADMIN_ADDRESS, "to": f"0x{call.to.hex()}", "data": f"0x{call.encode().hex()}", **members}


def ask_model(model_id: str = MODEL) -> dict[str, Any]:
    return {"to": MODELS, "data": f"0x{encode_function('Models', 'model', [model_id, '1']).hex()}"}


def shard_count(output: str) -> int:
    count: int = decode_result("Models", "model", bytes.fromhex(output[2:]))[0][0]
    return count


# Encodings


async def test_what_a_wallet_asks_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register())
        chain_id = CONFIG.network.chain_id
        assert await served.ask("eth_chainId") == hex(chain_id)
        assert await served.ask("net_version") == str(chain_id)
        assert (await served.ask("web3_clientVersion")).startswith("aigen/v")
        assert await served.ask("eth_blockNumber") == "0x1"
        assert await served.ask("eth_gasPrice") == "0x0"
        assert await served.ask("eth_maxPriorityFeePerGas") == "0x0"
        assert await served.ask("eth_syncing") is False
        assert await served.ask("eth_accounts") == []


async def test_while_blocks_come_in_that_others_have_it_says_so(tmp_path: Path) -> None:
    node = FakeNode()
    node.sync = SyncStatistics("executing blocks", 2, 5, 18, 0)
    async with serving(tmp_path, node=node) as served:
        assert await served.ask("eth_syncing") == {
            "startingBlock": "0x2",
            "currentBlock": "0x0",
            "highestBlock": "0x12",
        }


async def test_blocks(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register())
        for number in ("0x0", "0x1"):
            block = await served.ask("eth_getBlockByNumber", number, False)
            assert shapes.BLOCK(block)
            full = await served.ask("eth_getBlockByHash", block["hash"], True)
            assert shapes.FULL_BLOCK(full)
            assert [entry["hash"] for entry in full["transactions"]] == block["transactions"]
            assert block == {**full, "transactions": block["transactions"]}
        assert block["number"] == "0x1"
        assert block["miner"] == f"0x{AUTHORITY.address.hex()}"
        assert (block["baseFeePerGas"], block["difficulty"], block["nonce"]) == ("0x0", "0x0", "0x" + "00" * 8)
        genesis = await served.ask("eth_getBlockByNumber", "earliest", True)
        assert genesis["timestamp"] == hex(EPOCH)
        assert genesis["transactions"] == []


async def test_the_hash_of_a_block_follows_from_what_is_told(tmp_path: Path) -> None:
    """The header's fields in Ethereum's order, the seal behind extraData."""
    order = (
        *("parentHash", "sha3Uncles", "miner", "stateRoot", "transactionsRoot", "receiptsRoot", "logsBloom"),
        *("difficulty", "number", "gasLimit", "gasUsed", "timestamp", "extraData", "mixHash", "nonce"),
        *("baseFeePerGas", "withdrawalsRoot", "blobGasUsed", "excessBlobGas", "parentBeaconBlockRoot"),
    )
    numbers = {"difficulty", "number", "gasLimit", "gasUsed", "timestamp", "baseFeePerGas"}
    numbers |= {"blobGasUsed", "excessBlobGas"}
    async with serving(tmp_path) as served:
        await served.send(register())
        for number in ("0x0", "0x1"):
            block = await served.ask("eth_getBlockByNumber", number, False)
            fields: list[Any] = []
            for name in order:
                if name in numbers:
                    fields.append(int(block[name], 16))
                else:
                    fields.append(bytes.fromhex(block[name][2:]))
            fields[order.index("extraData")] += bytes.fromhex(block["seal"][2:])
            assert f"0x{keccak(rlp.encode(fields)).hex()}" == block["hash"]


async def test_transactions_and_receipts(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        sent = await served.send(register())
        name = f"0x{sent.transaction.hash.hex()}"
        transaction = await served.ask("eth_getTransactionByHash", name)
        assert shapes.TRANSACTION(transaction)
        assert (transaction["hash"], transaction["from"], transaction["to"]) == (name, ADMIN_ADDRESS, MODELS)
        assert (transaction["nonce"], transaction["value"], transaction["v"]) == ("0x0", "0x0", transaction["yParity"])
        receipt = await served.ask("eth_getTransactionReceipt", name)
        assert shapes.RECEIPT(receipt)
        assert (receipt["status"], receipt["type"], receipt["effectiveGasPrice"]) == ("0x1", "0x2", "0x0")
        assert receipt["gasUsed"] == hex(sent.transaction.gas_used)
        assert len(receipt["logs"]) == 1
        assert await served.ask("eth_getTransactionByHash", NOWHERE) is None
        assert await served.ask("eth_getTransactionReceipt", NOWHERE) is None


async def test_a_legacy_transaction_can_be_checked_by_whoever_reads_it(tmp_path: Path) -> None:
    call = register()
    content = {"nonce": 0, "gasPrice": 0, "gas": 2_000_000, "to": to_checksum_address(MODELS), "value": 0}
    signed = Account.sign_transaction(
        {**content, "data": call.encode(), "chainId": CONFIG.network.chain_id}, ADMIN.secret
    )
    async with serving(tmp_path) as served:
        name = await served.ask("eth_sendRawTransaction", signed.raw_transaction.to_0x_hex())
        await served.ledger.wait_receipt(bytes.fromhex(name[2:]))  # type: ignore[arg-type]
        found = await served.ask("eth_getTransactionByHash", name)
        receipt = await served.ask("eth_getTransactionReceipt", name)
    assert shapes.LEGACY_TRANSACTION(found)
    assert (found["type"], receipt["type"]) == ("0x0", "0x0")
    assert (int(found["v"], 16), int(found["r"], 16), int(found["s"], 16)) == (signed.v, signed.r, signed.s)


async def test_logs_of_several_transactions_are_counted_over_the_block(tmp_path: Path) -> None:
    async with serving(tmp_path, sealing=False) as served:
        await served.submit(register(core=True))
        await served.submit(join(), OPERATOR)
        await served.submit(enrol(address(1), address(2)))
        served.seal()
        await served.ledger.wait_head(0)
        block = await served.ask("eth_getBlockByNumber", "0x1", False)
        receipts = [await served.ask("eth_getTransactionReceipt", name) for name in block["transactions"]]
        logs = await served.ask("eth_getLogs", {"blockHash": block["hash"]})
    assert len(receipts) == 3
    assert [log for receipt in receipts for log in receipt["logs"]] == logs
    assert [int(log["logIndex"], 16) for log in logs] == list(range(5))
    assert [int(receipt["transactionIndex"], 16) for receipt in receipts] == [0, 1, 2]
    used = [int(receipt["gasUsed"], 16) for receipt in receipts]
    assert [int(receipt["cumulativeGasUsed"], 16) for receipt in receipts] == [sum(used[: n + 1]) for n in range(3)]
    assert block["gasUsed"] == receipts[-1]["cumulativeGasUsed"]


async def test_fee_history(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register())
        history = await served.ask("eth_feeHistory", "0x4", "latest", [10, 50.5])
        assert shapes.FEE_HISTORY(history)
        assert history["oldestBlock"] == "0x0"
        assert history["baseFeePerGas"] == ["0x0"] * 3
        assert history["reward"] == [["0x0", "0x0"]] * 2
        assert history["gasUsedRatio"][0] == 0 < history["gasUsedRatio"][1]
        assert "reward" not in await served.ask("eth_feeHistory", "0x1", "0x1")
        assert (await served.ask("eth_feeHistory", "0x1", "0x0"))["oldestBlock"] == "0x0"


async def test_state(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register(core=True))
        assert await served.ask("eth_getBalance", ADMIN_ADDRESS, "latest") == "0x0"
        code = await served.ask("eth_getCode", MODELS, "latest")
        assert shapes.DATA(code)
        assert await served.ask("eth_getCode", ADMIN_ADDRESS) == "0x"
        proof = await served.ask("eth_getProof", MODELS, ["0x1", "0x" + "00" * 32], "latest")
        assert shapes.PROOF({**proof, "storageProof": [proof["storageProof"][1]]})
        assert [entry["key"] for entry in proof["storageProof"]] == ["0x1", "0x" + "00" * 32]
        assert proof["codeHash"] == f"0x{keccak(bytes.fromhex(code[2:])).hex()}"
        for slot in range(6):
            value = await served.ask("eth_getStorageAt", MODELS, hex(slot), "latest")
            assert shapes.HASH(value)
            proved = (await served.ask("eth_getProof", MODELS, [hex(slot)], "latest"))["storageProof"][0]
            assert int(value, 16) == int(proved["value"], 16)
        as_checksum = to_checksum_address(MODELS)
        assert await served.ask("eth_getCode", as_checksum, "latest") == code


# Which block is meant


async def test_older_blocks(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        await served.send(register("a"))
        await served.send(register("b"))
        first = await served.ask("eth_getBlockByNumber", "0x1", False)
        references: list[tuple[Any, int, int]] = [
            ("earliest", 0, 0),
            ("0x1", 1, 0),
            (first["hash"], 1, 0),
            ({"blockNumber": "0x1"}, 1, 0),
            ({"blockHash": first["hash"], "requireCanonical": True}, 1, 0),
            ("latest", 1, 1),
            ("safe", 1, 1),
            ("finalized", 1, 1),
            ("pending", 1, 1),
        ]
        for reference, a, b in references:
            found = [await served.ask("eth_call", ask_model(name), reference) for name in ("a", "b")]
            assert [shard_count(output) > 0 for output in found] == [a, b], reference
            nonce = await served.ask("eth_getTransactionCount", ADMIN_ADDRESS, reference)
            assert nonce == hex(a + b), reference
        for tag in ("latest", "safe", "finalized", "pending"):
            assert (await served.ask("eth_getBlockByNumber", tag, False))["number"] == "0x2"


async def test_blocks_that_are_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert await served.ask("eth_getBlockByNumber", "0x1", False) is None
        assert await served.ask("eth_getBlockByHash", NOWHERE, False) is None
        for method, *params in (
            ("eth_call", ask_model()),
            ("eth_getBalance", ADMIN_ADDRESS),
            ("eth_getTransactionCount", ADMIN_ADDRESS),
            ("eth_getProof", MODELS, []),
        ):
            for reference in ("0x1", NOWHERE):
                error = await served.refusal(method, *params, reference)
                assert error["code"] == -32001
                assert "unknown block" in error["message"]
        assert (await served.refusal("eth_getLogs", {"blockHash": NOWHERE}))["code"] == -32001


async def test_the_pool_counts_for_pending_only(tmp_path: Path) -> None:
    async with serving(tmp_path, sealing=False) as served:
        name = await served.ask("eth_sendRawTransaction", f"0x{raw_call(ADMIN, 0, register()).hex()}")
        assert await served.ask("eth_getTransactionCount", ADMIN_ADDRESS, "pending") == "0x1"
        assert await served.ask("eth_getTransactionCount", ADMIN_ADDRESS, "latest") == "0x0"
        waiting = await served.ask("eth_getTransactionByHash", name)
        assert shapes.PENDING_TRANSACTION(waiting)
        assert waiting["hash"] == name
        assert await served.ask("eth_getTransactionReceipt", name) is None


# Signed transactions


async def test_a_transaction_is_on_disk_when_it_is_answered(tmp_path: Path) -> None:
    raw = raw_call(ADMIN, 0, register())
    async with serving(tmp_path, sealing=False) as served:
        name = await served.ask("eth_sendRawTransaction", f"0x{raw.hex()}")
        assert name == f"0x{keccak(raw).hex()}"
        assert [data for _, data in served.ledger._chain.store.journal()] == [raw]
        assert await served.ask("eth_sendRawTransaction", f"0x{raw.hex()}") == name, "known: answered again"


async def test_transactions_that_are_refused(tmp_path: Path) -> None:
    unsigned = {"nonce": 0, "to": to_checksum_address(MODELS), "value": 0, "gas": 1_000_000, "data": b""}
    paying = {**unsigned, "chainId": CONFIG.network.chain_id, "maxFeePerGas": 10**9, "maxPriorityFeePerGas": 10**9}
    refusals = {
        "0x01": (-32602, "not a signed Ethereum transaction"),
        "0x": (-32602, "0x and an even number of hex digits"),
        raw_call(STRANGER, 0, register()): (-32003, "is not enrolled"),
        raw_call(OPERATOR, 0, register()): (-32003, "the contract refuses this transaction: sender is not an admin"),
        raw_call(ADMIN, 5, register()): (-32004, "nonce too high: 5 leaves a gap"),
        raw_call(ADMIN, 0, register(), chain_id=1): (-32602, "is signed for chain id 1"),
        bytes(Account.sign_transaction(paying, ADMIN.secret).raw_transaction): (-32602, "set every fee to 0"),
    }
    async with serving(tmp_path) as served:
        for raw, (code, message) in refusals.items():
            error = await served.refusal("eth_sendRawTransaction", raw if isinstance(raw, str) else f"0x{raw.hex()}")
            assert error["code"] == code, error
            assert message in error["message"]
        await served.send(register())
        late = await served.refusal("eth_sendRawTransaction", f"0x{raw_call(ADMIN, 0, enrol(address(1))).hex()}")
        assert late["message"].startswith("nonce too low: 0 is used")


async def test_transactions_of_a_batch_keep_their_order(tmp_path: Path) -> None:
    raws = [raw_call(ADMIN, nonce, register(f"model-{nonce}")) for nonce in range(20)]
    batch = [
        {"jsonrpc": "2.0", "id": nonce, "method": "eth_sendRawTransaction", "params": [f"0x{raw.hex()}"]}
        for nonce, raw in enumerate(raws)
    ]
    async with serving(tmp_path, sealing=False) as served:
        reply = await post(served, json.dumps(batch).encode())  # type: ignore[arg-type]
        assert [answer.get("result") for answer in reply.json] == [f"0x{keccak(raw).hex()}" for raw in raws]
        assert served.ledger.pending() == raws


# Calls


async def test_reverts_are_told_as_execution_clients_do(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for method in ("eth_call", "eth_estimateGas"):
            call = {**call_object(register()), "from": f"0x{STRANGER.address.hex()}"}
            error = await served.refusal(method, call)
            assert error["code"] == 3
            assert error["message"] == "execution reverted: sender is not an admin"
            assert bytes.fromhex(error["data"][2:]).startswith(bytes.fromhex("08c379a0")), "Error(string)"
            assert b"sender is not an admin" in bytes.fromhex(error["data"][2:])


async def test_an_estimate_is_enough_to_send(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        gas = int(await served.ask("eth_estimateGas", call_object(register(shards=20))), 16)
        raw = raw_call(ADMIN, 0, register(shards=20), gas=gas)
        name = await served.ask("eth_sendRawTransaction", f"0x{raw.hex()}")
        await served.ledger.wait_receipt(bytes.fromhex(name[2:]))  # type: ignore[arg-type]
        assert (await served.ask("eth_getTransactionReceipt", name))["status"] == "0x1"


async def test_gas_of_a_call_is_bounded(tmp_path: Path) -> None:
    settings = RpcSettings(port=0, call_gas=100_000)
    async with serving(tmp_path, settings) as served:
        for gas in ({}, {"gas": "0x5f5e100"}):
            error = await served.refusal("eth_call", call_object(register(), **gas))
            assert error == {"code": -32602, "message": "out of gas: the call needs more than its 100000 gas"}
            assert (await served.refusal("eth_estimateGas", call_object(register(), **gas)))["code"] == -32602
        error = await served.refusal("eth_call", call_object(register(), gas="0xc350"))
        assert "its 50000 gas" in error["message"], "less than the bound is taken as it is"


async def test_a_call_as_libraries_write_it(tmp_path: Path) -> None:
    call = call_object(
        register(),
        input=f"0x{register().encode().hex()}",
        value="0x0",
        gas="0x7a1200",
        maxFeePerGas="0x0",
        maxPriorityFeePerGas="0x0",
        nonce="0x0",
        type="0x2",
        chainId=hex(CONFIG.network.chain_id),
        accessList=[{"address": MODELS, "storageKeys": ["0x" + "00" * 32]}],
        gasPrice=None,
    )
    async with serving(tmp_path) as served:
        assert await served.ask("eth_call", call, "latest") == "0x"
        assert shapes.QUANTITY(await served.ask("eth_estimateGas", call))


# Logs


async def test_logs(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for name in ("a", "b", "c"):
            await served.send(register(name))
        await served.send(enrol(address(1)))
        everything = await served.ask("eth_getLogs", {"fromBlock": "earliest", "toBlock": "latest"})
        assert len(everything) == 4
        for log in everything:
            assert shapes.LOG(log)
        models = await served.ask("eth_getLogs", {"fromBlock": "0x0", "address": MODELS})
        assert models == everything[:3]
        topic = models[0]["topics"][0]
        assert await served.ask("eth_getLogs", {"fromBlock": "0x0", "topics": [topic]}) == models
        assert await served.ask("eth_getLogs", {"fromBlock": "0x0", "topics": [[topic, NOWHERE], None]}) == models
        assert await served.ask("eth_getLogs", {"fromBlock": "0x2", "toBlock": "0x2"}) == [everything[1]]
        assert await served.ask("eth_getLogs", {}) == [everything[3]], "without a range, the head's"
        assert await served.ask("eth_getLogs", {"address": [MODELS, ADMIN_ADDRESS], "fromBlock": "0x0"}) == models
        assert await served.ask("eth_getLogs", {"fromBlock": "0x9", "toBlock": "0xa"}) == [], "not there yet"


async def test_logs_are_bounded(tmp_path: Path) -> None:
    limits = RpcLimits(log_blocks=3, log_results=2, log_bytes=100_000)
    async with serving(tmp_path, limits=limits) as served:
        for name in ("a", "b", "c", "d"):
            await served.send(register(name))
        error = await served.refusal("eth_getLogs", {"fromBlock": "0x0", "toBlock": "0x3"})
        assert error["code"] == -32602
        assert "4 blocks, at most 3 at once (rpc.log_blocks)" in error["message"]
        error = await served.refusal("eth_getLogs", {"fromBlock": "0x1", "toBlock": "0x3"})
        assert "more than 2 logs" in error["message"]
        assert "ask for blocks 0x1 to 0x2 first" in error["message"]
        assert len(await served.ask("eth_getLogs", {"fromBlock": "0x1", "toBlock": "0x2"})) == 2
    limits = RpcLimits(log_bytes=1)
    async with serving(tmp_path / "again", limits=limits) as served:
        await served.send(register("a"))
        await served.send(register("b"))
        assert "1 bytes" in (await served.refusal("eth_getLogs", {"fromBlock": "0x1"}))["message"]
        assert len(await served.ask("eth_getLogs", {"fromBlock": "0x1", "toBlock": "0x1"})) == 1


# The door

MALFORMED: list[tuple[str, list[Any], str]] = [
    ("eth_chainId", [1], "takes at most 0 params"),
    ("eth_getBalance", [], "address is missing"),
    ("eth_getBalance", ["0x12", "latest"], "has 1 bytes; it has 20"),
    ("eth_getBalance", [ADMIN_ADDRESS[2:], "latest"], "it is data"),
    ("eth_getBalance", [7, "latest"], "is a number; it is data"),
    ("eth_getBalance", [ADMIN_ADDRESS, "newest"], "one of latest, safe"),
    ("eth_getBalance", [ADMIN_ADDRESS, 1], "is a number"),
    ("eth_getBalance", [ADMIN_ADDRESS, "0x01"], "without leading zeros|a quantity or one of"),
    ("eth_getBalance", [ADMIN_ADDRESS, "0x"], "a quantity or one of"),
    ("eth_getBalance", [ADMIN_ADDRESS, {}], "a blockNumber or a blockHash"),
    ("eth_getBalance", [ADMIN_ADDRESS, {"blockNumber": "0x0", "blockHash": NOWHERE}], "one of them"),
    ("eth_getBalance", [ADMIN_ADDRESS, {"number": "0x0"}], "has 'number'"),
    ("eth_getBlockByNumber", ["latest", "yes"], "it is true or false"),
    ("eth_getBlockByNumber", [], "block is missing"),
    ("eth_getBlockByHash", ["0x1", False], "it is data"),
    ("eth_getStorageAt", [MODELS, "0x", "latest"], "1 to 64 hex digits"),
    ("eth_getStorageAt", [MODELS, "0x" + "0" * 65, "latest"], "1 to 64 hex digits"),
    ("eth_getProof", [MODELS, "0x0", "latest"], "it is an array"),
    ("eth_getProof", [MODELS, ["0x0"] * 257, "latest"], "257 elements, at most 256"),
    ("eth_feeHistory", [4, "latest", []], "is a number; it is a quantity"),
    ("eth_feeHistory", ["0x0", "latest", []], "blockCount is 0x0"),
    ("eth_feeHistory", ["0x1", "latest", [50, 10]], "not in ascending order"),
    ("eth_feeHistory", ["0x1", "latest", [101]], "a percentile is"),
    ("eth_call", ["0x"], "it is an object"),
    ("eth_call", [{"to": MODELS, "gass": "0x1"}], "has 'gass'"),
    ("eth_call", [{"to": MODELS, "value": "0x1"}], "this ledger has no coin"),
    ("eth_call", [{"to": MODELS, "gasPrice": "0x1"}], "this ledger has no coin"),
    ("eth_call", [{"to": MODELS, "data": "0x1", "input": "0x11"}], "it is data"),
    ("eth_call", [{"to": MODELS, "data": "0x11", "input": "0x12"}], "they differ"),
    ("eth_call", [{"to": MODELS, "data": "0x" + "00" * 131_073}], "131073 bytes of data"),
    ("eth_call", [{"to": MODELS, "chainId": "0x1"}], "is for chain id 1"),
    ("eth_call", [{"data": "0x00"}], "creates no contracts"),
    ("eth_call", [{"to": "0x" + "00" * 19 + "01"}], "is a precompiled contract"),
    ("eth_call", [ask_model(), "latest", {}], "takes at most 2 params"),
    ("eth_estimateGas", [{"to": ADMIN_ADDRESS}], "none of this ledger's contracts"),
    ("eth_call", [{"to": MODELS, "accessList": [{"address": MODELS}]}], "an address and storageKeys"),
    ("eth_getLogs", [{"fromBlock": "0x2", "toBlock": "0x1"}], "is after toBlock"),
    ("eth_getLogs", [{"blockHash": NOWHERE, "fromBlock": "0x1"}], "give one of them"),
    ("eth_getLogs", [{"topics": [NOWHERE] * 5}], "5 elements, at most 4"),
    ("eth_getLogs", [{"topics": [""]}], "it is data"),
    ("eth_getLogs", [{"topics": [[None]]}], "is null; it is data"),
    ("eth_getLogs", [{"address": [ADMIN_ADDRESS] * 129}], "129 elements, at most 128"),
    ("eth_getLogs", [{"limit": 1}], "has 'limit'"),
    ("eth_sendRawTransaction", [{}], "it is a string"),
    ("eth_newFilter", [{"blockHash": NOWHERE}], "blocks to come"),
    ("eth_getFilterChanges", [1], "it is a string"),
    ("eth_subscribe", ["newHeads"], "needs a WebSocket"),
    ("eth_unsubscribe", ["0x1"], "needs the WebSocket"),
]


async def test_malformed_params_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for method, given, why in MALFORMED:
            error = await served.refusal(method, *given)
            assert error["code"] == -32602, (method, given, error)
            assert re.search(why, error["message"]), (method, given, error)
        named = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_getBalance", "params": {"address": MODELS}})
        reply = await post(served, named.encode())  # type: ignore[arg-type]
        assert "by position" in reply.json["error"]["message"]
        unknown = await served.refusal("eth_sign", ADMIN_ADDRESS, "0x")
        assert unknown == {"code": -32601, "message": "Method not found"}


async def test_other_methods_are_there_beside_them(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert (await served.ask("health"))["ready"] is True
