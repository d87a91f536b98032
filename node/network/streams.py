"""Frames on libp2p streams, a length and then the bytes; and streams that wait for a next frame.

Knows streams and what breaks on them; no connections, and not what the bytes mean.
"""

import logging
import struct
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.stream.exceptions import StreamEOF

from contracts.errors import BadPeer
from contracts.types import NodeId

log = logging.getLogger(__name__)

IDLE_STREAMS_MAX: Final = 8
"""To one peer, kept for its next request: opening one takes py-libp2p longer than most requests take."""
CLOSE_S_MAX: Final = 3.0
_READ_BYTES: Final = 64 << 10
_LENGTH: Final = struct.Struct(">I")

# What using a connection or stream that breaks can raise; anything else is a bug, here or in libp2p.
STREAM_ERRORS: Final = (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError, OSError)


class IdleStreams:
    """Open streams to peers, with no request on them."""

    def __init__(self) -> None:
        self._idle: defaultdict[NodeId, list[Any]] = defaultdict(list)

    def take(self, node_id: NodeId) -> Any | None:
        """One whose connection is open, if there is any."""
        idle = self._idle[node_id]
        while idle:
            stream = idle.pop()
            if not stream.muxed_conn.is_closed:
                return stream
        return None

    def keep(self, node_id: NodeId, stream: Any) -> bool:
        """Whether there was room for it."""
        idle = self._idle[node_id]
        if len(idle) == IDLE_STREAMS_MAX:
            return False
        idle.append(stream)
        return True

    def forget(self, node_id: NodeId) -> None:
        """The peer is gone, and its streams with it."""
        self._idle.pop(node_id, None)


async def write_frame(stream: Any, data: bytes) -> None:
    await stream.write(_LENGTH.pack(len(data)) + data)


async def read_frame(stream: Any, bytes_max: int, begun: bytes = b"") -> bytes:
    """A frame of which `begun`, not more than its length, is read already."""
    (size,) = _LENGTH.unpack(begun + await _read_exactly(stream, _LENGTH.size - len(begun)))
    if size > bytes_max:
        raise BadPeer(f"a frame of {size} bytes, over the limit of {bytes_max}")
    return await _read_exactly(stream, size)


async def next_frame(stream: Any, bytes_max: int, frame_s_max: float) -> bytes | None:
    """The peer's next frame, however long it has none; None at the stream's end."""
    try:
        begun = await stream.read(_LENGTH.size)
    except StreamEOF:
        return None
    with trio.fail_after(frame_s_max):
        return await read_frame(stream, bytes_max, begun)


async def _read_exactly(stream: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = await stream.read(min(size - len(data), _READ_BYTES))
        if not chunk:
            raise OSError(f"the stream ended after {len(data)} of {size} bytes")
        data += chunk
    return bytes(data)


async def finish(stream: Any, done: bool) -> None:
    """Close a stream whose exchange is complete, reset any other; whatever happens around it."""
    with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S_MAX):
        try:
            await (stream.close() if done else stream.reset())
        except STREAM_ERRORS as error:
            log.debug("a stream did not close: %s", cause(error))


def cause(error: BaseException) -> str:
    """The innermost reason libp2p gives; the outer ones only name layers."""
    reasons = [getattr(inner, "strerror", None) or str(inner) for inner in chain(error) if str(inner)]
    return reasons[-1].rstrip(".") if reasons else type(error).__name__


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, step by step; of several causes (libp2p's MultiError, trio's groups) the first."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        several = getattr(inner, "errors", None) or getattr(inner, "exceptions", None)
        inner = several[0] if several else inner.__cause__
