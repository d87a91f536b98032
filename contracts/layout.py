"""Where the contracts keep what a proof of state reads: the storage slots of a few variables.

Owns those slots and what they hold while an event still stands; tests hold them against the compiler and the compiled
code. The layout is Vyper's (https://docs.vyperlang.org/en/v0.4.3/scoping-and-declarations.html): a list is its length
and then its items, a text its length and then its bytes, a map's value lies at keccak256(slot, key), where a text
stands for its own keccak256. A slot is a number below 2^256, and so is what it holds. Knows no trie and no chain.
"""

from collections.abc import Callable
from typing import Final

from eth_hash.auto import keccak

from contracts.addresses import ContractName
from contracts.errors import BadInput
from contracts.events import ContractEvent, ModelRegistered, TierGranted
from contracts.limits import AUTHORITIES_MAX
from contracts.types import Address

WORD: Final = 32
"""Bytes of a slot."""

AUTHORITIES_SLOT: Final = 4
"""`Accounts._authorities`."""

MODELS_SLOT: Final = 0
"""`Models._models`."""

GRANTS_SLOT: Final = 3
"""`Tiers.grant_of`."""

MODEL_SHARD_COUNT, MODEL_RETIRED, MODEL_MANIFEST_HASH = 0, 1, 3
"""Places of a Model's fields after its first slot."""

GRANT_TIER, GRANT_UNTIL = 0, 3
"""Places of a Grant's fields after its first slot; a text of up to 64 bytes takes three."""

ReadSlot = Callable[[int], int]
"""What a contract's storage holds in a slot; 0 where nothing was written."""


def authorities(read: ReadSlot) -> tuple[Address, ...]:
    """All authorities in the order they were added, out of the storage of Accounts.

    Raises BadInput for what the contract never stores.
    """
    count = read(AUTHORITIES_SLOT)
    if not 0 < count <= AUTHORITIES_MAX:
        raise BadInput(f"the state has {count} authorities, a ledger has 1 to {AUTHORITIES_MAX}")
    words = [read(AUTHORITIES_SLOT + 1 + i) for i in range(count)]
    if any(word >> 160 for word in words):
        raise BadInput("the state has an authority that is no address")
    return tuple(Address(word.to_bytes(20)) for word in words)


def standing_in(event: ContractEvent) -> ContractName | None:
    """The contract whose storage tells whether what an event says was taken back; None when none does: an announcement
    lives in the log only."""
    match event:
        case ModelRegistered():
            return "Models"
        case TierGranted():
            return "Tiers"
        case _:
            return None


def stands(event: ContractEvent, read: ReadSlot) -> bool:
    """Whether the storage of `standing_in(event)` still says what the event says."""
    match event:
        case ModelRegistered():
            first = _entry(_entry(MODELS_SLOT, keccak(event.model_id.encode())), keccak(event.version.encode()))
            return (
                read(first + MODEL_SHARD_COUNT) == event.shard_count
                and read(first + MODEL_RETIRED) == 0
                and read(first + MODEL_MANIFEST_HASH) == int.from_bytes(event.manifest_hash)
            )
        case TierGranted():
            first = _entry(GRANTS_SLOT, event.account.rjust(WORD, b"\0"))
            return read(first + GRANT_UNTIL) == event.until and _has_text(read, first + GRANT_TIER, event.tier.encode())
    raise AssertionError(f"no storage tells of {type(event).__name__}")


def _has_text(read: ReadSlot, slot: int, text: bytes) -> bool:
    """Whether a text lies at a slot. Only its own bytes are compared: what was longer before leaves its end behind."""
    if read(slot) != len(text):
        return False
    starts = range(0, len(text), WORD)
    words = [read(slot + 1 + i).to_bytes(WORD) for i in range(len(starts))]
    return b"".join(words)[: len(text)] == text


def _entry(slot: int, key: bytes) -> int:
    """The first slot of a map's value."""
    return int.from_bytes(keccak(slot.to_bytes(WORD) + key))
