"""Authorities that lie, for simulations: real nodes whose messages are replaced on their way out.

Each lie is a function of the node, the receiver and an outgoing message, and gives what is sent instead. A liar signs
with its own key only: nobody can forge another's.
"""

from __future__ import annotations

import msgspec
import rlp

from ledger import seal
from ledger.exchange import Message, Proposed, RoundStatus, Statement, Status, decode, encode
from ledger.votes import NO_BLOCK, Evidence, Kind, Votes, sign
from tests.ledger.simulation import Filter, Node


def withhold(node: Node, to: int, data: bytes) -> list[bytes]:
    """Says nothing to some, and little to the rest."""
    return [] if to % 2 or node.simulation.draw.random() < 0.5 else [data]


def vote_for_everything(node: Node, to: int, data: bytes) -> list[bytes]:
    """Signs every statement of an iteration it hears of, and others that nobody made."""
    envelope, draw = decode(data), node.simulation.draw
    if not isinstance(envelope.message, Votes):
        return [data]
    votes = envelope.message
    hashes = [votes.block_hash, draw.randbytes(32)] if votes.kind is not Kind.DUMMY else [draw.randbytes(32)]
    said = [(Kind.DUMMY, NO_BLOCK), *((kind, h) for kind in (Kind.NOTARISE, Kind.FINALISE) for h in hashes)]
    own = [
        Votes(kind, votes.iteration, block_hash, (sign(node.key, envelope.epoch, kind, votes.iteration, block_hash),))
        for kind, block_hash in said
    ]
    return [data, *(encode(envelope.epoch, each) for each in own)]


def equivocate(node: Node, to: int, data: bytes) -> list[bytes]:
    """Proposes one block to some and another to the rest, and votes for both."""
    envelope = decode(data)
    if not isinstance(envelope.message, Proposed) or not to % 2:
        return [data]
    other = resealed(node, envelope.message, timestamp=seal.decode_header(envelope.message.header_rlp).timestamp + 1)
    if other is None:
        return [data]
    header = seal.decode_header(other.header_rlp)
    iteration, block_hash = seal.iteration_of(header), bytes(header.hash)
    votes = [
        Votes(kind, iteration, block_hash, (sign(node.key, envelope.epoch, kind, iteration, block_hash),))
        for kind in (Kind.NOTARISE, Kind.FINALISE)
    ]
    return [encode(envelope.epoch, message) for message in (other, *votes)]


def seal_bad_blocks(node: Node, to: int, data: bytes) -> list[bytes]:
    """Proposes blocks that are wrong in one of many ways, properly sealed."""
    envelope, draw = decode(data), node.simulation.draw
    if not isinstance(envelope.message, Proposed):
        return [data]
    header = seal.decode_header(envelope.message.header_rlp)
    change = draw.choice(
        (
            {"state_root": draw.randbytes(32)},
            {"gas_used": header.gas_used + 1},
            {"timestamp": header.timestamp - 1000},
            {"timestamp": header.timestamp + 1000},
            {"block_number": header.block_number + 1},
            {"parent_hash": draw.randbytes(32)},
            {"transactions": ()},
            {"transactions": (draw.randbytes(100),)},
        )
    )
    bad = resealed(node, envelope.message, **change)
    return [data] if bad is None else [encode(envelope.epoch, bad)]


def flood(node: Node, to: int, data: bytes) -> list[bytes]:
    """Many votes of far iterations, statuses that claim everything, and every message three times."""
    envelope, draw = decode(data), node.simulation.draw
    noise: list[Message] = []
    for _ in range(2):
        iteration, block_hash = draw.randint(1, 200), draw.randbytes(32)
        kind = draw.choice((Kind.NOTARISE, Kind.FINALISE))
        signature = sign(node.key, envelope.epoch, kind, iteration, block_hash)
        noise.append(Votes(kind, iteration, block_hash, (signature,)))
        claim = Statement(Kind.NOTARISE, block_hash, 2**31 - 1)
        noise.append(Status(0, draw.randint(1, 2**40), (RoundStatus(iteration, (block_hash,), (claim,)),)))
    return [data] * 3 + [encode(envelope.epoch, message) for message in noise]


def conspire(node: Node, to: int, data: bytes) -> list[bytes]:
    """Proposes two blocks and votes for everything: the worst of both."""
    return [each for sent in equivocate(node, to, data) for each in vote_for_everything(node, to, sent)]


def accuse(node: Node, to: int, data: bytes) -> list[bytes]:
    """Sends evidence that proves nothing: of what may be said, of two voters, of an epoch that never was."""
    envelope, draw = decode(data), node.simulation.draw
    if not isinstance(envelope.message, Votes):
        return [data]
    heard, epoch = envelope.message, envelope.epoch
    other = msgspec.structs.replace(heard, block_hash=draw.randbytes(32), signatures=heard.signatures[:1])

    def signed(kind: Kind, block_hash: bytes, epoch: bytes = epoch) -> Votes:
        signature = sign(node.key, epoch, kind, heard.iteration, block_hash)
        return Votes(kind, heard.iteration, block_hash, (signature,))

    never = draw.randbytes(32)
    accusations = (
        Evidence(epoch, signed(Kind.DUMMY, NO_BLOCK), signed(Kind.NOTARISE, other.block_hash)),
        Evidence(epoch, signed(Kind.NOTARISE, other.block_hash), other),
        Evidence(never, *(signed(Kind.NOTARISE, draw.randbytes(32), never) for _ in range(2))),
    )
    return [data, encode(epoch, draw.choice(accusations))]


LIES: tuple[Filter, ...] = (withhold, vote_for_everything, equivocate, seal_bad_blocks, flood, conspire, accuse)


def resealed(node: Node, message: Proposed, **changes: object) -> Proposed | None:
    """A proposal of this node's changed and sealed again; None when it is another's."""
    header = seal.decode_header(message.header_rlp)
    if seal.proposer_of(header) != node.key.address:
        return None
    transactions = changes.pop("transactions", message.transactions)
    unsealed = header.copy(extra_data=header.extra_data[: seal.UNSEALED_SIZE], **changes)
    return msgspec.structs.replace(
        message, header_rlp=rlp.encode(seal.seal(unsealed, node.key)), transactions=transactions
    )


def make_liars(simulation: object, lies: tuple[Filter, ...] = LIES) -> None:
    """As many liars as may be, each with a drawn lie."""
    from tests.ledger.simulation import Simulation

    assert isinstance(simulation, Simulation)
    for node in simulation.draw.sample(simulation.nodes, (simulation.size - 1) // 3):
        node.lies = simulation.draw.choice(lies)


def make_conspirators(simulation: object) -> None:
    make_liars(simulation, (conspire,))
