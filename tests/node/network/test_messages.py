"""Messages of the control plane as bytes: what comes back, and what is refused before it costs anything."""

import sys

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadPeer
from node.network.messages import (
    ANSWER_BYTES_MAX,
    Blocks,
    GetBlocks,
    SubmitTransactions,
    decode_answer,
    decode_request,
    encode,
)

GENESIS = bytes(range(32))


def framed(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


@given(st.lists(st.binary(max_size=300), max_size=20).map(tuple))
def test_an_answer_comes_back_as_it_was(blocks: tuple[bytes, ...]) -> None:
    answer = Blocks(7, blocks)
    assert decode_answer(encode(answer)) == answer


def test_repetitive_blocks_shrink() -> None:
    blocks = tuple(b"the same header and the same contract" + bytes([n]) for n in range(100))
    assert len(encode(Blocks(100, blocks))) * 3 < sum(map(len, blocks))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(BadPeer):
        decode_request(noise)
    with pytest.raises(BadPeer):
        decode_answer(framed(noise))


def test_a_frame_that_would_expand_over_the_limit_is_refused_by_its_header() -> None:
    bomb = framed(bytes(ANSWER_BYTES_MAX + 1))
    assert len(bomb) < 2000
    with pytest.raises(BadPeer, match=f"says it has {ANSWER_BYTES_MAX + 1} bytes"):
        decode_answer(bomb)


def test_a_frame_without_its_size_is_refused() -> None:
    request = msgspec.msgpack.encode(GetBlocks(GENESIS, 1, 1, 0.0))
    assert decode_request(framed(request)) == GetBlocks(GENESIS, 1, 1, 0.0)
    with pytest.raises(BadPeer):
        decode_request(framed(request, write_content_size=False))


def test_bytes_after_the_frame_and_a_frame_cut_short_are_refused() -> None:
    request = encode(SubmitTransactions(GENESIS, (b"raw" * 50,)))
    for data in (request + b"\0", request[:-1], request + request):
        with pytest.raises(BadPeer):
            decode_request(data)


def test_what_is_nested_without_end_is_refused() -> None:
    nested = b"\x91" * 3000 + b"\xc0"
    request = b"\x83\xa4type\xa9GetBlocks\xa1x" + nested + b"\xa1y\xc0"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # a node's own, see node.startup
    try:
        for decode in (decode_request, decode_answer):
            with pytest.raises(BadPeer):
                decode(framed(request))
    finally:
        sys.setrecursionlimit(limit)
