"""Several blocks from a peer in one batch: the same ledger as block by block, and all of them or none."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import BadPeer, Conflict, Refused
from ledger import chain as chains
from ledger.chain import Chain
from ledger.store import Store
from tests.ledger.proofs import KEYS, Network
from tests.ledger.world import (
    OPERATOR,
    announce,
    import_batch,
    import_block,
    join,
    make_config,
    open_chain,
    open_ledger,
    register,
)

CONFIG = make_config(KEYS[:1], [OPERATOR])


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Five blocks that need one another: nonces, a node and its announcement, and authorities that change midway."""
    with open_chain(tmp_path_factory.mktemp("source") / "ledger", CONFIG) as chain:
        network = Network(chain)
        network.grow(register())
        network.grow(join(), sender=OPERATOR)
        network.add(KEYS[1], KEYS[2])
        network.grow(announce(), sender=OPERATOR)
        network.grow(register("another"))
        return [chain.store.sealed_bytes(number) for number in range(1, 6)]


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with open_chain(tmp_path / "ledger", CONFIG) as chain:
        yield chain


def contents(chain: Chain) -> dict[bytes, bytes]:
    return dict(chain.store._db.iterator())


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each batch on disk had, genesis's aside."""
    sizes: list[int] = []
    commit = Store.commit

    def counted(store: Store, found: list, *rest: object) -> None:  # type: ignore[type-arg]
        sizes.append(len(found))
        commit(store, found, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "commit", counted)
    return sizes


def test_one_batch_leaves_what_single_blocks_leave(
    chain: Chain, blocks: list[bytes], batches: list[int], tmp_path: Path
) -> None:
    assert import_batch(chain, deque(blocks)) == 5
    assert batches == [5]
    with open_chain(tmp_path / "other", CONFIG) as other:
        assert all(import_block(other, block) for block in blocks)
        assert contents(other) == contents(chain)
        assert other.tip == chain.tip
        assert len(chain.tip.accounts.authorities) == 3


def test_batch_that_py_evm_executes(chain: Chain, blocks: list[bytes], tmp_path: Path) -> None:
    """It reads what the blocks before in the batch changed, which is in no store."""
    with open_chain(tmp_path / "other", CONFIG) as other:
        other._shortcut = None
        assert import_batch(other, deque(blocks)) == 5
        assert import_batch(chain, deque(blocks)) == 5
        assert contents(other) == contents(chain)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda blocks: [*blocks[:3], blocks[3][:-1] + bytes([blocks[3][-1] ^ 1])], BadPeer),
        (lambda blocks: [*blocks[:3], b"no block"], BadPeer),
        (lambda blocks: [*blocks[:2], blocks[3]], Conflict),
        (lambda blocks: [blocks[1], blocks[0]], Conflict),
        (lambda blocks: [blocks[0], blocks[0]], Conflict),
    ],
    ids=["tampered", "garbage", "gap", "turned round", "twice"],
)
def test_bad_block_takes_its_batch_with_it(chain: Chain, blocks: list[bytes], change, kind: type[Refused]) -> None:  # type: ignore[no-untyped-def]
    before, tip = contents(chain), chain.tip
    with pytest.raises(kind):
        import_batch(chain, deque(change(blocks)))
    assert contents(chain) == before
    assert chain.tip is tip
    assert import_batch(chain, deque(blocks)) == 5


def test_what_is_here_is_passed_over(chain: Chain, blocks: list[bytes]) -> None:
    import_batch(chain, deque(blocks[:2]))
    assert import_batch(chain, deque(blocks)) == 3
    assert import_batch(chain, deque(blocks)) == 0


async def test_a_batch_ends_at_its_limit(
    blocks: list[bytes], batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks and transactions together: two blocks of one transaction each, or one of two."""
    monkeypatch.setattr(chains, "BATCH_MAX", 3)
    with open_ledger(tmp_path / "ledger", CONFIG) as ledger:
        await ledger.import_blocks(blocks)
        assert batches == [1, 2, 1, 2], "genesis, then the five"
        assert ledger.head.number == ledger.statistics().blocks_imported == 5
        assert [record.number for record in ledger.records(0)] == list(range(6))


async def test_batches_before_a_bad_block_are_kept(
    blocks: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chains, "BATCH_MAX", 3)
    with open_ledger(tmp_path / "ledger", CONFIG) as ledger:
        with pytest.raises(BadPeer):
            await ledger.import_blocks([*blocks[:3], b"no block"])
        assert ledger.head.number == 3
        await ledger.import_blocks(blocks)
        assert ledger.head.number == 5
