"""Where the contracts keep what a proof of state reads: the storage slots of a few variables.

Owns those slots and what they hold while an event still stands; tests hold them against the compiler and the compiled
code. The layout is Vyper's (https://docs.vyperlang.org/en/v0.4.3/scoping-and-declarations.html): a list is its length
and then its items, a text its length and then its bytes, a map's value lies at keccak256(slot, key), where a text
stands for its own keccak256. A slot is a number below 2^256, and so is what it holds. Knows no trie and no chain.
"""

from collections.abc import Callable, Mapping
from typing import Final

from eth_hash.auto import keccak

from contracts.addresses import ContractName
from contracts.errors import BadInput
from contracts.events import ContractEvent, ModelRegistered, TierGranted
from contracts.limits import AUTHORITIES_MAX, NAME_BYTES_MAX
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


def while_standing(event: ContractEvent) -> tuple[ContractName, Mapping[int, int]] | None:
    """What the contract's storage holds for as long as nothing took back what an event says; None when storage does
    not tell: an announcement lives in the log only."""
    match event:
        case ModelRegistered():
            first = _entry(_entry(MODELS_SLOT, keccak(event.model_id.encode())), keccak(event.version.encode()))
            return "Models", {
                first + MODEL_SHARD_COUNT: event.shard_count,
                first + MODEL_RETIRED: 0,
                first + MODEL_MANIFEST_HASH: int.from_bytes(event.manifest_hash),
            }
        case TierGranted():
            first = _entry(GRANTS_SLOT, event.account.rjust(WORD, b"\0"))
            text = event.tier.encode().ljust(NAME_BYTES_MAX, b"\0")
            return "Tiers", {
                first + GRANT_TIER: len(event.tier.encode()),
                first + GRANT_TIER + 1: int.from_bytes(text[:WORD]),
                first + GRANT_TIER + 2: int.from_bytes(text[WORD:]),
                first + GRANT_UNTIL: event.until,
            }
        case _:
            return None


def _entry(slot: int, key: bytes) -> int:
    """The first slot of a map's value."""
    return int.from_bytes(keccak(slot.to_bytes(WORD) + key))
