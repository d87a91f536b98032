"""A proof that one event is on the ledger, for whoever has the genesis file and nothing else: its format, its check.

A proof shows a transaction and its receipt in a final block by Merkle-Patricia proofs against the roots in the block's
header, and the header by the finalising votes of a quorum of the authorities. A contract logs an event only if it
accepted the sender, and the contracts' code is fixed by genesis: a ModelRegistered log is an admin's.

**Who the authorities are.** The checker begins with those of genesis, whose epoch bears the genesis hash. A block that
changes them ends an epoch and gives the next one its hash; it has a place in `changes`: it is final by those before
it, and its own state says, by a storage proof of `Accounts._authorities`, who comes after. A vote signs the name of its
epoch (ledger.seal), so it counts for the set it was cast in and for no other, and no change can be left out. Without
that name, when seven authorities follow one, that one's honest vote would be a quorum of the set it was, and is no
quorum of the set in force. It is enough that of every set of authorities fewer than a third ever signed against the
rules: then a quorum's votes in their own epoch made the block final (Chan and Pass, eprint 2023/463).

**What no such proof can do.** Whoever holds the keys of two thirds of a set that was in force once, removed or not,
can sign another history after it; a storage proof does not help, its root would be theirs. Removed authorities must
destroy their keys, and who does not trust that they did compares a block's hash in the output with one from elsewhere.
An event says what was done, not that it was not undone later: `standing` shows the state at a later block where
storage can tell, and after that block nothing is shown.

The file is canonical JSON: bytes are 0x-hex, and what encodes differently is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import rlp
from eth.rlp.logs import Log
from eth.rlp.receipts import Receipt
from eth.vm.forks.cancun.blocks import CancunBlockHeader
from msgspec import Meta

from contracts import layout
from contracts.errors import BadInput, BadPeer
from contracts.events import ContractEvent, ModelRegistered, ShardsAnnounced, TierGranted, decode_log
from contracts.limits import AUTHORITIES_MAX
from contracts.types import Address, TransactionHash
from genesis.block import GenesisBlock
from ledger import accounts, seal, transactions, witness
from ledger.accounts import Accounts
from ledger.block import BLOCK_TRANSACTIONS_MAX
from ledger.seal import HEADER_BYTES_MAX, VANITY_SIZE, Certificate, quorum

PROOF_BYTES_MAX = 8 << 20
"""A usual one takes about 10 kB."""

CHANGES_MAX = 256
"""Changes of the authorities that one way from genesis may take."""

DESCENDANTS_MAX = 256
NODES_MAX = 512
"""Trie nodes of one part: 32 slots of a list below an account need far fewer."""

NODE_BYTES_MAX = 1 << 18
"""The largest are leaves with a whole transaction or receipt: 131,072 bytes, and up to about 70,000 of logs."""

SUCCEEDED = b"\1"
"""The status of a receipt whose transaction did what it asked (EIP-658)."""


def _hex_of(bytes_max: int, bytes_min: int = 1) -> Meta:
    return Meta(pattern=r"\A0x(?:[0-9a-f]{2})+\Z", min_length=2 + 2 * bytes_min, max_length=2 + 2 * bytes_max)


HashHex = Annotated[str, _hex_of(32, 32)]
VoteHex = Annotated[str, _hex_of(65, 65)]
HeaderHex = Annotated[str, _hex_of(HEADER_BYTES_MAX)]
NodesHex = Annotated[tuple[Annotated[str, _hex_of(NODE_BYTES_MAX)], ...], Meta(min_length=1, max_length=NODES_MAX)]


class FinalBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block and why it is final. `votes` are exactly a quorum, for it or for the last of `descendants`; headers are
    RLP."""

    header: HeaderHex
    descendants: Annotated[tuple[HeaderHex, ...], Meta(max_length=DESCENDANTS_MAX)]
    votes: Annotated[tuple[VoteHex, ...], Meta(max_length=AUTHORITIES_MAX)]


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A block that changed the authorities. `authorities` are nodes of its own state."""

    block: FinalBlock
    authorities: NodesHex


class Way(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the authorities known already to a final block."""

    changes: Annotated[tuple[Change, ...], Meta(max_length=CHANGES_MAX)]
    block: FinalBlock


class Standing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That what the event says still held in a later block, whose way begins where the event's ended."""

    way: Way
    state: NodesHex


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. `transaction` and `receipt` are nodes of the block's two tries."""

    format: Literal["aigen-proof-1"]
    genesis_hash: HashHex
    way: Way
    transaction_index: Annotated[int, Meta(ge=0, lt=BLOCK_TRANSACTIONS_MAX)]
    transaction: NodesHex
    receipt: NodesHex
    standing: Standing | None

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def decode(data: bytes) -> Proof:
    """Raises BadInput for anything that is not one proof within the limits, canonically encoded."""
    if len(data) > PROOF_BYTES_MAX:
        raise BadInput(f"a proof of {len(data)} bytes, at most {PROOF_BYTES_MAX} are read")
    try:
        proof = msgspec.json.decode(data, type=Proof)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a proof of this version: {error}") from error
    if proof.encode() != data:
        raise BadInput("not a proof as it was made: its text was written anew, ask for the file itself")
    return proof


def shown(data: bytes) -> str:
    return f"0x{data.hex()}"


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def _all_bytes(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(map(_bytes, texts))


@dataclass(frozen=True)
class ProvenBlock:
    """A block that is final, and who voted for it, out of how many."""

    number: int
    hash: bytes
    timestamp: int
    signers: tuple[Address, ...]
    authority_count: int


@dataclass(frozen=True)
class Proven:
    """What a proof shows. `sender` signed the transaction that made the event; `standing` is the newest block in whose
    state the event is shown to hold, None without such a part; `changes` are the blocks that changed the authorities on
    the way."""

    event: ContractEvent
    sender: Address
    transaction_hash: TransactionHash
    block: ProvenBlock
    standing: ProvenBlock | None
    changes: tuple[int, ...]


def check(data: bytes, genesis: GenesisBlock, chain_id: int) -> Proven:
    """What the file proves. Raises BadInput unless all of it holds."""
    proof = decode(data)
    if proof.genesis_hash != shown(genesis.hash):
        raise BadInput(
            f"the proof is of the network with genesis {proof.genesis_hash}, the genesis file given is of "
            f"{shown(genesis.hash)}: take the genesis file of its network"
        )
    try:
        return _check(proof, genesis, chain_id)
    except (BadPeer, BadInput) as error:
        raise BadInput(f"the proof does not hold: {error}") from error


def _check(proof: Proof, genesis: GenesisBlock, chain_id: int) -> Proven:
    trail = _Trail(genesis)
    header, block = trail.follow(proof.way)
    transaction = transactions.decode(
        _item(proof.transaction, header.transaction_root, proof.transaction_index), chain_id, header.gas_limit
    )
    event = provable_event(_item(proof.receipt, header.receipt_root, proof.transaction_index))
    if isinstance(event, ModelRegistered) and event.admin != transaction.sender:
        raise BadInput(f"{shown(event.admin)} registered the model and {shown(transaction.sender)} signed")
    standing = None if proof.standing is None else _check_standing(trail, proof.standing, event)
    return Proven(event, transaction.sender, transaction.hash, block, standing, tuple(trail.changes))


def _item(nodes: tuple[str, ...], root: bytes, index: int) -> bytes:
    return witness.proven(_all_bytes(nodes), lambda found: witness.item(found, bytes(root), index))


class _Trail:
    """The authorities the checker believes in, block by block."""

    def __init__(self, genesis: GenesisBlock) -> None:
        self._epoch = genesis.hash
        self._authorities = accounts.fold(Accounts(), genesis.events).authorities
        self._number = 0
        self.changes: list[int] = []

    def follow(self, way: Way) -> tuple[CancunBlockHeader, ProvenBlock]:
        """Take every change of a way, and come to its block. Raises BadPeer or BadInput."""
        for change in way.changes:
            header, block = self._take(change.block)
            after = _authorities(change.authorities, header)
            if after == self._authorities:
                raise BadInput(f"block {block.number} does not change the authorities")
            self._authorities, self._epoch = after, block.hash
            self.changes.append(block.number)
        return self._take(way.block)

    def _take(self, final: FinalBlock) -> tuple[CancunBlockHeader, ProvenBlock]:
        header = seal.decode_header(_bytes(final.header))
        number = int(header.block_number)
        if header.extra_data[:VANITY_SIZE] != seal.vanity(self._epoch):
            raise BadInput(f"block {number}: it is not of the epoch that began with {shown(self._epoch)}")
        if number < self._number:
            raise BadInput(f"block {number}: it comes after block {self._number}")
        certificate = self._certificate(final, header)
        seal.check_certificate(certificate, header, self._epoch, tuple(self._authorities))
        self._number = number
        signers = seal.voters(certificate)
        return header, ProvenBlock(number, bytes(header.hash), header.timestamp, signers, len(self._authorities))

    def _certificate(self, final: FinalBlock, header: CancunBlockHeader) -> Certificate:
        needed = quorum(len(self._authorities))
        if len(final.votes) != needed:
            raise BadInput(f"block {header.block_number}: {len(final.votes)} votes, a proof has the {needed} it needs")
        descendants = _all_bytes(final.descendants)
        voted = seal.decode_header(descendants[-1]) if descendants else header
        return Certificate(
            self._epoch, bytes(voted.hash), seal.iteration_of(voted), _all_bytes(final.votes), descendants
        )


def _authorities(nodes: tuple[str, ...], header: CancunBlockHeader) -> frozenset[Address]:
    """Who the authorities are in the state after a block."""
    return witness.proven(_all_bytes(nodes), lambda found: witness.authorities(found, bytes(header.state_root)))


def provable_event(encoded_receipt: bytes) -> ContractEvent:
    """The one event of a receipt that proofs are about. Raises BadInput for a receipt without one."""
    receipt = _decode_receipt(encoded_receipt)
    if receipt.state_root != SUCCEEDED:
        raise BadInput("the transaction failed")
    events = [_decode_log(log) for log in receipt.logs]
    found = [event for event in events if isinstance(event, ModelRegistered | TierGranted | ShardsAnnounced)]
    if len(found) != 1:
        raise BadInput(f"the transaction made {len(found)} events of those that are proved, a proof is of one")
    return found[0]


def _decode_receipt(encoded: bytes) -> Receipt:
    # EIP-2718: a receipt of another type than legacy begins with that type, and no RLP list begins with such a byte.
    typed = encoded[0] == transactions.DYNAMIC_FEE_TYPE
    try:
        return rlp.decode(encoded[1:] if typed else encoded, Receipt)
    except (rlp.exceptions.RLPException, ValueError, TypeError, RecursionError) as error:
        raise BadInput("what stands in the receipt's place is none") from error


def _decode_log(log: Log) -> ContractEvent | None:
    topics = [topic.to_bytes(32) for topic in log.topics]
    return decode_log(bytes(log.address), topics, bytes(log.data))


def _check_standing(trail: _Trail, standing: Standing, event: ContractEvent) -> ProvenBlock:
    if layout.standing_in(event) is None:
        raise BadInput(f"no state tells whether {type(event).__name__} still stands")
    header, block = trail.follow(standing.way)
    if not witness.proven(_all_bytes(standing.state), lambda found: stands(found, bytes(header.state_root), event)):
        raise BadInput(f"the state of block {block.number} does not say what the event says")
    return block


def stands(found: witness.Witness, state_root: bytes, event: ContractEvent) -> bool:
    """Whether the state with this root still says what the event says. Raises BadInput; False when no state tells."""
    contract = layout.standing_in(event)
    return contract is not None and layout.stands(event, witness.storage(found, state_root, contract))
