"""A node in memory: a small ledger with two models and a few accounts, and an engine that answers with an echo."""

from __future__ import annotations

import hashlib

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from contracts.calls import RegisterModel, SetCoreModel, decode_call
from contracts.errors import BadInput, Busy, Conflict
from contracts.types import Address, ManifestHash, ModelId, NodeId, ShardHash, TransactionHash, Version
from ledger import transactions
from ledger.consensus import ConsensusStatistics
from ledger.keys import Key
from ledger.proof import FinalBlock, Proof, Way
from ledger.prover import Shows
from ledger.stopwatch import OwnBlocks
from node.agreement import StateMark
from node.inference.spec import Completion, DrawnToken, Parameters, Prompt, TokenLogprob, Usage
from node.network.fetching.statistics import FetcherStatistics, SourceInfo
from node.network.identity import NodeIdentity
from node.network.statistics import GossipStatistics
from node.network.sync import SyncStatistics
from node.quota import QuotaStatistics
from node.receipts import Receipt, Receipts
from node.rpc import port, values

CHAIN_ID = 41_000
GAS_LIMIT = 30_000_000
GENESIS_HASH = b"\x0e" * 32
NOW = 1_800_000_000
MIB = 1 << 20

OPERATOR = Key.from_secret(b"\x01" * 32)
ADMIN = Key.from_secret(b"\x02" * 32)
BASIC = Key.from_secret(b"\x03" * 32)
PRO = Key.from_secret(b"\x04" * 32)
TIERLESS = Key.from_secret(b"\x05" * 32)
STRANGER = Key.from_secret(b"\x06" * 32)

IDENTITY = NodeIdentity(Ed25519PrivateKey.from_private_bytes(b"\x07" * 32))

RANKS = {"basic": 1, "pro": 2}

SILENT = NodeId("12D3KooWStKV9hPJBjeaQbxrrphSs1Nga4TL7EZ6JNZjVaTMsDWp")
NODE_ID = NodeId("12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp")


def _tokens(words: list[str], likeliest: int | None) -> tuple[DrawnToken, ...]:
    """Every word is a token, all equally likely."""
    if likeliest is None:
        return ()
    told = [TokenLogprob(word, word.encode(), -1.5) for word in (words[:1] + [f" {word}" for word in words[1:]])]
    return tuple(DrawnToken(one, tuple(told[:likeliest])) for one in told)


def sha(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def model(model_id: str, minimum_tier: str, shard_count: int, version: str = "1") -> values.ModelInfo:
    """A model whose last shard is one byte short of half a shard."""
    return values.ModelInfo(
        model_id=ModelId(model_id),
        version=Version(version),
        total_size=(shard_count - 1) * 64 * MIB + 32 * MIB - 1,
        shard_size=64 * MIB,
        shard_count=shard_count,
        shard_hashes=tuple(ShardHash(sha(f"{model_id} {version} {index}")) for index in range(shard_count)),
        manifest_hash=ManifestHash(sha(f"{model_id} {version}")),
        minimum_tier=minimum_tier,
        core=False,
        architecture="mistral",
        metadata="{}",
        retired=False,
        public=False,
    )


def registration(model_id: str, version: str = "1") -> RegisterModel:
    """The call that registers `model(model_id, "basic", 2, version)`."""
    info = model(model_id, "basic", 2, version)
    names = (name for name in info.__struct_fields__ if name not in {"retired", "public", "precision"})
    return RegisterModel(**{name: getattr(info, name) for name in names})


def signed(call: RegisterModel | SetCoreModel, key: Key = ADMIN, nonce: int = 0, chain_id: int = CHAIN_ID) -> bytes:
    """A raw transaction that makes the call."""
    return transactions.sign(key, chain_id, nonce, call.to, call.encode(), 5_000_000)


DROPPED = SourceInfo("mirror http://m", "dropped", 3, 3 << 20, 0, 1, "answers 200 where 206 is due")


class FakeNode:
    """A `port.NodePort`. What is submitted becomes final with `seal()`; `words` holds answers back when set."""

    def __init__(self) -> None:
        self._models = {
            ("mistral-7b", "1"): msgspec.structs.replace(model("mistral-7b", "basic", 4), core=True),
            ("codegen-16b", "1"): msgspec.structs.replace(model("codegen-16b", "pro", 2), public=True),
            ("old-model", "1"): msgspec.structs.replace(model("old-model", "basic", 1), retired=True),
        }
        self._accounts = {
            OPERATOR.address: self._account(OPERATOR, enrolled=True, tier="basic"),
            ADMIN.address: self._account(ADMIN, enrolled=True, admin=True, authority=True),
            BASIC.address: self._account(BASIC, tier="basic"),
            PRO.address: self._account(PRO, enrolled=True, tier="pro"),
            TIERLESS.address: self._account(TIERLESS, enrolled=True),
        }
        self.loads: dict[tuple[str, str], values.LoadState] = {}
        self.checks: list[values.TierCheck] = []
        self.pool: list[bytes] = []
        self.receipts: dict[TransactionHash, values.ReceiptInfo] = {}
        self.asked: list[Shows] = []
        self.ready = True
        self.sync = SyncStatistics("idle", 0, 5, 5, 0)
        self.chats_begun = trio.Event()
        self.chats_cancelled = 0
        self.words: trio.Semaphore | None = None
        self.parameters: list[Parameters] = []
        self.written: Receipts | None = Receipts(IDENTITY, CHAIN_ID, GENESIS_HASH, clock=lambda: NOW)

    @staticmethod
    def _account(
        key: Key, enrolled: bool = False, admin: bool = False, authority: bool = False, tier: str | None = None
    ) -> values.AccountInfo:
        until = None if tier is None else NOW + 1000
        return values.AccountInfo(key.address, 0, enrolled, admin, authority, tier, until)

    chain_id = CHAIN_ID
    operator = OPERATOR.address

    def models(self) -> tuple[values.ModelInfo, ...]:
        return tuple(self._models.values())

    def model(self, model_id: ModelId, version: Version | None) -> values.ModelInfo | None:
        versions = [info for info in self._models.values() if info.model_id == model_id]
        if version is not None:
            versions = [info for info in versions if info.version == version]
        in_service = [info for info in versions if not info.retired]
        return (in_service or versions or [None])[-1]

    def catalogue(self) -> tuple[values.CatalogueEntry, ...]:
        entry = values.CatalogueEntry(
            ModelId("llama2-13b"), "Llama 2 13B", "pro", 26_000_000_000, "llama", 13_000_000_000, "hf", False
        )
        return (entry,)

    def shards(self, model_id: ModelId, version: Version) -> tuple[values.ShardInfo, ...]:
        info = self._models[model_id, version]
        peer = values.Location(NODE_ID, "peer", "192.0.2.1:9946")
        mirror = values.Location(None, "http", "https://mirror.example/m")
        sizes = [min(info.shard_size, info.total_size - index * info.shard_size) for index in range(info.shard_count)]
        return tuple(
            values.ShardInfo(index, info.shard_count, shard_hash, sizes[index], 1, (peer, mirror), (SILENT,))
            for index, shard_hash in enumerate(info.shard_hashes)
        )

    def authorities(self) -> tuple[values.AuthorityInfo, ...]:
        return (values.AuthorityInfo(OPERATOR.address, True, b"\x0e" * 32, b"\x0f"),)

    def members(self) -> tuple[values.MemberInfo, ...]:
        return (values.MemberInfo(NODE_ID, OPERATOR.address, "worker", ("192.0.2.1:9946",), 4, NOW, 1 << 40, True),)

    def account(self, account: Address) -> values.AccountInfo:
        nothing = values.AccountInfo(account, 0, False, False, False, None, None)
        return self._accounts.get(account, nothing)

    def chain(self) -> values.ChainInfo:
        return values.ChainInfo(
            name="test",
            chain_id=CHAIN_ID,
            genesis_hash=GENESIS_HASH,
            head_number=len(self.receipts),
            head_hash=sha(f"block {len(self.receipts)}"),
            head_timestamp=NOW,
            state_root=b"\x05" * 32,
            pending_transactions=len(self.pool),
            gas_limit=GAS_LIMIT,
            shard_size=64 * MIB,
            redundancy=3,
            lease_s=7200,
            check_period_s=3600,
            admins=(ADMIN.address,),
            authorities=(ADMIN.address,),
            tiers=tuple(
                values.TierInfo(name, rank, rank * 8_000_000_000, rank, rank * 100) for name, rank in RANKS.items()
            ),
            contracts={"Models": registration("x").to},
        )

    async def state_hashes(self) -> tuple[StateMark, ...]:
        await trio.lowlevel.checkpoint()
        return (StateMark(0, sha("state 0")), StateMark(len(self.receipts), sha("state")))

    def block(self, at: int | bytes | None) -> values.BlockInfo | None:
        head = len(self.receipts)
        numbers = {number: number for number in range(head + 1)} | {sha(f"block {n}"): n for n in range(head + 1)}
        number = numbers.get(head if at is None else at)
        if number is None:
            return None
        return values.BlockInfo(
            number=number,
            hash=sha(f"block {number}"),
            parent_hash=sha(f"block {number - 1}"),
            timestamp=NOW,
            state_root=b"\x05" * 32,
            gas_used=21_000,
            proposer=ADMIN.address if number else None,
            signers=(ADMIN.address,) if number else (),
            transactions=tuple(hash_ for hash_, info in self.receipts.items() if info.block_number == number),
        )

    def receipt(self, transaction_hash: TransactionHash) -> values.ReceiptInfo | None:
        return self.receipts.get(transaction_hash)

    async def prove(self, shows: Shows) -> Proof:
        """A proof of nothing; `asked` keeps what was to be shown."""
        await trio.lowlevel.checkpoint()
        self.asked.append(shows)
        block = FinalBlock(**dict.fromkeys(FinalBlock.__struct_fields__, "0x01"))
        return Proof("aigen-proof-1", "0x00", Way((), block), 0, (), (), None)

    def node_info(self) -> values.NodeInfo:
        return values.NodeInfo(
            node_id=NODE_ID,
            operator=OPERATOR.address,
            role="worker",
            aigen_version="0.1.0",
            status=self.health().status,
            started_at=NOW,
            core_model=ModelId("mistral-7b"),
            endpoints=("192.0.2.1:9946",),
            peers=(),
            lagging_peers=(),
            sync=self.sync,
            gossip=GossipStatistics(peers=2, told=3, taken=4, passed_over=5),
            disk_budget=10**12,
            disk_used=2**40,
            cache_budget=32 * 10**9,
            cache_used=0,
            pieces_fetched=0,
            bytes_fetched=0,
            shards_short=2,
            answers_waiting=1,
            quota=QuotaStatistics(3, 2, {"concurrent_answers": 4, "tokens_per_minute": 5, "places": 6}),
            fetching=FetcherStatistics(sources=(DROPPED,)),
            state_alarms=("after block 16 the state of 12D3KooWx has another hash",),
            consensus=ConsensusStatistics(True, 9, 1, 0, 2.0, 40, 0, OwnBlocks(3, 0.75, 8, NOW)),
            steps=(values.StartStep("check core model metadata", "done", "mistral-7b version 1"),),
            models=self.load_states(),
        )

    def health(self) -> values.Health:
        status: values.HealthStatus = "ready" if self.ready else "starting"
        return values.Health(status, self.ready, len(self.receipts), "ready for inference" if self.ready else "fetch")

    def load_state(self, model_id: ModelId, version: Version) -> values.LoadState:
        absent = values.LoadState(model_id, version, "absent", False, 0, 0, 0, None, "")
        return self.loads.get((model_id, version), absent)

    def load_states(self) -> tuple[values.LoadState, ...]:
        return tuple(self.loads.values())

    def held_shards(self) -> tuple[values.HeldShard, ...]:
        info = self._models["mistral-7b", "1"]
        return tuple(
            values.HeldShard(
                shard_hash, info.model_id, info.version, index, info.shard_count, 64 * MIB, 64 * MIB, announced=True
            )
            for index, shard_hash in enumerate(info.shard_hashes)
        )

    @property
    def gives_receipts(self) -> bool:
        return self.written is not None

    def answer_receipt(self, receipt_id: str) -> Receipt | None:
        return None if self.written is None else self.written.find(receipt_id)

    def decode_transaction(self, raw: bytes) -> values.SignedTransaction:
        decoded = transactions.decode(raw, CHAIN_ID, GAS_LIMIT)
        return values.SignedTransaction(decoded.hash, decoded.sender, decoded.nonce, decoded.to, decoded.data)

    async def submit(self, raw: bytes) -> TransactionHash:
        transaction = self.decode_transaction(raw)
        transactions.check_enrolled(
            transactions.decode(raw, CHAIN_ID, GAS_LIMIT), lambda account: self.account(account).enrolled
        )
        await trio.lowlevel.checkpoint()
        info = self.account(transaction.sender)
        if transaction.nonce != info.nonce:
            raise Conflict(f"the nonce is {transaction.nonce}, the next of 0x{info.account.hex()} is {info.nonce}")
        self._accounts[info.account] = msgspec.structs.replace(info, nonce=info.nonce + 1)
        self.pool.append(raw)
        return transaction.transaction_hash

    def seal(self) -> None:
        """Everything in the pool becomes final, a block for each."""
        for raw in self.pool:
            transaction = self.decode_transaction(raw)
            call = decode_call(transaction.to, transaction.data)
            if isinstance(call, RegisterModel):
                self._models[call.model_id, call.version] = model(call.model_id, call.minimum_tier, 2, call.version)
            number = len(self.receipts) + 1
            self.receipts[transaction.transaction_hash] = values.ReceiptInfo(
                transaction_hash=transaction.transaction_hash,
                block_number=number,
                block_hash=sha(f"block {number}"),
                sender=transaction.sender,
                nonce=transaction.nonce,
                to=transaction.to,
                gas_used=21_000,
                succeeded=True,
                reason=None,
                events=(values.EventInfo("ModelRegistered", {"model_id": "x", "shard_hashes": (sha("a"),)}),),
            )
        self.pool.clear()

    async def check_tier(self, account: Address, model_id: ModelId, version: Version) -> values.TierCheck:
        for check in self.checks:
            if (check.account, check.model_id, check.version) == (account, model_id, version):
                return check
        await trio.lowlevel.checkpoint()
        held, required = self.account(account).tier, self._models[model_id, version].minimum_tier
        granted = held is not None and RANKS[held] >= RANKS[required]
        transaction_hash = TransactionHash(sha(f"check {len(self.checks)}"))
        number = 7 + len(self.checks)
        check = values.TierCheck(
            account, model_id, version, held, required, granted, NOW + 3600, transaction_hash, number
        )
        self.checks.append(check)
        return check

    async def load_model(self, model_id: ModelId, version: Version, wait: bool) -> values.LoadState:
        await trio.lowlevel.checkpoint()
        size = self._models[model_id, version].total_size
        state = values.LoadState(
            model_id, version, "loaded" if wait else "fetching", False, size if wait else 0, size, 0, None, ""
        )
        self.loads[model_id, version] = state
        return state

    async def unload_model(self, model_id: ModelId, version: Version) -> values.LoadState:
        await trio.lowlevel.checkpoint()
        if self.loads.pop((model_id, version), None) is None:
            raise Conflict(f"{model_id} version {version} is not loaded")
        return self.load_state(model_id, version)

    async def free_space(self, size: int) -> tuple[values.FreedShard, ...]:
        """Gives up the first shards of all that are here."""
        await trio.lowlevel.checkpoint()
        freed: list[values.FreedShard] = []
        for shard in self.held_shards():
            if sum(one.size for one in freed) < size:
                freed.append(
                    values.FreedShard(shard.model_id, shard.version, shard.shard_index, shard.shard_hash, shard.size)
                )
        return tuple(freed)

    async def verify_shards(self, model_id: ModelId | None) -> tuple[values.ShardCheck, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(
            values.ShardCheck(shard.shard_hash, shard.model_id, shard.version, shard.shard_index, 64, ())
            for shard in self.held_shards()
            if model_id in {None, shard.model_id}
        )

    async def chat(
        self,
        check: values.TierCheck,
        *,
        prompt: Prompt,
        parameters: Parameters,
        emit: port.Emit | None,
        receipt_id: str,
    ) -> values.Answered:
        """Says the last message again, a word at a time; `words` is a semaphore that lets each one go."""
        assert check.granted, "the caller checks the tier"
        said = prompt if isinstance(prompt, str) else prompt[-1].content
        if said == "crash":
            raise KeyError("/secret/path")
        if said == "too much":
            raise Busy("200 left of the 40000 a minute of tier basic: try again in 17 s", 17)
        if said == "two lines":
            raise BadInput("first\nsecond")
        state = await self.load_model(check.model_id, check.version, wait=True)
        words = said.split()[: parameters.max_tokens]
        self.parameters.append(parameters)
        tokens = _tokens(words, parameters.logprobs)
        if emit is not None:
            async with trio.open_nursery() as nursery:  # in a task of its own, as the service does
                nursery.start_soon(emit, state)
        try:
            self.chats_begun.set()
            for index, word in enumerate(words):
                if self.words is not None:
                    await self.words.acquire()
                if emit is not None:
                    await emit(values.ChatChunk(word if index == 0 else f" {word}", tokens[index : index + 1]))
        except trio.Cancelled:
            self.chats_cancelled += 1
            raise
        prompt_tokens = len((prompt if isinstance(prompt, str) else " ".join(one.content for one in prompt)).split())
        done = Completion(" ".join(words), "stop", Usage(prompt_tokens, len(words)), tokens)
        if self.written is None:
            return values.Answered(done, None)
        receipt = self.written.write(
            receipt_id,
            account=check.account,
            model_id=check.model_id,
            version=check.version,
            manifest_hash=self._models[check.model_id, check.version].manifest_hash,
            precision="bf16",
            check=(check.transaction_hash, check.block_number),
            prompt=prompt,
            parameters=parameters,
            done=done,
        )
        return values.Answered(done, receipt)
