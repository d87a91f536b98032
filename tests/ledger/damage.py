"""What the damage tests run in a child process: a small ledger, and each of many damages to a copy of it.

A damage is (file, kind, place): `flip` changes the byte at `place`, `cut` ends the file before it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from contracts.calls import JoinNode
from contracts.errors import Corrupt
from ledger import audit
from ledger.chain import Chain
from ledger.store import Store
from tests.ledger.world import (
    ADMIN,
    CONFIG,
    GENESIS,
    OPERATOR,
    Builder,
    announce,
    import_block,
    join,
    open_chain,
    raw_call,
    register,
)
from tests.ledger.zygote import Tell

Damage = tuple[str, str, int]

LAYOUTS = ("one log", "table and log", "tables and log", "tables")
"""A ledger that was never reopened; one that was; one that LevelDB compacted in its midst; one all in tables. Where
LevelDB compacts, which a larger ledger has it do by itself, its MANIFEST gets another edit."""

FAILURES_MAX = 20
"""More say nothing new."""


def content(store: Store) -> str:
    """A digest of every key and value, read as the ledger reads."""
    digest = hashlib.sha256()
    for key, value in store._items(b"", b"\xff"):
        digest.update(len(key).to_bytes(4) + key + len(value).to_bytes(4) + value)
    return digest.hexdigest()


# Jobs


def build(tell: Tell, path: str, layout: str) -> None:
    """A ledger of three blocks and an accepted transaction, in files laid out in one of the ways of LAYOUTS.

    Told are its contents after each write, as (digest, head): what may be found after damage is one of them.
    """
    folder, states = Path(path), list[tuple[str, int]]()

    def note(chain: Chain) -> None:
        states.append((content(chain.store), chain.tip.number))

    with open_chain(folder) as chain:
        note(chain)
        Builder(chain).grow(raw_call(ADMIN, 0, register()))
        note(chain)
        if layout == "one log":
            _grow(chain, note)
        elif layout == "tables":
            _grow(chain, note)
            chain.store._db.compact_range()
    if layout in {"table and log", "tables and log"}:
        with open_chain(folder) as chain:
            _grow(chain, note, compact_between=layout == "tables and log")
    copy = folder.with_name(f"{folder.name} audited")
    shutil.copytree(folder, copy)
    assert audit.verify(copy, CONFIG).blocks == states[-1][1]
    tell(states)


def _grow(chain: Chain, note: Callable[[Chain], None], compact_between: bool = False) -> None:
    for call in (join(), announce()):
        Builder(chain).grow(raw_call(OPERATOR, chain.nonce(OPERATOR.address), call))
        note(chain)
        if compact_between and isinstance(call, JoinNode):
            chain.store._db.compact_range()
    chain.store.append_journal(1, raw_call(OPERATOR, 2, announce()))
    note(chain)


def suffer(
    tell: Tell, path: str, scratch: str, states: list[tuple[str, int]], damages: Sequence[Damage], go_on_every: int
) -> None:
    """Open a copy with each damage, and where that succeeds go on for a block, every so many damages.

    Told are how often each outcome was seen, and those that must not be.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    for number, damage in enumerate(damages):
        copy = Path(scratch) / "ledger"
        _damaged_copy(Path(path), copy, damage)
        try:
            outcome = _opened(copy, states, go_on=number % go_on_every == 0)
        except Corrupt as error:
            outcome = _refused(copy, str(error))
        except Exception as error:  # noqa: BLE001 - whatever else it is, it is what this looks for
            outcome = f"!{type(error).__name__}: {error}"
        if outcome.startswith("!") and len(failures) < FAILURES_MAX:
            failures.append(f"{damage}: {outcome[1:]}")
        outcomes[outcome if not outcome.startswith("!") else "wrong"] += 1
        shutil.rmtree(copy)
    tell({"outcomes": outcomes, "failures": failures})


def _damaged_copy(path: Path, copy: Path, damage: Damage) -> None:
    name, kind, place = damage
    shutil.copytree(path, copy)
    data = (copy / name).read_bytes()
    changed = data[:place] if kind == "cut" else data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
    (copy / name).write_bytes(changed)


def _opened(copy: Path, states: list[tuple[str, int]], go_on: bool) -> str:
    """Which of the states it opens to, reading everything."""
    with Store(copy) as store:
        chain = Chain(store, CONFIG, GENESIS)
        found = content(store)
        heads = [head for digest, head in states if digest == found]
        if heads != [chain.tip.number]:
            return f"!opens to what it never was, with the head {chain.tip.number}"
        if go_on:
            nonce = chain.nonce(ADMIN.address)
            import_block(chain, Builder(chain).make(raw_call(ADMIN, nonce, register(f"m{nonce}"))))
        return f"head {heads[0]}"


def _refused(copy: Path, message: str) -> str:
    if "aigen ledger resync" not in message:
        return f"!the way out is missing: {message}"
    if not any(file.name in message for file in copy.iterdir()):
        return f"!no file is named: {message}"
    return "refused"
