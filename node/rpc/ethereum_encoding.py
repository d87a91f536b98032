"""Blocks, transactions, receipts, logs and proofs as the objects of Ethereum's JSON-RPC. Knows no method and no ledger.

The names and encodings are those of the execution-apis specification (https://github.com/ethereum/execution-apis):
quantities are hex without leading zeros, everything else is hex of whole bytes.

One thing differs. Ethereum bounds `extraData` to 32 bytes, and web3.py refuses a block with more; here the proposer's
65-byte signature stands behind those 32. So `extraData` has the 32 bytes that the signature covers and the member
`seal` the signature: the block's hash is that of the header with both, one after the other.
"""

from __future__ import annotations

from typing import Any

from ledger.history import FinalBlock, FoundLog, locate
from ledger.receipts import TransactionReceipt
from ledger.record import BlockRecord
from ledger.seal import UNSEALED_SIZE
from ledger.transactions import DYNAMIC_FEE_TYPE, Transaction
from ledger.view import AccountProof

BLOOM_SIZE = 256
WORD_SIZE = 32

WALLET_PARITY_OFFSET = 35
"""A legacy transaction's v is this, twice the chain id and the y parity together (EIP-155)."""

Object = dict[str, Any]


def quantity(value: int) -> str:
    return hex(value)


def data(value: bytes) -> str:
    return f"0x{value.hex()}"


def word(value: int) -> str:
    """A number as 32 bytes."""
    return data(value.to_bytes(WORD_SIZE, "big"))


def header(found: Any) -> Object:
    """A block without its transactions, from py-evm's Cancun header; what `newHeads` tells."""
    return {
        "number": quantity(found.block_number),
        "hash": data(found.hash),
        "parentHash": data(found.parent_hash),
        "sha3Uncles": data(found.uncles_hash),
        "miner": data(found.coinbase),
        "stateRoot": data(found.state_root),
        "transactionsRoot": data(found.transaction_root),
        "receiptsRoot": data(found.receipt_root),
        "logsBloom": data(found.bloom.to_bytes(BLOOM_SIZE, "big")),
        "difficulty": quantity(found.difficulty),
        "gasLimit": quantity(found.gas_limit),
        "gasUsed": quantity(found.gas_used),
        "timestamp": quantity(found.timestamp),
        "extraData": data(found.extra_data[:UNSEALED_SIZE]),
        "seal": data(found.extra_data[UNSEALED_SIZE:]),
        "mixHash": data(found.mix_hash),
        "nonce": data(found.nonce),
        "baseFeePerGas": quantity(found.base_fee_per_gas),
        "withdrawalsRoot": data(found.withdrawals_root),
        "blobGasUsed": quantity(found.blob_gas_used),
        "excessBlobGas": quantity(found.excess_blob_gas),
        "parentBeaconBlockRoot": data(found.parent_beacon_block_root),
    }


def block(found: FinalBlock, transactions: list[Object] | None) -> Object:
    """A block with these full transactions, or with their hashes. Genesis has a record, but no transactions."""
    hashes = [data(record.hash) for record in found.record.transactions[: len(found.raw_transactions)]]
    return {
        **header(found.header),
        "size": quantity(found.size_bytes),
        "transactions": hashes if transactions is None else transactions,
        "uncles": [],
        "withdrawals": [],
    }


def transaction(found: Transaction, record: BlockRecord | None, index: int) -> Object:
    """A signed transaction, and where it stands; without a record it waits in the pool."""
    signed = found.signed
    kind = signed.type_id or 0
    content: Object = {
        "blockHash": None if record is None else data(record.hash),
        "blockNumber": None if record is None else quantity(record.number),
        "transactionIndex": None if record is None else quantity(index),
        "hash": data(found.hash),
        "from": data(found.sender),
        "to": data(found.to),
        "type": quantity(kind),
        "nonce": quantity(found.nonce),
        "gas": quantity(found.gas),
        "gasPrice": quantity(signed.max_fee_per_gas),
        "value": quantity(signed.value),
        "input": data(found.data),
        "chainId": quantity(signed.chain_id),
        "r": quantity(signed.r),
        "s": quantity(signed.s),
    }
    if kind == DYNAMIC_FEE_TYPE:
        content |= {
            "v": quantity(signed.y_parity),
            "yParity": quantity(signed.y_parity),
            "maxFeePerGas": quantity(signed.max_fee_per_gas),
            "maxPriorityFeePerGas": quantity(signed.max_priority_fee_per_gas),
            "accessList": [
                {"address": data(bytes(account)), "storageKeys": [word(slot) for slot in slots]}
                for account, slots in signed.access_list
            ],
        }
    else:
        content["v"] = quantity(WALLET_PARITY_OFFSET + 2 * signed.chain_id + signed.y_parity)
    return content


def receipt(found: TransactionReceipt, record: BlockRecord, index: int) -> Object:
    ended = record.transactions[index]
    return {
        "type": quantity(found.type),
        "transactionHash": data(ended.hash),
        "transactionIndex": quantity(index),
        "blockHash": data(record.hash),
        "blockNumber": quantity(record.number),
        "from": data(ended.sender),
        "to": data(ended.to),
        "cumulativeGasUsed": quantity(found.gas_used_after),
        "gasUsed": quantity(found.gas_used_after - found.gas_used_before),
        "effectiveGasPrice": quantity(0),
        "contractAddress": None,
        "status": quantity(int(found.succeeded)),
        "logsBloom": data(found.bloom),
        "logs": [log(entry) for entry in locate(found, record)],
    }


def log(found: FoundLog) -> Object:
    return {
        "address": data(found.log.address),
        "topics": [data(topic) for topic in found.log.topics],
        "data": data(found.log.data),
        "blockNumber": quantity(found.block_number),
        "blockHash": data(found.block_hash),
        "blockTimestamp": quantity(found.timestamp),
        "transactionHash": data(found.transaction_hash),
        "transactionIndex": quantity(found.log.transaction_index),
        "logIndex": quantity(found.log.index),
        "removed": False,
    }


def proof(found: AccountProof, keys: tuple[str, ...]) -> Object:
    """An account's proof (EIP-1186); `keys` are the slots as they were asked for."""
    return {
        "address": data(found.address),
        "accountProof": [data(node) for node in found.nodes],
        "balance": quantity(found.balance),
        "codeHash": data(found.code_hash),
        "nonce": quantity(found.nonce),
        "storageHash": data(found.storage_root),
        "storageProof": [
            {"key": key, "value": quantity(slot.value), "proof": [data(node) for node in slot.nodes]}
            for key, slot in zip(keys, found.storage, strict=True)
        ],
    }
