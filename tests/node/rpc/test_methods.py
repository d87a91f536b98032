"""Every method: what it answers, who may ask, and how it refuses. Through the dispatcher, over the fake node."""

import json

import msgspec
import pytest

from contracts.calls import SetCoreModel
from contracts.types import Address
from node import receipts
from node.inference.spec import Message
from node.rpc import jsonrpc, methods
from node.rpc.caller import NOBODY, Caller

from .fake import (
    ADMIN,
    BASIC,
    IDENTITY,
    NODE_ID,
    NOW,
    OPERATOR,
    PRO,
    SILENT,
    STRANGER,
    TIERLESS,
    FakeNode,
    registration,
    sha,
    signed,
)

AS_OPERATOR = Caller(OPERATOR.address, True)

BAD_INPUT, NOT_FOUND, NOT_ALLOWED, CONFLICT = -32602, -32001, -32003, -32004


def hexed(value):
    return f"0x{value.hex()}"


def as_(key):
    return Caller(key.address, False)


async def answer(node, method, params=None, caller=AS_OPERATOR, notify=None):
    dispatcher = jsonrpc.Dispatcher(methods.table(node), 4, methods.ORDERED)
    call = jsonrpc.Call(method, {} if params is None else params, 1)
    return await dispatcher.answer_call(call, methods.Context(caller, notify))


async def result(node, method, params=None, caller=AS_OPERATOR, notify=None):
    content = await answer(node, method, params, caller, notify)
    assert "error" not in content, content
    return content["result"]


async def refusal(node, method, params=None, caller=AS_OPERATOR):
    """(code, the one line)"""
    content = await answer(node, method, params, caller)
    assert set(content) == {"jsonrpc", "error", "id"}
    assert set(content["error"]) == {"code", "message"}
    assert "\n" not in content["error"]["message"]
    return content["error"]["code"], content["error"]["message"]


CHAT = {"model_id": "mistral-7b", "messages": [{"role": "user", "content": "one two three"}]}


# Params


@pytest.mark.parametrize(
    "params", [{"model_id": "mistral-7b"}, [{"model_id": "mistral-7b"}], ["mistral-7b"], ["mistral-7b", "1"]]
)
async def test_every_way_to_write_params(params):
    assert (await result(FakeNode(), "getModelInfo", params))["model_id"] == "mistral-7b"


@pytest.mark.parametrize("params", [[], {}, [{}]])
async def test_every_way_to_write_no_params(params):
    assert (await result(FakeNode(), "health", params))["ready"] is True


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("getModelInfo", {}, "missing required field 'model_id'; it takes model_id, version"),
        ("getModelInfo", {"model_id": 7}, "'str', got 'int'"),
        ("getModelInfo", {"model_id": "a", "context": "b"}, "unknown field 'context'"),
        ("getModelInfo", ["a", "b", "c"], "takes 2 params (model_id, version), 3 were given"),
        ("getModelInfo", [{"model_id": "a"}, {}], "'str', got 'object'"),
        ("health", {"x": 1}, "it takes no params"),
        ("loadModel", {"model_id": "a", "wait": "yes"}, "'bool', got 'str'"),
    ],
)
async def test_params_that_are_not(method, params, words):
    code, line = await refusal(FakeNode(), method, params)
    assert code == BAD_INPUT
    assert line.startswith(method)
    assert words in line


# Reads of the ledger, by nobody


async def test_health():
    assert await result(FakeNode(), "health", caller=NOBODY) == {
        "status": "ready",
        "ready": True,
        "head_number": 0,
        "step": "ready for inference",
    }


async def test_list_models():
    listed = await result(FakeNode(), "listModels", caller=NOBODY)
    assert listed["models"][0] == {
        "model_id": "mistral-7b",
        "version": "1",
        "total_size": 3 * (64 << 20) + (32 << 20) - 1,
        "shard_size": 64 << 20,
        "shard_count": 4,
        "manifest_hash": hexed(sha("mistral-7b 1")),
        "minimum_tier": "basic",
        "core": True,
        "architecture": "mistral",
        "metadata": "{}",
        "retired": False,
        "public": False,
        "precision": None,
    }
    assert [model["public"] for model in listed["models"]] == [False, True, False]
    assert (await result(FakeNode(), "getModelInfo", {"model_id": "codegen-16b"}, NOBODY))["public"] is True
    assert listed["catalogue"][0]["registered"] is False


async def test_what_a_node_has_loaded_is_told_to_those_it_knows():
    node = FakeNode()
    node._models["mistral-7b", "1"] = msgspec.structs.replace(node._models["mistral-7b", "1"], precision="int8")
    stranger = Caller(Address(bytes(20)), False)
    for caller, seen in ((NOBODY, None), (stranger, None), (Caller(BASIC.address, False), "int8")):
        assert (await result(node, "listModels", caller=caller))["models"][0]["precision"] == seen
        assert (await result(node, "getModelInfo", ["mistral-7b"], caller))["precision"] == seen
    assert (await result(node, "getModelInfo", ["mistral-7b"]))["precision"] == "int8", "the operator"


async def test_get_model_info_names_every_shard():
    info = await result(FakeNode(), "getModelInfo", {"model_id": "mistral-7b"}, NOBODY)
    assert [shard["shard_index"] for shard in info["shards"]] == [0, 1, 2, 3]
    assert sum(shard["size"] for shard in info["shards"]) == info["total_size"]
    assert info["shards"][3] == {
        "shard_index": 3,
        "total_shards": 4,
        "shard_hash": hexed(sha("mistral-7b 1 3")),
        "size": (32 << 20) - 1,
    }


@pytest.mark.parametrize(
    "method", ["getModelInfo", "getShardLocations", "loadModel", "unloadModel", "getLoadState", "checkTier"]
)
async def test_unknown_model(method):
    code, line = await refusal(FakeNode(), method, {"model_id": "gpt\n5"})
    assert (code, line.startswith("no model 'gpt\\n5' is registered here")) == (NOT_FOUND, True)
    code, line = await refusal(FakeNode(), method, {"model_id": "mistral-7b", "version": "x" * 500})
    assert code == NOT_FOUND
    assert len(line) < 300


async def test_get_shard_locations():
    found = await result(FakeNode(), "getShardLocations", {"model_id": "mistral-7b"}, NOBODY)
    assert (found["total_shards"], found["redundancy"], len(found["shards"])) == (4, 3, 4)
    assert found["shards"][1]["locations"] == [
        {"node_id": NODE_ID, "backend": "peer", "uri": "192.0.2.1:9946"},
        {"node_id": None, "backend": "http", "uri": "https://mirror.example/m"},
    ]
    assert (found["shards"][1]["copies"], found["shards"][1]["silent"]) == (1, [SILENT])


async def test_get_one_shards_locations():
    params = {"model_id": "mistral-7b", "shard_index": 3}
    found = await result(FakeNode(), "getShardLocations", params, NOBODY)
    assert [shard["shard_index"] for shard in found["shards"]] == [3]
    code, line = await refusal(FakeNode(), "getShardLocations", {**params, "shard_index": 4}, NOBODY)
    assert (code, "shards 0 to 3" in line) == (BAD_INPUT, True)
    assert (await refusal(FakeNode(), "getShardLocations", {**params, "shard_index": -1}, NOBODY))[0] == BAD_INPUT


async def test_list_nodes():
    (member,) = await result(FakeNode(), "listNodes", caller=NOBODY)
    assert (member["node_id"], member["operator"], member["role"]) == (NODE_ID, hexed(OPERATOR.address), "worker")


async def test_get_account():
    account = hexed(ADMIN.address)
    assert await result(FakeNode(), "getAccount", {"account": account}, NOBODY) == {
        "account": account,
        "nonce": 0,
        "enrolled": True,
        "admin": True,
        "authority": True,
        "tier": None,
        "tier_until": None,
    }


async def test_the_callers_own_account_and_tier():
    assert (await result(FakeNode(), "getAccount", caller=as_(PRO)))["account"] == hexed(PRO.address)
    expected = {"account": hexed(PRO.address), "tier": "pro", "until": NOW + 1000}
    assert await result(FakeNode(), "getTier", caller=as_(PRO)) == expected
    code, line = await refusal(FakeNode(), "getTier", caller=NOBODY)
    assert (code, '{"account": "0x..."}' in line) == (BAD_INPUT, True)


@pytest.mark.parametrize("account", ["", "0x", "0x12", "12" * 20, "0x" + "zz" * 20, "0x" + "1 " * 20, "0x" + "12" * 21])
async def test_an_account_that_is_none(account):
    code, line = await refusal(FakeNode(), "getAccount", {"account": account})
    assert (code, "0x and 40 hex digits" in line) == (BAD_INPUT, True)


async def test_get_block():
    node = FakeNode()
    head = await result(node, "getBlock", caller=NOBODY)
    assert (head["number"], head["proposer"], head["signers"]) == (0, None, [])
    assert await result(node, "getBlock", {"number": 0}) == head
    assert await result(node, "getBlock", [0]) == head
    assert await result(node, "getBlock", {"hash": head["hash"]}) == head
    assert await refusal(node, "getBlock", {"number": 9}) == (NOT_FOUND, "no block 9 here: the head is block 0")
    for number in (-1, 1 << 70):
        assert (await refusal(node, "getBlock", {"number": number}))[0] == NOT_FOUND
    assert (await refusal(node, "getBlock", {"number": 0, "hash": head["hash"]}))[0] == BAD_INPUT
    assert (await refusal(node, "getBlock", {"hash": "latest"}))[0] == BAD_INPUT


async def test_get_chain_info():
    info = await result(FakeNode(), "getChainInfo", caller=NOBODY)
    assert (info["chain_id"], info["redundancy"]) == (41_000, 3)
    assert info["tiers"][0] == {
        "name": "basic",
        "rank": 1,
        "cache_size": 8_000_000_000,
        "concurrent_answers": 1,
        "tokens_per_minute": 100,
    }
    assert info["contracts"]["Models"] == hexed(registration("x").to)
    assert [mark["number"] for mark in info["state_hashes"]] == [0, info["head_number"]]
    assert all(len(mark["hash"]) == 66 for mark in info["state_hashes"])


# Signed transactions


async def test_register_model_and_its_receipt():
    node = FakeNode()
    given = {"transaction": hexed(signed(registration("new-model")))}
    done = await result(node, "registerModel", given, NOBODY)
    assert (done["model_id"], done["version"]) == ("new-model", "1")
    named = {"transaction_hash": done["transaction_hash"]}
    assert await result(node, "getTransactionReceipt", named, NOBODY) is None
    node.seal()
    receipt = await result(node, "getTransactionReceipt", named, NOBODY)
    assert (receipt["succeeded"], receipt["reason"], receipt["sender"]) == (True, None, hexed(ADMIN.address))
    assert receipt["events"][0] == {
        "name": "ModelRegistered",
        "fields": {"model_id": "x", "shard_hashes": [hexed(sha("a"))]},
    }
    assert (await result(node, "getModelInfo", {"model_id": "new-model"}))["shard_count"] == 2
    code, line = await refusal(
        node, "registerModel", {"transaction": hexed(signed(registration("new-model"), nonce=1))}
    )
    assert (code, "registered already" in line) == (CONFLICT, True)


async def test_set_core_model():
    node = FakeNode()
    given = {"transaction": hexed(signed(SetCoreModel("codegen-16b", "1")))}
    assert (await result(node, "setCoreModel", given, NOBODY))["model_id"] == "codegen-16b"
    for name, code in (("nothing", NOT_FOUND), ("old-model", CONFLICT)):
        given = {"transaction": hexed(signed(SetCoreModel(name, "1"), nonce=1))}
        assert (await refusal(node, "setCoreModel", given))[0] == code
    assert len(node.pool) == 1


async def test_send_raw_transaction():
    node = FakeNode()
    done = await result(node, "sendRawTransaction", [hexed(signed(registration("new-model")))], NOBODY)
    assert list(done) == ["transaction_hash"]
    assert len(node.pool) == 1


async def test_each_method_takes_its_own_call_only():
    node = FakeNode()
    registering, setting = hexed(signed(registration("new-model"))), hexed(signed(SetCoreModel("codegen-16b", "1")))
    assert (await refusal(node, "registerModel", [setting]))[0] == BAD_INPUT
    assert (await refusal(node, "setCoreModel", [registering]))[0] == BAD_INPUT
    assert node.pool == []


async def test_transactions_that_are_refused():
    node = FakeNode()
    good = signed(registration("new-model"))
    cases = {
        "no admin": (signed(registration("new-model"), key=PRO), NOT_ALLOWED),
        "wrong chain": (signed(registration("new-model"), chain_id=1), BAD_INPUT),
        "bad nonce": (signed(registration("new-model"), nonce=7), CONFLICT),
        "cut": (good[:-1], BAD_INPUT),
        "no transaction": (b"\xff" * 10, BAD_INPUT),
    }
    for name, (raw, code) in cases.items():
        assert (await refusal(node, "registerModel", [hexed(raw)]))[0] == code, name
    for text in ("0x", "0x0", "zz", "", "0x" + "00" * (1 << 20)):
        assert (await refusal(node, "sendRawTransaction", [text]))[0] == BAD_INPUT
    assert node.pool == []


async def test_transactions_of_one_batch_arrive_in_order():
    """Their nonces follow one another; side by side, some would come too early and be refused."""
    node = FakeNode()
    raws = [signed(registration(f"model-{nonce}"), nonce=nonce) for nonce in range(20)]
    calls = tuple(jsonrpc.Call("sendRawTransaction", [hexed(raw)], index) for index, raw in enumerate(raws))
    dispatcher = jsonrpc.Dispatcher(methods.table(node), 8, methods.ORDERED)
    answers = await dispatcher.answer_batch(jsonrpc.Batch(calls), methods.Context(NOBODY))
    assert [content["id"] for content in answers] == list(range(20))
    assert all("result" in content for content in answers)
    assert node.pool == raws


# Who may ask


OPEN = ["health", "listModels", "listNodes", "getChainInfo", "getBlock"]
KNOWN = ["getNodeInfo", "listShards"]
OPERATOR_ONLY = ["verifyShards", "freeSpace"]


@pytest.mark.parametrize("method", OPEN)
@pytest.mark.parametrize("caller", [NOBODY, as_(STRANGER), as_(BASIC), AS_OPERATOR])
async def test_open_methods(method, caller):
    await result(FakeNode(), method, caller=caller)


@pytest.mark.parametrize("method", KNOWN)
async def test_methods_for_known_accounts(method):
    for caller in (as_(BASIC), as_(TIERLESS), AS_OPERATOR):
        await result(FakeNode(), method, caller=caller)
    code, line = await refusal(FakeNode(), method, caller=NOBODY)
    assert (code, "aigen token" in line) == (NOT_ALLOWED, True)
    code, line = await refusal(FakeNode(), method, caller=as_(STRANGER))
    assert (code, "neither enrolled nor holds a tier" in line) == (NOT_ALLOWED, True)


@pytest.mark.parametrize("caller", [NOBODY, as_(STRANGER), as_(BASIC), as_(ADMIN)])
async def test_methods_for_the_operator(caller):
    node = FakeNode()
    for method, params in (
        ("verifyShards", {}),
        ("freeSpace", {"size": 1}),
        ("unloadModel", {"model_id": "mistral-7b"}),
    ):
        code, line = await refusal(node, method, params, caller)
        assert (code, "operator" in line) == (NOT_ALLOWED, True)


@pytest.mark.parametrize("method", ["loadModel", "checkTier", "getLoadState", "chatCompletion"])
@pytest.mark.parametrize("caller", [NOBODY, as_(STRANGER)])
async def test_unknown_askers_cause_nothing(method, caller):
    """Anyone can make a key and sign a token with it: no load, no transaction of the node's."""
    node = FakeNode()
    given = CHAT if method == "chatCompletion" else {"model_id": "mistral-7b"}
    assert (await refusal(node, method, given, caller))[0] == NOT_ALLOWED
    assert node.checks == []
    assert node.loads == {}


async def test_every_method_is_in_the_table_of_the_docstring():
    rows = [line.split("|")[1].strip() for line in methods.__doc__.splitlines() if line.startswith("| ")]
    assert sorted(name for name in rows if name not in {"", "method"}) == sorted(methods.table(FakeNode()))


# Loading


async def test_load_state_follows_a_load():
    node = FakeNode()
    named = {"model_id": "mistral-7b"}
    assert (await result(node, "getLoadState", named))["state"] == "absent"
    assert (await result(node, "loadModel", named))["state"] == "fetching"
    assert (await result(node, "getLoadState", named))["state"] == "fetching"
    loaded = await result(node, "loadModel", {**named, "wait": True})
    assert (loaded["state"], loaded["bytes_done"]) == ("loaded", loaded["bytes_total"])
    info = await result(node, "getNodeInfo")
    assert info["models"] == [loaded]
    assert "another hash" in info["state_alarms"][0]
    assert (await result(node, "unloadModel", named))["state"] == "absent"
    assert (await refusal(node, "unloadModel", named))[0] == CONFLICT
    assert node.checks == []


async def test_load_by_tier():
    node = FakeNode()
    assert (await result(node, "loadModel", {"model_id": "codegen-16b"}, as_(PRO)))["state"] == "fetching"
    for key, held in ((BASIC, "basic"), (TIERLESS, "none")):
        code, line = await refusal(node, "loadModel", {"model_id": "codegen-16b"}, as_(key))
        assert code == NOT_ALLOWED
        assert f"needs tier pro or higher and account {hexed(key.address)} holds {held}" in line
    assert [check.granted for check in node.checks] == [True, False, False]


async def test_a_retired_model_is_not_loaded_or_asked():
    node = FakeNode()
    assert (await refusal(node, "loadModel", {"model_id": "old-model"}))[0] == CONFLICT
    assert (await refusal(node, "chatCompletion", {**CHAT, "model_id": "old-model"}))[0] == CONFLICT
    assert (await result(node, "getModelInfo", {"model_id": "old-model"}))["retired"] is True


# Tiers


async def test_check_tier_is_recorded_once():
    node = FakeNode()
    check = await result(node, "checkTier", {"model_id": "mistral-7b"}, as_(BASIC))
    assert check == {
        "account": hexed(BASIC.address),
        "model_id": "mistral-7b",
        "version": "1",
        "held": "basic",
        "required": "basic",
        "granted": True,
        "until": NOW + 3600,
        "transaction_hash": hexed(sha("check 0")),
        "block_number": 7,
    }
    assert await result(node, "checkTier", {"model_id": "mistral-7b"}, as_(BASIC)) == check
    assert len(node.checks) == 1


async def test_check_tier_of_another_account():
    node = FakeNode()
    params = {"model_id": "mistral-7b", "account": hexed(BASIC.address)}
    assert (await result(node, "checkTier", params))["granted"] is True
    assert (await refusal(node, "checkTier", params, as_(PRO)))[0] == NOT_ALLOWED
    params = {"model_id": "mistral-7b", "account": hexed(STRANGER.address)}
    assert (await refusal(node, "checkTier", params))[0] == NOT_ALLOWED
    assert len(node.checks) == 1


# Shards of this node


async def test_list_and_verify_shards():
    node = FakeNode()
    shards = await result(node, "listShards")
    assert len(shards) == 4
    assert shards[0]["shard_hash"] == hexed(sha("mistral-7b 1 0"))
    assert await result(node, "listShards", {"model_id": "codegen-16b"}) == []
    assert (await refusal(node, "listShards", {"model_id": "nothing"}))[0] == NOT_FOUND
    checked = await result(node, "verifyShards")
    assert [check["bad_pieces"] for check in checked] == [[], [], [], []]
    assert await result(node, "verifyShards", {"model_id": "codegen-16b"}) == []
    assert (await refusal(node, "verifyShards", {"model_id": "nothing"}))[0] == NOT_FOUND


async def test_free_space():
    node = FakeNode()
    (size, *_) = [shard["size"] for shard in await result(node, "listShards")]
    freed = await result(node, "freeSpace", {"size": size + 1})
    assert [(shard["shard_index"], shard["size"]) for shard in freed] == [(0, size), (1, size)]
    for bad in (0, -1):
        code, line = await refusal(node, "freeSpace", {"size": bad})
        assert (code, "above 0" in line) == (BAD_INPUT, True)
    assert (await refusal(node, "freeSpace", {}))[0] == BAD_INPUT


# Chat


async def test_chat_completion():
    node = FakeNode()
    node.written = None
    assert await result(node, "chatCompletion", CHAT, as_(BASIC)) == {
        "model_id": "mistral-7b",
        "version": "1",
        "message": {"role": "assistant", "content": "one two three"},
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    assert len(node.checks) == 1


async def test_chat_parameters_reach_the_engine():
    done = await result(FakeNode(), "chatCompletion", {**CHAT, "max_tokens": 2, "stop": "x", "seed": 1, "top_k": 3})
    assert done["message"]["content"] == "one two"


async def test_probabilities_and_a_schema():
    node = FakeNode()
    more = {"max_tokens": 1, "logprobs": 1, "json_schema": {"type": "object"}}
    done = await result(node, "chatCompletion", {**CHAT, **more})
    one = {"token": "one", "bytes": [111, 110, 101], "logprob": -1.5}
    assert done["logprobs"] == [{**one, "top_logprobs": [one]}]
    assert json.loads(node.parameters[0].json_schema or "") == {"type": "object"}


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": 1e9},
        {"top_p": 0},
        {"logprobs": 21},
        {"json_schema": "{}"},
        {"json_schema": {"enum": ["x" * 70_000]}},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 1 << 63},
        {"stop": ""},
        {"stop": ["x"] * 17},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": "hello"},
        {"tempreature": 1},
    ],
)
async def test_chat_parameters_out_of_range(more):
    node = FakeNode()
    assert (await refusal(node, "chatCompletion", {**CHAT, **more}))[0] == BAD_INPUT
    assert node.checks == []


async def test_chat_by_tier():
    """The tier decides for the operator's account too: who may use a model is said on the ledger."""
    node = FakeNode()
    for caller in (as_(TIERLESS), as_(BASIC), AS_OPERATOR):
        assert (await refusal(node, "chatCompletion", {**CHAT, "model_id": "codegen-16b"}, caller))[0] == NOT_ALLOWED
    await result(node, "chatCompletion", {**CHAT, "model_id": "codegen-16b"}, as_(PRO))


async def test_a_stream_needs_someone_to_send_to():
    assert (await refusal(FakeNode(), "chatCompletion", {**CHAT, "stream": True}))[0] == BAD_INPUT


# Receipts


async def test_an_answer_carries_its_receipt():
    node = FakeNode()
    receipt = (await result(node, "chatCompletion", CHAT, as_(BASIC)))["receipt"]
    found = receipts.decode(json.dumps(receipt).encode())
    assert found.node_id == IDENTITY.node_id
    assert (receipt["account"], receipt["model_id"], receipt["version"]) == (hexed(BASIC.address), "mistral-7b", "1")
    assert (receipt["check_transaction_hash"], receipt["check_block_number"]) == (hexed(sha("check 0")), 7)
    assert receipt["prompt_hash"] == receipts.prompt_hash((Message("user", "one two three"),))
    assert receipt["answer_hash"] == hexed(sha("one two three"))
    asked = {"receipt_id": receipt["receipt_id"]}
    assert len(bytes.fromhex(receipt["receipt_id"])) == 16
    for caller in (as_(BASIC), AS_OPERATOR):
        assert await result(node, "getReceipt", asked, caller) == receipt
    again = (await result(node, "chatCompletion", CHAT, as_(BASIC)))["receipt"]
    assert again["receipt_id"] != receipt["receipt_id"]


async def test_a_receipt_is_nobody_elses():
    node = FakeNode()
    receipt = (await result(node, "chatCompletion", CHAT, as_(BASIC)))["receipt"]
    asked = {"receipt_id": receipt["receipt_id"]}
    code, line = await refusal(node, "getReceipt", asked, as_(PRO))
    assert (code, line) == await refusal(node, "getReceipt", asked, as_(STRANGER))
    assert code == NOT_FOUND
    assert line.replace(receipt["receipt_id"], "x") == (await refusal(node, "getReceipt", ["x"]))[1]
    assert "has written 10,000 later ones" in line
    assert (await refusal(node, "getReceipt", asked, NOBODY))[0] == NOT_ALLOWED


async def test_who_lost_the_tier_still_gets_the_receipt():
    node = FakeNode()
    receipt = (await result(node, "chatCompletion", CHAT, as_(BASIC)))["receipt"]
    node._accounts.clear()
    assert await result(node, "getReceipt", [receipt["receipt_id"]], as_(BASIC)) == receipt


async def test_receipts_switched_off():
    node = FakeNode()
    receipt = (await result(node, "chatCompletion", CHAT))["receipt"]
    node.written = None
    assert "receipt" not in await result(node, "chatCompletion", CHAT)
    code, line = await refusal(node, "getReceipt", [receipt["receipt_id"]])
    assert code == NOT_FOUND
    assert "inference.receipts is false" in line


# Errors


async def test_a_bug_tells_the_client_nothing_of_the_inside(caplog):
    node = FakeNode()
    messages = [{"role": "user", "content": "crash"}]
    code, line = await refusal(node, "chatCompletion", {**CHAT, "messages": messages})
    assert (code, "/secret/path" in line) == (-32603, False)
    assert "/secret/path" in caplog.text


async def test_a_refusal_is_one_line():
    messages = [{"role": "user", "content": "two lines"}]
    assert await refusal(FakeNode(), "chatCompletion", {**CHAT, "messages": messages}) == (BAD_INPUT, "first second")
