"""What nodes say to each other on the control plane: requests with answers (`/aigen/sync/1`), and what is told to all.

A message is MessagePack in one Zstandard frame (RFC 8878): a chain's blocks shrink about three times.

Every request names the sender's genesis hash, so nodes of different networks never exchange anything but that fact.
Sizes and counts are part of the types: decoding refuses what is over them. Knows no sockets.
"""

from typing import Annotated, Final

import msgspec
import zstandard
from msgspec import Meta, Struct

from contracts.errors import BadPeer
from node.agreement import StateMark
from node.network.addresses import ENDPOINT_CHARS_MAX

BLOCKS_MAX: Final = 256
"""Blocks in one answer."""
BLOCKS_BYTES_MAX: Final = 1 << 20
"""What an answer's blocks may add up to, unless it is a single block: little, so that slow links meet the deadline."""
TRANSACTIONS_MAX: Final = 64
TRANSACTIONS_BYTES_MAX: Final = 1 << 20
MARKS_MAX: Final = 8
CONSENSUS_MAX: Final = 64
CONSENSUS_BYTES_MAX: Final = 1 << 20
"""What the messages of one Deliver may add up to, unless it is a single one."""
LONG_POLL_S_MAX: Final = 30.0
REQUEST_BYTES_MAX: Final = 3 << 20
"""One proposal of the largest size (2 MiB and some, ledger.exchange) with its framing."""
ANSWER_BYTES_MAX: Final = 12 << 20
"""One block of the largest size (4 MiB, ledger.block) with its receipts, whose logs say again what its calls said."""
TOLD_BYTES_MAX: Final = 1 << 20
"""What is told to all, as it is; packed it has to be under `node.network.mesh.MESSAGE_BYTES_MAX`."""
NODES_MAX: Final = 512
"""State nodes in one answer."""
NODES_BYTES_MAX: Final = 1 << 20
REASON_CHARS_MAX: Final = 512
COMPRESSION_LEVEL: Final = 3

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Endpoint = Annotated[str, Meta(max_length=ENDPOINT_CHARS_MAX)]
Reason = Annotated[str, Meta(max_length=REASON_CHARS_MAX)]


Marks = Annotated[tuple[StateMark, ...], Meta(max_length=MARKS_MAX)]
"""Hashes of the sender's state after some blocks, which are the same on all nodes."""


class Hello(Struct, frozen=True, tag=True):
    """The first request on a connection: which network, how far, where pieces are served."""

    genesis_hash: Hash
    chain_id: Number
    head_number: Number
    data_endpoint: Endpoint | None
    marks: Marks = ()


class GetBlocks(Struct, frozen=True, tag=True):
    """Sealed blocks from `start` on, or with `count` 0 just the head. While there is no block `start`, the answer may
    take up to `wait_s`."""

    genesis_hash: Hash
    start: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    count: Annotated[int, Meta(ge=0, le=BLOCKS_MAX)]
    wait_s: Annotated[float, Meta(ge=0, le=LONG_POLL_S_MAX)]
    with_receipts: bool = False
    """For who does not execute them."""


class GetNodes(Struct, frozen=True, tag=True):
    """Nodes of the state's tries by their hashes."""

    genesis_hash: Hash
    keys: Annotated[tuple[Hash, ...], Meta(min_length=1, max_length=NODES_MAX)]


class SubmitTransactions(Struct, frozen=True, tag=True):
    """Raw signed transactions for the pool."""

    genesis_hash: Hash
    transactions: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=TRANSACTIONS_MAX)]


class Deliver(Struct, frozen=True, tag=True):
    """What authorities say to one another while they decide on blocks (`ledger.exchange`), in order."""

    genesis_hash: Hash
    messages: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=CONSENSUS_MAX)]


Request = Hello | GetBlocks | GetNodes | SubmitTransactions | Deliver


class Welcome(Struct, frozen=True, tag=True):
    """The answer to Hello."""

    head_number: Number
    data_endpoint: Endpoint | None
    marks: Marks = ()


class Blocks(Struct, frozen=True, tag=True):
    """The answer to GetBlocks; `head_number` is the sender's head when it answered."""

    head_number: Number
    blocks: Annotated[tuple[bytes, ...], Meta(max_length=BLOCKS_MAX)]
    marks: Marks = ()
    receipts: Annotated[tuple[bytes, ...], Meta(max_length=BLOCKS_MAX)] = ()
    """Each block's, when they were asked for."""


class Nodes(Struct, frozen=True, tag=True):
    """The answer to GetNodes: the first of them, up to one that the sender has not or that would be too much."""

    nodes: Annotated[tuple[bytes, ...], Meta(max_length=NODES_MAX)]


class Submitted(Struct, frozen=True, tag=True):
    """The answer to SubmitTransactions: for each why it was refused, or an empty string."""

    refusals: Annotated[tuple[Reason, ...], Meta(max_length=TRANSACTIONS_MAX)]


class Delivered(Struct, frozen=True, tag=True):
    """The answer to Deliver; what it thinks of the messages, it says with messages of its own."""


class TurnedAway(Struct, frozen=True, tag=True):
    """Instead of an answer: why the peer does not get one."""

    reason: Reason


Answer = Welcome | Blocks | Nodes | Submitted | Delivered | TurnedAway


class Transactions(Struct, frozen=True, tag=True):
    """Told to all: signed transactions for the pool."""

    transactions: Annotated[tuple[bytes, ...], Meta(min_length=1, max_length=TRANSACTIONS_MAX)]


class NewBlock(Struct, frozen=True, tag=True):
    """Told to all: the sealed block `number`."""

    number: Number
    sealed: bytes


class NewHead(Struct, frozen=True, tag=True):
    """Told to all: the sender has block `number`, which is too large to be told."""

    number: Number


Told = Transactions | NewBlock | NewHead

_told = msgspec.msgpack.Decoder(Told)
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)
_encoder = msgspec.msgpack.Encoder()


def encode(message: Request | Answer | Told) -> bytes:
    return zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compress(_encoder.encode(message))


def decode_request(data: bytes) -> Request:
    try:
        return _requests.decode(_expand(data, REQUEST_BYTES_MAX))
    except (msgspec.MsgspecError, zstandard.ZstdError, RecursionError) as error:
        raise BadPeer(f"a request of {len(data)} bytes that is none: {error}") from None


def decode_answer(data: bytes) -> Answer:
    try:
        return _answers.decode(_expand(data, ANSWER_BYTES_MAX))
    except (msgspec.MsgspecError, zstandard.ZstdError, RecursionError) as error:
        raise BadPeer(f"an answer of {len(data)} bytes that is none: {error}") from None


def decode_told(data: bytes) -> Told:
    try:
        return _told.decode(_expand(data, TOLD_BYTES_MAX))
    except (msgspec.MsgspecError, zstandard.ZstdError, RecursionError) as error:
        raise BadPeer(f"a message of {len(data)} bytes that is none: {error}") from None


def _expand(data: bytes, bytes_max: int) -> bytes:
    """The frame's content. Its size stands in the frame's header and is checked before a byte of it is made."""
    size = zstandard.frame_content_size(data)
    if not 0 <= size <= bytes_max:
        raise BadPeer(f"a message that says it has {size} bytes, 0 to {bytes_max} are taken")
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=bytes_max, allow_extra_data=False)


def shorten(reason: str) -> str:
    """`reason` cut to what a message may carry."""
    return reason if len(reason) <= REASON_CHARS_MAX else reason[: REASON_CHARS_MAX - 3] + "..."
