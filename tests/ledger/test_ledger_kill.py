"""kill -9 at random times, again and again: nothing acknowledged is lost, and what is there is whole."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ledger import crash
from tests.ledger.zygote import Zygote

ROUNDS = 10
SOAK_ROUNDS = 100
ACKNOWLEDGED_MAX = 12
DELAY_S_MAX = 0.03
"""About as long as a block takes: the kill falls anywhere in it."""

AUDIT_ROUNDS = 5
"""An audit executes the whole chain, so not after each of them."""


@pytest.mark.parametrize("rounds", [ROUNDS, pytest.param(SOAK_ROUNDS, marks=pytest.mark.soak)])
def test_nothing_acknowledged_is_lost(zygote: Zygote, tmp_path: Path, rounds: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "ledger"
    acknowledged: list[str] = []
    heads: list[int] = []
    for round_ in range(1, rounds + 1):
        wait = {"kill_after": chance.randint(1, ACKNOWLEDGED_MAX), "kill_delay_s": chance.uniform(1e-6, DELAY_S_MAX)}
        ended = zygote.run(crash.seal_until_killed, str(path), 100_000 * round_, len(crash.SENDERS), **wait)
        assert ended.killed, ended.stderr
        acknowledged += ended.told
        audited = round_ % AUDIT_ROUNDS == 0
        check = zygote.run(crash.check, str(path), acknowledged, 100_000 * round_ + 50_000, audited)
        heads.append(check.result()["head"])
    assert heads == sorted(heads)
    assert len(set(acknowledged)) == len(acknowledged) >= rounds


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
        certificate = seal.certify(chain.tip.epoch, executed.header, keys)
        chain.tip = chain.write(chain.tip.after(executed), [certificate])
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
