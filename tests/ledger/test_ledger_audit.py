"""The audit: passes over what was written, finds every kind of thing that was not."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import rlp

from contracts.errors import Conflict, Corrupt
from contracts.types import TransactionHash
from ledger import audit, record
from ledger.store import Store
from tests.ledger.world import (
    ADMIN,
    CONFIG,
    OPERATOR,
    Builder,
    announce,
    decode_sealed,
    join,
    make_config,
    open_chain,
    raw_call,
    register,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two blocks, the second with a call that failed."""
    path = tmp_path / "ledger"
    with open_chain(path) as chain:
        Builder(chain).grow(raw_call(ADMIN, 0, register()), raw_call(OPERATOR, 0, join()))
        Builder(chain).grow(raw_call(OPERATOR, 1, announce()), raw_call(OPERATOR, 2, announce((7,))))
    return path


def key(prefix: bytes, number: int) -> bytes:
    return prefix + number.to_bytes(8)


def put(path: Path, name: bytes, value: bytes) -> None:
    with Store(path) as store:
        store._db.put(name, value)


def get(path: Path, name: bytes) -> bytes:
    with Store(path) as store:
        value = store._db.get(name)
    assert value is not None
    return value


def found(path: Path, match: str = "start again") -> None:
    with pytest.raises(Corrupt, match=match):
        audit.verify(path, CONFIG)


def test_whole_ledger_passes_and_nothing_is_left_behind(path: Path) -> None:
    progress: list[tuple[int, int]] = []
    result = audit.verify(path, CONFIG, lambda done, total: progress.append((done, total)))
    assert (result.blocks, result.transactions) == (2, 4)
    assert progress == [(1, 2), (2, 2)]
    with open_chain(path) as chain:
        assert (result.head_hash, result.state_root) == (chain.tip.hash, chain.tip.header.state_root)
    assert [entry.name for entry in path.parent.iterdir()] == ["ledger"]


def test_running_node_and_other_genesis_are_refused(path: Path) -> None:
    with open_chain(path), pytest.raises(Conflict, match="in use"):
        audit.verify(path, CONFIG)
    with pytest.raises(Conflict, match="genesis"):
        audit.verify(path, make_config(accounts=()))


@pytest.mark.parametrize("prefix", [b"b", b"e", b"r"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_flipped_byte_of_a_stored_value_is_found(path: Path, prefix: bytes, number: int) -> None:
    """Past LevelDB's own checksums: as if something had written it so."""
    value = get(path, key(prefix, number))
    for place in range(0, len(value), max(1, len(value) // 3)):
        put(path, key(prefix, number), value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :])
        with pytest.raises((Corrupt, Conflict)):
            audit.verify(path, CONFIG)
    put(path, key(prefix, number), value)
    audit.verify(path, CONFIG)


def change_record(path: Path, **changes: Any) -> None:
    old = record.decode(get(path, key(b"e", 2)))
    transaction = msgspec.structs.replace(old.transactions[0], **changes)
    new = msgspec.structs.replace(old, transactions=(transaction, *old.transactions[1:]))
    put(path, key(b"e", 2), record.encode(new))


@pytest.mark.parametrize(
    "changes", [{"events": ()}, {"reason": "made up"}, {"gas_used": 1}, {"sender": b"\1" * 20}, {"nonce": 9}]
)
def test_forged_record(path: Path, changes: dict[str, Any]) -> None:
    change_record(path, **changes)
    found(path, "block 2: the event record")


def test_forged_receipt(path: Path) -> None:
    receipts = rlp.decode(get(path, key(b"r", 1)))
    put(path, key(b"r", 1), rlp.encode(receipts[::-1]))
    found(path, "block 1: the receipts")


def test_forged_block(path: Path) -> None:
    block = decode_sealed(get(path, key(b"b", 1)))
    put(path, key(b"b", 1), msgspec.structs.replace(block, transactions=block.transactions[::-1]).encode())
    found(path, "block 1: the block")


def test_blocks_in_each_others_place(path: Path) -> None:
    first, second = get(path, key(b"b", 1)), get(path, key(b"b", 2))
    put(path, key(b"b", 2), first)
    found(path)
    put(path, key(b"b", 1), second)
    found(path)


def test_lost_or_wrong_index(path: Path) -> None:
    with Store(path) as store:
        one = store.record(1)
    name = TransactionHash(one.transactions[0].hash)
    put(path, b"t" + name, (2).to_bytes(8) + (0).to_bytes(4))
    found(path, "index of transaction")
    put(path, b"t" + name, (1).to_bytes(8) + (0).to_bytes(4))
    put(path, b"h" + one.hash, (2).to_bytes(8))
    found(path, "index of its hash")


def test_wrong_or_missing_state(path: Path) -> None:
    with Store(path) as store:
        nodes = list(store._db.iterator(prefix=b"s"))
    name, value = nodes[-1]
    put(path, name, value + b"\0")
    found(path)
    with Store(path) as store:
        store._db.delete(name)
    found(path)
