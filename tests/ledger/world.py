"""What the ledger's tests and its benchmark build on: keys, a network, a clock of their own, blocks made by hand."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path

import msgspec
import rlp
import trio

from contracts.calls import AnnounceShards, Call, EnrolAccounts, JoinNode, RegisterModel
from contracts.types import Address, ManifestHash, ModelId, NodeId, ShardHash, Version
from genesis.block import GenesisBlock, build
from genesis.config import Account, GenesisConfig
from genesis.new import new_genesis
from ledger import seal
from ledger.block import SealedBlock, earliest_timestamp
from ledger.chain import Chain
from ledger.consensus import Consensus
from ledger.keys import Key
from ledger.ledger import Ledger
from ledger.store import Store
from ledger.timing import Clock
from ledger.transactions import CALL_GAS, Transaction, sign

ADMIN = Key.from_secret(b"\1" * 32)
AUTHORITY = Key.from_secret(b"\2" * 32)
OPERATOR = Key.from_secret(b"\3" * 32)
STRANGER = Key.from_secret(b"\4" * 32)

EPOCH = 1_700_000_000
"""The genesis timestamp, in seconds."""

DEADLINE_S = 60
"""Of what takes a second or two on an idle machine."""

MODEL, VERSION = ModelId("tiny-llama"), Version("1")
NODE = NodeId("12D3KooWA1")


def make_config(authorities: Sequence[Key] = (AUTHORITY,), accounts: Sequence[Key] = (OPERATOR,)) -> GenesisConfig:
    """The dev network with one admin, these authorities, and these accounts enrolled at tier basic."""
    return new_genesis(
        "dev",
        admins=[ADMIN.address],
        authorities=[key.address for key in authorities],
        timestamp=EPOCH,
        accounts=[Account(key.address, "basic") for key in accounts],
    )


CONFIG = make_config()


_hours = count(1)


def quick_clock() -> float:
    """For Ledger.open where time is of no interest: an hour passes from one look to the next, so no sealer waits."""
    return EPOCH + 3600 * next(_hours)


def virtual_clock() -> float:
    """For Ledger.open in a test under MockClock: trio's time after the genesis timestamp."""
    return EPOCH + 10 + trio.current_time()


def raw_call(key: Key, nonce: int, call: Call, gas: int = CALL_GAS, chain_id: int = CONFIG.network.chain_id) -> bytes:
    return sign(key, chain_id, nonce, call.to, call.encode(), gas)


def enrol(*accounts: Address) -> EnrolAccounts:
    return EnrolAccounts(accounts)


def address(number: int) -> Address:
    """An account nobody has the key of, a different one for each number."""
    return Address(b"\xaa" * 16 + number.to_bytes(4))


def register(model_id: str = MODEL, shards: int = 3, core: bool = False) -> RegisterModel:
    size = 64 << 20
    hashes = tuple(ShardHash(model_id.encode().ljust(28, b"\0") + (i + 1).to_bytes(4)) for i in range(shards))
    return RegisterModel(
        model_id=ModelId(model_id),
        version=VERSION,
        total_size=shards * size - 1,
        shard_size=size,
        shard_count=shards,
        shard_hashes=hashes,
        manifest_hash=ManifestHash(b"\7" * 32),
        minimum_tier="basic",
        core=core,
        architecture="llama",
        metadata="{}",
    )


def join(node_id: str = NODE) -> JoinNode:
    return JoinNode(NodeId(node_id), "worker", ("/ip4/127.0.0.1/tcp/9945",))


def announce(indices: Iterable[int] = (0, 1, 2), model_id: str = MODEL, node_id: str = NODE) -> AnnounceShards:
    return AnnounceShards(NodeId(node_id), ModelId(model_id), VERSION, tuple(indices))


class Builder:
    """A chain in a folder, and blocks on it made step by step: what an authority does, without pool or clock."""

    def __init__(self, chain: Chain, authority: Key = AUTHORITY) -> None:
        self.chain = chain
        self.authority = authority

    def decode(self, raws: Iterable[bytes]) -> list[Transaction]:
        return [self.chain.decode(raw) for raw in raws]

    def make(self, *raws: bytes, timestamp: int | None = None) -> bytes:
        """A final block with these transactions, encoded; the chain stays as it is."""
        at = earliest_timestamp(self.chain.tip.header, self.chain.config) if timestamp is None else timestamp
        executed, stuck = self.chain.propose(self.authority, self.decode(raws), at)
        assert not stuck
        certificate = seal.certify(self.chain.tip.epoch, executed.header, [self.authority])
        return SealedBlock(rlp.encode(executed.header), tuple(raws), certificate).encode()

    def grow(self, *raws: bytes) -> bytes:
        """Make a block and write it."""
        data = self.make(*raws)
        import_block(self.chain, data)
        return data


def import_block(chain: Chain, data: bytes, now: float = EPOCH + 1_000_000) -> bool:
    """Check, execute and write a block; whether it was new."""
    return import_batch(chain, deque([data]), now) > 0


def import_batch(chain: Chain, waiting: deque[bytes], now: float = EPOCH + 1_000_000) -> int:
    """Check, execute and write the first blocks of `waiting`, as many as one batch holds; how many were new."""
    tip, certificates = chain.execute_sealed(waiting, now)
    if certificates:
        chain.tip = chain.write(tip, certificates)
    return len(certificates)


GENESIS: GenesisBlock = build(CONFIG)


@contextmanager
def open_chain(path: Path, config: GenesisConfig = CONFIG) -> Iterator[Chain]:
    with Store(path) as store:
        yield Chain(store, config, GENESIS if config is CONFIG else build(config))


@contextmanager
def open_ledger(path: Path, config: GenesisConfig = CONFIG, clock: Clock = quick_clock) -> Iterator[Ledger]:
    ledger = Ledger.open(path, config, clock)
    try:
        yield ledger
    finally:
        ledger.close()


@asynccontextmanager
async def sealing(ledger: Ledger, key: Key = AUTHORITY) -> AsyncIterator[None]:
    """Blocks are made while the body runs, for at most DEADLINE_S."""
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Consensus(ledger, key).run)
            yield
            nursery.cancel_scope.cancel()


def missing_blocks(source: Ledger, target: Ledger) -> list[bytes]:
    """The blocks of `source` that `target` lacks."""
    return source.history.sealed_blocks(target.head.number + 1, 10_000, 1 << 30)


def decode_sealed(data: bytes) -> SealedBlock:
    return msgspec.msgpack.decode(data, type=SealedBlock)
