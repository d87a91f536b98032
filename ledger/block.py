"""A sealed block as it travels and is kept: header, raw transactions, certificate; and the checks before execution.

Knows no storage and no EVM: everything here is cheap, so that a bad block costs its sender more than us.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from eth.constants import POST_MERGE_NONCE
from eth.vm.forks.cancun.blocks import CancunBlockHeader

from contracts.errors import BadPeer, Busy
from contracts.types import Address
from genesis.config import GenesisConfig
from ledger.accounts import Accounts
from ledger.seal import Certificate, check_seal, decode_header
from ledger.transactions import Transaction, check_enrolled

BLOCK_BYTES_MAX = 4 << 20
PROPOSED_TRANSACTIONS_BYTES_MAX = 2 << 20
"""What we put into a block ourselves: the header, the certificate and the lengths always fit beside it."""

BLOCK_TRANSACTIONS_MAX = 1024
BLOCK_SENDER_TRANSACTIONS_MAX = 64
"""One account's share of a block: no account can crowd the others out of more than this."""

EXECUTION_DECIDES = frozenset({"state_root", "transaction_root", "receipt_root", "bloom", "gas_used"})
"""Header fields."""

CLOCK_DRIFT_S_MAX = 15
"""How far ahead of our clock a block's timestamp may lie."""


class SealedBlock(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A final block: RLP header, raw transactions in order, certificate."""

    header_rlp: bytes
    transactions: tuple[bytes, ...]
    certificate: Certificate

    def header(self) -> CancunBlockHeader:
        """Raises BadPeer when the bytes are no Cancun header within the limits."""
        return decode_header(self.header_rlp)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


def decode(data: bytes) -> SealedBlock:
    """Raises BadPeer for anything that is not one sealed block within the limits."""
    if len(data) > BLOCK_BYTES_MAX:
        raise BadPeer(f"a block of {len(data)} bytes, at most {BLOCK_BYTES_MAX} are taken")
    try:
        block = msgspec.msgpack.decode(data, type=SealedBlock)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadPeer(f"not a sealed block: {error}") from error
    if len(block.transactions) > BLOCK_TRANSACTIONS_MAX:
        raise BadPeer(f"a block of {len(block.transactions)} transactions, at most {BLOCK_TRANSACTIONS_MAX} are taken")
    return block


def child_header(parent: CancunBlockHeader, timestamp: int, proposer: Address, extra_data: bytes) -> CancunBlockHeader:
    """The header of an empty child: every field that execution does not decide. The base fee stays 0 whatever the
    parent used: there is no coin, so EIP-1559's rule for it does not apply here."""
    return CancunBlockHeader(
        difficulty=0,
        block_number=parent.block_number + 1,
        gas_limit=parent.gas_limit,
        timestamp=timestamp,
        coinbase=proposer,
        parent_hash=parent.hash,
        state_root=parent.state_root,
        extra_data=extra_data,
        nonce=POST_MERGE_NONCE,
        base_fee_per_gas=0,
    )


def earliest_timestamp(parent: CancunBlockHeader, config: GenesisConfig) -> int:
    """The first second a child of `parent` may bear: the EVM's timestamps are whole seconds and must grow."""
    return int(parent.timestamp) + max(1, config.network.period_s)


def check_header(
    header: CancunBlockHeader,
    parent: CancunBlockHeader,
    epoch: bytes,
    accounts: Accounts,
    config: GenesisConfig,
    now: float,
) -> None:
    """Everything that a header shows before execution; `accounts` has the authorities of `epoch`. Raises BadPeer,
    BadInput for a signature that is none, or Busy when it is of a time that our clock has not reached."""
    number = header.block_number
    if header.parent_hash != parent.hash:
        raise BadPeer(f"block {number}: its parent is 0x{header.parent_hash.hex()}, ours is 0x{parent.hash.hex()}")
    proposer = check_seal(header, parent, epoch, tuple(accounts.authorities))
    if header.timestamp > now + CLOCK_DRIFT_S_MAX:
        # It may as well be our clock that is slow: no offence, and another time it may be fine.
        ahead = f"{header.timestamp - now:.0f} s ahead of our clock, at most {CLOCK_DRIFT_S_MAX}"
        raise Busy(f"block {number}: {ahead}: is the time of this machine right?")
    if header.timestamp < (earliest := earliest_timestamp(parent, config)):
        raise BadPeer(f"block {number}: its timestamp {header.timestamp} is before {earliest}, the earliest allowed")
    template = child_header(parent, header.timestamp, proposer, header.extra_data)
    if _without_execution(header) != _without_execution(template):
        raise BadPeer(f"block {number}: a header field has a value this ledger does not allow")


def _without_execution(header: CancunBlockHeader) -> dict[str, object]:
    """The header's fields but for those that execution decides."""
    return {name: value for name, value in header.as_dict().items() if name not in EXECUTION_DECIDES}


def check_transactions(transactions: Sequence[Transaction], accounts: Accounts) -> None:
    """Raise NotAllowed or BadPeer unless every sender is enrolled and keeps to its share."""
    for transaction in transactions:
        check_enrolled(transaction, accounts.enrolled.__contains__)
    if transactions:
        sender, count = Counter(transaction.sender for transaction in transactions).most_common(1)[0]
        if count > BLOCK_SENDER_TRANSACTIONS_MAX:
            raise BadPeer(
                f"{count} transactions of 0x{sender.hex()} in one block, at most {BLOCK_SENDER_TRANSACTIONS_MAX}"
            )
