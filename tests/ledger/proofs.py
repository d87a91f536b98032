"""What the tests of proofs build on: chains of several authorities that change, votes as the test says, and a proof's
every alteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import msgspec
import rlp

from contracts import events
from contracts.calls import AddAuthority, Call, GrantTier, RemoveAuthority
from contracts.events import ContractEvent
from ledger import seal
from ledger.block import SealedBlock, earliest_timestamp
from ledger.chain import Chain
from ledger.execution import Executed
from ledger.keys import Key
from ledger.proof import Proof
from ledger.prover import Shows
from tests.ledger.world import ADMIN, EPOCH, OPERATOR, STRANGER, announce, import_block, join, raw_call, register

KEYS = [Key.from_secret(bytes([i]) * 32) for i in range(11, 21)]
"""Of authorities, in the order they join."""

UNTIL = EPOCH + 10_000_000


class Network:
    """A chain whose authorities are those of `KEYS` that it has in force; each block holds one sender's calls."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    @property
    def keys(self) -> list[Key]:
        return [key for key in KEYS if key.address in self.chain.tip.accounts.authorities]

    def execute(self, *calls: Call, sender: Key = ADMIN) -> tuple[Executed, tuple[bytes, ...]]:
        """A block of these calls, sealed and not yet final."""
        nonce, chain = self.chain.nonce(sender.address), self.chain
        raws = tuple(raw_call(sender, nonce + i, call) for i, call in enumerate(calls))
        at = earliest_timestamp(chain.tip.header, chain.config)
        executed, stuck = chain.propose(self.keys[0], [chain.decode(raw) for raw in raws], at)
        assert not stuck
        return executed, raws

    def grow(self, *calls: Call, sender: Key = ADMIN, voters: Sequence[Key] | None = None) -> int:
        """The number of a block that all authorities, or these, made final."""
        executed, raws = self.execute(*calls, sender=sender)
        certificate = seal.certify(self.chain.tip.epoch, executed.header, self.keys if voters is None else voters)
        import_block(self.chain, SealedBlock(rlp.encode(executed.header), raws, certificate).encode())
        return self.chain.tip.number

    def live(self) -> None:
        """A model, its announcement and a grant, in three blocks."""
        self.grow(register(core=True))
        self.grow(join(), announce(), sender=OPERATOR)
        self.grow(GrantTier(STRANGER.address, "pro", UNTIL))

    def add(self, *keys: Key) -> int:
        return self.grow(*(AddAuthority(key.address) for key in keys))

    def remove(self, *keys: Key) -> int:
        return self.grow(*(RemoveAuthority(key.address) for key in keys))


def certified_later(source: Chain, target: Chain, reach: Mapping[int, int]) -> None:
    """Copy a chain; block n gets the votes for block reach[n], and the headers from the one to the other."""
    for number in range(1, source.tip.number + 1):
        block = source.store.sealed(number)
        voted = reach.get(number, number)
        headers = tuple(source.store.sealed(n).header_rlp for n in range(number + 1, voted + 1))
        certificate = msgspec.structs.replace(source.store.sealed(voted).certificate, descendants=headers)
        import_block(target, msgspec.structs.replace(block, certificate=certificate).encode())


def is_registration(event: ContractEvent) -> bool:
    return isinstance(event, events.ModelRegistered)


def is_grant(event: ContractEvent) -> bool:
    return isinstance(event, events.TierGranted)


def is_announcement(event: ContractEvent) -> bool:
    return isinstance(event, events.ShardsAnnounced)


QUESTIONS: dict[str, Shows] = {"model": is_registration, "tier": is_grant, "shard": is_announcement}


def written(tree: Any) -> bytes:
    """A proof's plain values as its file, whatever they are."""
    return msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n"


def alterations(proof: Proof) -> Iterator[tuple[str, bytes]]:
    """Every file that differs from the proof's in one place, and where: bits of bytes, numbers, texts, items of lists,
    names of fields."""
    tree = msgspec.json.decode(proof.encode())
    for path, value in _places(tree, ()):
        for name, other in _others(value):
            changed = deepcopy(tree)
            if path:
                _put(changed, path, other)
            else:
                changed = other
            yield f"{'.'.join(map(str, path))}: {name}", written(changed)


def _places(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    yield path, value
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


def _put(tree: Any, path: tuple[str | int, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case str() if value.startswith("0x"):
            digits = len(value) - 2
            for place, bit in ((0, 8), (digits // 2, 2), (digits - 1, 1)):
                flipped = f"{int(value[2 + place], 16) ^ bit:x}"
                yield f"bit {bit} of digit {place}", value[: 2 + place] + flipped + value[3 + place :]
            yield "one byte less", value[:-2]
            yield "one byte more", value + "00"
            yield "half a byte", value[:-1]
            yield "upper case", f"0X{value[2:].upper()}"
            yield "no bytes", "0x"
            yield "no hex", f"0x{'zz' * (digits // 2)}"
            yield "a number", 7
        case str():
            for text in ("", "aigen-proof-0", value + " ", value.upper()):
                yield repr(text), text
        case int():
            for number in (value + 1, value - 1, value + 256, -1, 1 << 70, 1.5, str(value)):
                yield str(number), number
        case list():
            for i, item in enumerate(value):
                yield f"without {i}", value[:i] + value[i + 1 :]
                yield f"{i} twice", [*value[: i + 1], item, *value[i + 1 :]]
                if i and value[i - 1] != item:
                    yield f"{i} before {i - 1}", [*value[: i - 1], item, value[i - 1], *value[i + 1 :]]
            yield "nothing in it", [] if value else None
            yield "an object", {}
        case dict():
            for name in value:
                yield f"without {name}", {key: item for key, item in value.items() if key != name}
            yield "one name more", {**value, "more": 1}
            yield "a list", list(value.values())
