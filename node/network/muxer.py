"""Yamux with a bound on what one connection can make us hold in memory.

py-libp2p 0.8.1 reads a data frame of whatever size is announced (up to 4 GiB) in one piece, and only warns when a
peer sends more than its receive window allows. Both are ended here. Knows nothing above bytes.
"""

from typing import Any, Final

import trio
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux

FRAME_BYTES_MAX: Final = 1 << 20
"""Sixteen times what py-libp2p and go-libp2p send."""
BUFFERED_BYTES_MAX: Final = 16 << 20
"""Unread bytes of all streams of a connection: three of the largest answers."""

MUXERS: Final = {PROTOCOL_ID: Yamux}
"""What is offered: py-libp2p's other muxer, mplex, has no flow control at all."""


class _Buffer(bytearray):
    """A stream's unread bytes; counts its neighbours too before it grows."""

    buffers: "_Buffers"

    def extend(self, data: Any) -> None:
        if sum(map(len, self.buffers.values())) + len(data) > BUFFERED_BYTES_MAX:
            # The muxer takes any exception here as the end of this stream, and drops what comes after.
            raise BufferError(f"over {BUFFERED_BYTES_MAX:,} bytes are unread on this connection")
        super().extend(data)


class _Buffers(dict[int, bytearray]):
    """Yamux puts a plain bytearray in for each new stream; it becomes a bounded one."""

    def __setitem__(self, stream_id: int, buffer: bytearray) -> None:
        bounded = _Buffer(buffer)
        bounded.buffers = self
        super().__setitem__(stream_id, bounded)


class BoundedYamux(Yamux):
    """Yamux whose peer cannot fill our memory."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.stream_buffers = _Buffers()

    async def _read_data_body(self, length: int) -> bytes:
        if length > FRAME_BYTES_MAX:
            # The one exception after which the muxer closes the connection instead of reading on in the middle.
            raise trio.TooSlowError
        body: bytes = await super()._read_data_body(length)
        return body


def install(network: Any) -> None:
    """Have a swarm's connections use it: the name Yamux is fixed in the upgrader, so its one method is replaced."""
    multistream = network.upgrader.muxer_multistream

    async def new_conn(secured: Any, peer_id: Any) -> Any:
        protocol, _ = await multistream._selector.select(secured, secured.is_initiator, multistream.negotiate_timeout)
        muxed = BoundedYamux(secured, peer_id, is_initiator=secured.is_initiator)
        return multistream._annotate_connection(muxed, secured, protocol)

    multistream.new_conn = new_conn
