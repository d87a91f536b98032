"""What the RPC room asks of the node, which answers with `node.rpc.values`.

`NodePort` is the whole of it: the service implements it, tests fake it. Reads are synchronous and come from
projections, never from the EVM and never from a peer; only the `async` ones act. What is raised is of contracts.errors;
all else is a bug. Knows no HTTP and no JSON.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from contracts.types import Address, ModelId, TransactionHash, Version
from ledger.proof import Proof
from ledger.prover import Shows
from node.agreement import StateMark
from node.inference.spec import Parameters, Prompt
from node.receipts import Receipt
from node.rpc.values import (
    AccountInfo,
    Answered,
    AuthorityInfo,
    BlockInfo,
    CatalogueEntry,
    ChainInfo,
    ChatChunk,
    FreedShard,
    Health,
    HeldShard,
    LoadState,
    MemberInfo,
    ModelInfo,
    NodeInfo,
    ReceiptInfo,
    ShardCheck,
    ShardInfo,
    SignedTransaction,
    TierCheck,
)

Emit = Callable[[ChatChunk | LoadState], Awaitable[None]]
"""Hands the asker what is ready so far; waits while the asker reads slowly, and is cancelled when it leaves."""


class NodePort(Protocol):
    """The node as the RPC room sees it."""

    @property
    def chain_id(self) -> int:
        """The ledger's chain id, which bearer tokens are signed for."""

    @property
    def operator(self) -> Address:
        """The account this node's operator key belongs to."""

    # The ledger, from projections

    def models(self) -> tuple[ModelInfo, ...]:
        """Every registered (model_id, version), retired ones too, in order of registration."""

    def model(self, model_id: ModelId, version: Version | None) -> ModelInfo | None:
        """One model; without a version the newest that is not retired. None: unknown."""

    def catalogue(self) -> tuple[CatalogueEntry, ...]: ...

    def shards(self, model_id: ModelId, version: Version) -> tuple[ShardInfo, ...]:
        """The shards of a registered model in order, with their locations."""

    def members(self) -> tuple[MemberInfo, ...]: ...

    def authorities(self) -> tuple[AuthorityInfo, ...]: ...

    def account(self, account: Address) -> AccountInfo:
        """Any address has one: an unknown one has nonce 0 and nothing else."""

    def chain(self) -> ChainInfo: ...

    async def state_hashes(self) -> tuple[StateMark, ...]:
        """Of the newest block and some before it that other nodes name too, the newest last."""

    def block(self, at: int | bytes | None) -> BlockInfo | None:
        """A final block by number or hash; the head for None. None: not known here."""

    def receipt(self, transaction_hash: TransactionHash) -> ReceiptInfo | None:
        """None until the transaction is in a final block."""

    async def prove(self, shows: Shows) -> Proof:
        """The proof of the newest event that `shows` picks. Raises NotFound, or Conflict when genesis has it."""

    # This node

    def node_info(self) -> NodeInfo: ...

    def health(self) -> Health: ...

    def load_state(self, model_id: ModelId, version: Version) -> LoadState:
        """Where this node stands with a registered model; state `absent` when it never touched it."""

    def load_states(self) -> tuple[LoadState, ...]:
        """Every model that is not `absent`."""

    def held_shards(self) -> tuple[HeldShard, ...]: ...

    @property
    def gives_receipts(self) -> bool:
        """Whether answers carry a receipt."""

    def answer_receipt(self, receipt_id: str) -> Receipt | None:
        """One of the newest; None when it is not among them, or its answer has not ended."""

    # Acts

    def decode_transaction(self, raw: bytes) -> SignedTransaction:
        """Decode and check what needs no state: kind, signature, chain id, fees. Raises BadInput."""

    async def submit(self, raw: bytes) -> TransactionHash:
        """Put a transaction into the pool. Raises Refused (bad nonce, not enrolled, pool full); known: its hash."""

    async def check_tier(self, account: Address, model_id: ModelId, version: Version) -> TierCheck:
        """The recorded decision: the one in force for (account, model, version), or one made on the ledger now."""

    async def load_model(self, model_id: ModelId, version: Version, wait: bool) -> LoadState:
        """Begin to fetch, verify and load. Answers at once, or when loaded with `wait` (raising why it failed).

        Cancelling the wait leaves the load going: others may wait for it too.
        """

    async def unload_model(self, model_id: ModelId, version: Version) -> LoadState:
        """Give the memory back. Raises Conflict for a pinned model or one that is answering."""

    async def free_space(self, size: int) -> tuple[FreedShard, ...]:
        """Give up shards that enough others have, until `size` bytes are free or there is no more of them."""
        ...

    async def verify_shards(self, model_id: ModelId | None) -> tuple[ShardCheck, ...]:
        """Re-hash the held shards now (all, or one model's); what is bad is demoted and fetched again."""

    async def chat(
        self,
        check: TierCheck,
        *,
        prompt: Prompt,
        parameters: Parameters,
        emit: Emit | None,
        receipt_id: str,
    ) -> Answered:
        """Answer a prompt, loading the model first when it is not. `check` let the account use the model.

        With `emit`, every chunk of text goes out as it comes (and LoadState while loading); what is returned has the
        whole text either way. Cancelling stops the generation at the next token; there is no receipt then.
        """
