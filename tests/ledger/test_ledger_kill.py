"""kill -9 in the middle of sealing: nothing acknowledged is lost, and what is there is whole."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.types import TransactionHash
from genesis.config import GenesisConfig
from ledger import audit
from ledger.keys import Key
from node import state
from tests.ledger.world import make_config, open_ledger

ROUNDS = 5
SOAK_ROUNDS = 50
ACKNOWLEDGED_MAX = 25

SENDERS = [Key.from_secret(bytes([i]) * 32) for i in range(20, 24)]

NODE = """
import itertools, sys
from pathlib import Path
import trio
from ledger.ledger import Ledger
from tests.ledger.test_ledger_kill import SENDERS, config
from tests.ledger.world import AUTHORITY, EPOCH, join, raw_call

hours = itertools.count(int(sys.argv[2]))

async def send(ledger, key, number):
    while True:
        account = ledger.account(key.address)
        raw = raw_call(key, account.next_nonce, join(f"12D3K{'abcd'[number]}"))
        name = await ledger.submit(raw)
        print(name.hex(), flush=True)
        if account.next_nonce % 3 == number % 3:
            await ledger.wait_receipt(name)

async def main():
    ledger = Ledger.open(Path(sys.argv[1]), config(), lambda: EPOCH + 3600 * next(hours))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Consensus(ledger, AUTHORITY).run)
        for number, key in enumerate(SENDERS):
            nursery.start_soon(send, ledger, key, number)

trio.run(main)
"""


def config() -> GenesisConfig:
    return make_config(accounts=SENDERS)


def run_and_kill(path: Path, hour: int, lines_max: int) -> list[TransactionHash]:
    """The transactions the process acknowledged before it was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", NODE, str(path), str(hour)], stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdout is not None
        lines = [node.stdout.readline() for _ in range(lines_max)]
        node.kill()
        lines += node.stdout.readlines()
    # The last line may be half: it was not acknowledged, then.
    return [TransactionHash(bytes.fromhex(line)) for line in lines if line.endswith("\n") and len(line) == 65]


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(SOAK_ROUNDS, marks=pytest.mark.soak)])
def test_nothing_acknowledged_is_lost(tmp_path: Path, rounds: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "ledger"
    acknowledged: set[TransactionHash] = set()
    for round_ in range(rounds):
        acknowledged.update(run_and_kill(path, 1 + 10_000 * round_, chance.randint(1, ACKNOWLEDGED_MAX)))
        with open_ledger(path, config()) as ledger:
            for name in acknowledged:
                assert ledger.is_pending(name) != (ledger.receipt(name) is not None), "in the chain or in the pool"
            records = list(ledger.records(0))
            assert [record.number for record in records] == list(range(ledger.head.number + 1))
            assert records[-1].hash == ledger.head.hash
            folded = state.fold(state.State(), records)
    found = audit.verify(path, config())
    assert found.blocks == len(records) - 1
    assert len(folded.members.members) <= len(SENDERS)
    assert len(acknowledged) >= rounds


DIGEST = """
import hashlib, sys, tempfile
from pathlib import Path
from node import state
from tests.ledger.world import *

keys = [AUTHORITY, STRANGER, OPERATOR]
config = make_config(keys, [OPERATOR])
with tempfile.TemporaryDirectory() as folder, open_chain(Path(folder) / "ledger", config) as chain:
    calls = [enrol(address(1), address(2)), register("one"), register("two", core=True)]
    for nonce, call in enumerate(calls):
        waiting = Builder(chain).decode([raw_call(ADMIN, nonce, call)])
        executed, _ = chain.propose(keys[nonce], waiting, EPOCH + nonce + 1)
        chain.write(executed, seal.certify(chain.genesis_hash, executed.header, keys), ())
        chain.tip = chain.tip_after(executed)
    folded = state.fold(state.State(), chain.store.records(0, chain.tip.number + 1))
    stored = hashlib.sha256(repr(list(chain.store._db.iterator())).encode()).hexdigest()
    print(chain.tip.hash.hex(), stored, hashlib.sha256(state.encode(folded)).hexdigest())
"""


def test_same_bytes_whatever_the_hash_seed() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("0", "12345")
    }
    assert len(found) == 1
    assert len(next(iter(found)).split()) == 3
