"""The rules of execution-apis' schemas as small checks: what each member of an answer looks like, and that none is left
out or made up. Source: src/schemas of https://github.com/ethereum/execution-apis."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _matches(pattern: str) -> Check:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


QUANTITY = _matches(r"0x(0|[1-9a-f][0-9a-f]*)")
DATA = _matches(r"0x([0-9a-f]{2})*")
BYTES_32_MAX = _matches(r"0x([0-9a-f]{2}){0,32}")
HASH = _matches(r"0x[0-9a-f]{64}")
ADDRESS = _matches(r"0x[0-9a-fA-F]{40}")
BYTES_8 = _matches(r"0x[0-9a-f]{16}")
BLOOM = _matches(r"0x[0-9a-f]{512}")
SIGNATURE = _matches(r"0x([0-9a-f]{130})?")


def NULL(value: Any) -> bool:
    return value is None


def FALSE(value: Any) -> bool:
    return value is False


def each(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def has(members: Mapping[str, Check]) -> Check:
    def check(value: Any) -> bool:
        assert value.keys() == members.keys(), f"{sorted(value.keys() ^ members.keys())} are too many or too few"
        for name, rule in members.items():
            assert rule(value[name]), f"{name} is {value[name]!r}"
        return True

    return check


LOG = has(
    {
        "address": ADDRESS,
        "topics": each(HASH),
        "data": DATA,
        "blockNumber": QUANTITY,
        "blockHash": HASH,
        "blockTimestamp": QUANTITY,
        "transactionHash": HASH,
        "transactionIndex": QUANTITY,
        "logIndex": QUANTITY,
        "removed": FALSE,
    }
)

RECEIPT = has(
    {
        "type": QUANTITY,
        "transactionHash": HASH,
        "transactionIndex": QUANTITY,
        "blockHash": HASH,
        "blockNumber": QUANTITY,
        "from": ADDRESS,
        "to": ADDRESS,
        "cumulativeGasUsed": QUANTITY,
        "gasUsed": QUANTITY,
        "effectiveGasPrice": QUANTITY,
        "contractAddress": NULL,
        "status": QUANTITY,
        "logsBloom": BLOOM,
        "logs": each(LOG),
    }
)

_SIGNED = {
    "hash": HASH,
    "from": ADDRESS,
    "to": ADDRESS,
    "type": QUANTITY,
    "nonce": QUANTITY,
    "gas": QUANTITY,
    "gasPrice": QUANTITY,
    "value": QUANTITY,
    "input": DATA,
    "chainId": QUANTITY,
    "v": QUANTITY,
    "r": QUANTITY,
    "s": QUANTITY,
}
_IN_BLOCK = {"blockHash": HASH, "blockNumber": QUANTITY, "transactionIndex": QUANTITY}
_IN_POOL = {"blockHash": NULL, "blockNumber": NULL, "transactionIndex": NULL}
_DYNAMIC_FEE = {
    "yParity": QUANTITY,
    "maxFeePerGas": QUANTITY,
    "maxPriorityFeePerGas": QUANTITY,
    "accessList": each(has({"address": ADDRESS, "storageKeys": each(HASH)})),
}

LEGACY_TRANSACTION = has(_SIGNED | _IN_BLOCK)
TRANSACTION = has(_SIGNED | _IN_BLOCK | _DYNAMIC_FEE)
PENDING_TRANSACTION = has(_SIGNED | _IN_POOL | _DYNAMIC_FEE)

_HEADER = {
    "number": QUANTITY,
    "hash": HASH,
    "parentHash": HASH,
    "sha3Uncles": HASH,
    "miner": ADDRESS,
    "stateRoot": HASH,
    "transactionsRoot": HASH,
    "receiptsRoot": HASH,
    "logsBloom": BLOOM,
    "difficulty": QUANTITY,
    "gasLimit": QUANTITY,
    "gasUsed": QUANTITY,
    "timestamp": QUANTITY,
    "extraData": BYTES_32_MAX,
    "seal": SIGNATURE,  # the one member that is ours: see node.rpc.ethereum_encoding
    "mixHash": HASH,
    "nonce": BYTES_8,
    "baseFeePerGas": QUANTITY,
    "withdrawalsRoot": HASH,
    "blobGasUsed": QUANTITY,
    "excessBlobGas": QUANTITY,
    "parentBeaconBlockRoot": HASH,
}
_BODY = {"size": QUANTITY, "uncles": each(HASH), "withdrawals": each(NULL)}

HEADER = has(_HEADER)
BLOCK = has(_HEADER | _BODY | {"transactions": each(HASH)})
FULL_BLOCK = has(_HEADER | _BODY | {"transactions": each(TRANSACTION)})

PROOF = has(
    {
        "address": ADDRESS,
        "accountProof": each(DATA),
        "balance": QUANTITY,
        "codeHash": HASH,
        "nonce": QUANTITY,
        "storageHash": HASH,
        "storageProof": each(has({"key": BYTES_32_MAX, "value": QUANTITY, "proof": each(DATA)})),
    }
)

FEE_HISTORY = has(
    {
        "oldestBlock": QUANTITY,
        "baseFeePerGas": each(QUANTITY),
        "gasUsedRatio": each(lambda value: isinstance(value, float) and 0 <= value <= 1),
        "baseFeePerBlobGas": each(QUANTITY),
        "blobGasUsedRatio": each(lambda value: isinstance(value, float) and value == 0),
        "reward": each(each(QUANTITY)),
    }
)
