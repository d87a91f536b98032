"""The typed calls: what a transaction may ask of the contracts.

Owns one frozen value for each state-changing function of the ABI (same arguments, same order: a test compares them)
and their encoding as call data. The rules are the contracts' own; here only what the ABI cannot carry is refused early
(a text or list over its bound would revert without a reason). Knows no key, no nonce and no gas.
Sizes are bytes, `until` is a Unix time in seconds, a duration ends in `_s`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, Final, get_args

import msgspec

from contracts.abi import SELECTOR_BYTES, FunctionAbi, contracts, decode_values, encode_values
from contracts.addresses import ADDRESSES, CONTRACT_AT, ContractName
from contracts.errors import BadInput
from contracts.limits import ITEMS_MAX, TEXT_BYTES_MAX
from contracts.types import Address, EvidenceHash, ManifestHash, ModelId, NodeId, ShardHash, Version

ERROR_SELECTOR: Final = bytes.fromhex("08c379a0")
"""Of `Error(string)`, which a revert with a reason returns."""

PANIC_SELECTOR: Final = bytes.fromhex("4e487b71")
"""Of `Panic(uint256)`, which other compilers return for a failed internal check."""

NO_REASON: Final = "the contract refused without a reason (malformed arguments or out of gas)"
"""What `revert_reason` says of any other output."""


class _Call(msgspec.Struct, frozen=True):
    """What all calls share."""

    contract: ClassVar[ContractName]
    function: ClassVar[str]

    @property
    def to(self) -> Address:
        """The contract's address on a network of our own."""
        return ADDRESSES[self.contract]

    def encode(self) -> bytes:
        """The transaction's data. Raises BadInput for a value that its argument cannot hold."""
        abi = contracts()[self.contract].functions[self.function]
        values = [getattr(self, argument) for argument in abi.arguments]
        for argument, value in zip(abi.arguments, values, strict=True):
            _require_bounds(argument, value)
        return abi.selector + encode_values(abi.types, values)


def _require_bounds(argument: str, value: object) -> None:
    texts: tuple[object, ...] = (value,)
    if argument in ITEMS_MAX and isinstance(value, tuple | list):
        if len(value) > ITEMS_MAX[argument]:
            raise BadInput(f"{argument} has {len(value)} items, at most {ITEMS_MAX[argument]} fit: send fewer at once")
        texts = tuple(value)
    for text in texts:
        if isinstance(text, str) and len(text.encode("utf-8", "surrogatepass")) > TEXT_BYTES_MAX[argument]:
            size = len(text.encode("utf-8", "surrogatepass"))
            raise BadInput(f"{argument} has {size} bytes, at most {TEXT_BYTES_MAX[argument]} fit: shorten it")


# Accounts


class EnrolAccounts(_Call, frozen=True):
    """Let accounts send transactions: 1 to 256 of them, none enrolled yet. By an admin."""

    contract = "Accounts"
    function = "enrol"
    accounts: tuple[Address, ...]


class ExpelAccount(_Call, frozen=True):
    """Take back an account's right to send; not an admin's or authority's. By an admin."""

    contract = "Accounts"
    function = "expel"
    account: Address


class AddAdmin(_Call, frozen=True):
    """Make an account an admin. By an admin."""

    contract = "Accounts"
    function = "add_admin"
    account: Address


class RemoveAdmin(_Call, frozen=True):
    """Take an admin's rights back; never the last one's. By an admin."""

    contract = "Accounts"
    function = "remove_admin"
    account: Address


class AddAuthority(_Call, frozen=True):
    """Let an account propose blocks and vote; at most 31 do. By an admin."""

    contract = "Accounts"
    function = "add_authority"
    account: Address


class RemoveAuthority(_Call, frozen=True):
    """Take an account's vote back; never the last one's. By an admin. `evidence` names a proof that it lied."""

    contract = "Accounts"
    function = "remove_authority"
    account: Address
    evidence: EvidenceHash = EvidenceHash(bytes(32))


# Tiers


class DefineTier(_Call, frozen=True):
    """Add a tier with a rank of its own (1 to 255), or change one's recommended cache in bytes. By an admin."""

    contract = "Tiers"
    function = "define"
    name: str
    rank: int
    cache_size: int


class GrantTier(_Call, frozen=True):
    """Let an account hold a tier before the second `until`, which lies in the future. By an admin."""

    contract = "Tiers"
    function = "grant"
    account: Address
    tier: str
    until: int


class RevokeTier(_Call, frozen=True):
    """Take an account's tier. By an admin."""

    contract = "Tiers"
    function = "revoke"
    account: Address


class SetCheckPeriod(_Call, frozen=True):
    """How long a tier check holds, 1 second to 366 days. By an admin."""

    contract = "Tiers"
    function = "set_check_period"
    period_s: int


class CheckTier(_Call, frozen=True):
    """Record whether an account may use a model. By an operator of a member node, or the account; enrolled."""

    contract = "Tiers"
    function = "check"
    account: Address
    model_id: ModelId
    version: Version


# Models


class RegisterModel(_Call, frozen=True):
    """Register a model once and for all. By an admin.

    `shard_count` is ceil(total_size / shard_size) and the number of `shard_hashes` (1 to 1024); `shard_size` is a
    multiple of 1 MiB; no hash is zero; `metadata` is printable ASCII, by custom a JSON object.
    """

    contract = "Models"
    function = "register"
    model_id: ModelId
    version: Version
    total_size: int
    shard_size: int
    shard_count: int
    shard_hashes: tuple[ShardHash, ...]
    manifest_hash: ManifestHash
    minimum_tier: str
    core: bool
    architecture: str
    metadata: str


class RetireModel(_Call, frozen=True):
    """Withdraw a model from use for good; not the core model. By an admin."""

    contract = "Models"
    function = "retire"
    model_id: ModelId
    version: Version


class SetPublic(_Call, frozen=True):
    """Let a model in use be served to nodes that are no members, or no longer. By an admin."""

    contract = "Models"
    function = "set_public"
    model_id: ModelId
    version: Version
    is_public: bool


class SetCoreModel(_Call, frozen=True):
    """Make a model in use the core model. By an admin."""

    contract = "Models"
    function = "set_core"
    model_id: ModelId
    version: Version


# Members


class JoinNode(_Call, frozen=True):
    """Enter a node (`worker`, `storage` or `gateway`) with up to 8 endpoints, or update it. By an enrolled account."""

    contract = "Members"
    function = "join"
    node_id: NodeId
    role: str
    endpoints: tuple[str, ...]


class LeaveNode(_Call, frozen=True):
    """Take a node out. By its operator or an admin."""

    contract = "Members"
    function = "leave"
    node_id: NodeId


class RenewLease(_Call, frozen=True):
    """Say that a node is there, with room for so many more bytes of shards. By its operator, enrolled."""

    contract = "Members"
    function = "renew"
    node_id: NodeId
    room: int


# Shards


class AnnounceShards(_Call, frozen=True):
    """Say that a node holds shards of a model in use; indices strictly ascending. By its operator, enrolled."""

    contract = "Shards"
    function = "announce"
    node_id: NodeId
    model_id: ModelId
    version: Version
    shard_indices: tuple[int, ...]


class WithdrawShards(_Call, frozen=True):
    """Say that a node holds shards no longer; indices strictly ascending. By its operator or an admin."""

    contract = "Shards"
    function = "withdraw"
    node_id: NodeId
    model_id: ModelId
    version: Version
    shard_indices: tuple[int, ...]


class AddMirror(_Call, frozen=True):
    """Name a place (`http` or `ipfs`) that serves a model's bytes; at most 64 a model. By an admin."""

    contract = "Shards"
    function = "add_mirror"
    model_id: ModelId
    version: Version
    backend: str
    uri: str


class RemoveMirror(_Call, frozen=True):
    """Take a mirror out. By an admin."""

    contract = "Shards"
    function = "remove_mirror"
    model_id: ModelId
    version: Version
    backend: str
    uri: str


Call = (
    EnrolAccounts
    | ExpelAccount
    | AddAdmin
    | RemoveAdmin
    | AddAuthority
    | RemoveAuthority
    | DefineTier
    | GrantTier
    | RevokeTier
    | SetCheckPeriod
    | CheckTier
    | RegisterModel
    | RetireModel
    | SetPublic
    | SetCoreModel
    | JoinNode
    | LeaveNode
    | RenewLease
    | AnnounceShards
    | WithdrawShards
    | AddMirror
    | RemoveMirror
)

CALL_TYPES: Final[tuple[type[Any], ...]] = get_args(Call)
"""All calls."""


@cache
def _by_selector() -> Mapping[tuple[ContractName, bytes], tuple[type[Any], FunctionAbi]]:
    abis = {t: contracts()[t.contract].functions[t.function] for t in CALL_TYPES}
    return {(t.contract, abi.selector): (t, abi) for t, abi in abis.items()}


def decode_call(to: bytes, data: bytes) -> Call | None:
    """The call that a transaction makes, or None when it is none of ours or its arguments do not decode."""
    contract = CONTRACT_AT.get(Address(bytes(to)))
    known = _by_selector().get((contract, bytes(data[:SELECTOR_BYTES]))) if contract else None
    if known is None:
        return None
    call_type, abi = known
    try:
        call: Call = call_type(*decode_values(abi.types, bytes(data[SELECTOR_BYTES:])))
    except BadInput:
        return None  # the contract reverts on such data: it is a transaction, but not one of these calls
    return call


def revert_reason(output: bytes) -> str:
    """Why a call reverted, from what it returned; always some words, whatever the bytes."""
    selector, rest = output[:SELECTOR_BYTES], output[SELECTOR_BYTES:]
    try:
        if selector == ERROR_SELECTOR:
            return str(decode_values(["string"], rest)[0]) or NO_REASON
        if selector == PANIC_SELECTOR:
            return f"the contract failed with panic code {decode_values(['uint256'], rest)[0]}"
    except BadInput:
        return NO_REASON  # a contract that is not ours may return anything under these selectors
    return NO_REASON
