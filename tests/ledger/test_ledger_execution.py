"""Execution: nothing is written until it is done, a bad transaction changes nothing, genesis state is the start."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from contracts.errors import BadInput
from contracts.events import ModelRegistered, NodeJoined
from ledger.chain import Chain
from ledger.execution import Execution
from tests.ledger.world import ADMIN, EPOCH, OPERATOR, join, open_chain, raw_call, register


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    with open_chain(tmp_path / "ledger") as chain:
        yield chain


@pytest.fixture
def execution(chain: Chain) -> Iterator[Execution]:
    with chain._execution(chain._imagined(EPOCH + 1, chain.tip), chain.tip) as execution:
        yield execution


def test_events_gas_and_nonces(chain: Chain, execution: Execution) -> None:
    first = execution.apply(chain.decode(raw_call(ADMIN, 0, register())))
    second = execution.apply(chain.decode(raw_call(OPERATOR, 0, join())))
    (registered,), (joined,) = first.events, second.events
    assert isinstance(registered, ModelRegistered)
    assert isinstance(joined, NodeJoined)
    assert joined.operator == second.sender == OPERATOR.address
    assert (execution.count, execution.nonce(ADMIN.address), execution.nonce(OPERATOR.address)) == (2, 1, 1)
    executed = execution.finish()
    assert executed.header.gas_used == first.gas_used + second.gas_used
    assert executed.records == (first, second)
    assert executed.state_nodes[executed.header.state_root]
    assert executed.header.base_fee_per_gas == 0


def test_nothing_is_written_and_the_same_again_is_the_same(chain: Chain) -> None:
    before = dict(chain.store._db.iterator())
    roots = set()
    for _ in range(2):
        with chain._execution(chain._imagined(EPOCH + 1, chain.tip), chain.tip) as execution:
            execution.apply(chain.decode(raw_call(ADMIN, 0, register())))
            roots.add(execution.finish().header.hash)
    assert len(roots) == 1
    assert dict(chain.store._db.iterator()) == before


def test_transaction_that_cannot_stand_here_changes_nothing(chain: Chain, execution: Execution) -> None:
    for nonce in (1, 7):
        with pytest.raises(BadInput, match="cannot be applied here"):
            execution.apply(chain.decode(raw_call(ADMIN, nonce, register())))
    good = execution.apply(chain.decode(raw_call(ADMIN, 0, register())))
    assert good.reason is None
    assert execution.count == 1


def test_call_that_fails_says_why_and_logs_nothing(chain: Chain, execution: Execution) -> None:
    refused = execution.apply(chain.decode(raw_call(OPERATOR, 0, register())))
    starved = execution.apply(chain.decode(raw_call(OPERATOR, 1, join(), gas=40_000)))
    assert (refused.reason, refused.events) == ("sender is not an admin", ())
    assert (starved.reason, starved.events) == ("the call failed: OutOfGas", ())


def test_simulation_keeps_nothing(chain: Chain) -> None:
    transaction = chain.decode(raw_call(ADMIN, 0, register()))
    assert chain.simulate(transaction, EPOCH + 1) == chain.simulate(transaction, EPOCH + 1)
    assert chain.nonce(ADMIN.address) == 0
