"""Packed pieces as bytes: what comes back, how small it is, and what is refused before it costs anything."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadPeer
from contracts.types import PIECE_SIZE
from node.network.planes import PLANES, Packer, Unpacker
from tests.node.network.artifacts import SEED, weights

MAGIC = bytes.fromhex("28b52ffd")


def pack(piece: bytes) -> bytes | None:
    return Packer().pack(memoryview(piece))


def unpack(packed: bytes, size: int = PIECE_SIZE) -> bytes:
    piece = bytearray(size)
    Unpacker().unpack(memoryview(packed), memoryview(piece))
    return bytes(piece)


def by_hand(piece: bytes, count: int) -> bytes:
    """The format, written down a second time."""
    return bytes([count]) + zstandard.compress(b"".join(piece[plane::count] for plane in range(count)), level=1)


def frame(header: str, *blocks: bytes) -> bytes:
    """A frame of blocks as they are, behind a header of one's own."""
    ends = [b"\1"] * len(blocks)
    ends[:-1] = [b"\0"] * (len(blocks) - 1)
    sized = (
        (int.from_bytes(end) | len(block) << 3).to_bytes(3, "little") + block
        for end, block in zip(ends, blocks, strict=True)
    )
    return b"\1" + MAGIC + bytes.fromhex(header) + b"".join(sized)


@given(st.binary(min_size=1, max_size=300), st.sampled_from(PLANES))
def test_any_length_in_any_number_of_planes_comes_back(piece: bytes, count: int) -> None:
    assert unpack(by_hand(piece, count), len(piece)) == piece


@given(
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.integers(1, 70_000),
    st.integers(0, 7),
    st.binary(max_size=50),
)
def test_what_is_packed_comes_back_wherever_numbers_begin(kind: str, size: int, begin: int, before: bytes) -> None:
    piece = (before + weights(size + begin, kind)[begin:])[:PIECE_SIZE]
    packed = pack(piece)
    if packed is not None:
        assert len(packed) < len(piece)
        assert packed == by_hand(piece, packed[0])
        assert unpack(packed, len(piece)) == piece


@pytest.mark.parametrize(
    ("kind", "begin", "planes", "ratio"),
    [("bf16", 0, 2, 1.4), ("bf16", 1, 2, 1.4), ("fp16", 0, 2, 1.15), ("fp32", 0, 4, 1.15), ("fp32", 3, 4, 1.15)],
)
def test_floats_are_packed_in_as_many_planes_as_they_have_bytes(
    kind: str, begin: int, planes: int, ratio: float
) -> None:
    piece = weights(PIECE_SIZE + begin, kind)[begin:]
    packed = pack(piece)
    assert packed is not None
    assert packed[0] == planes
    assert len(piece) / len(packed) > ratio
    assert unpack(packed) == piece


def test_a_piece_of_two_tensors_is_packed_as_most_of_it_gains() -> None:
    piece = weights(PIECE_SIZE // 2, "bf16") + weights(PIECE_SIZE // 2, "fp32")
    packed = pack(piece)
    assert packed is not None
    assert len(packed) < 0.85 * len(piece)
    assert unpack(packed) == piece


def test_text_is_packed_as_it_is_and_noise_not_at_all() -> None:
    words = random.Random(SEED)
    text = " ".join(words.choice(["shard", "piece", "plane", "model"]) + str(words.random()) for _ in range(60_000))
    piece = text.encode()[:PIECE_SIZE]
    packed = pack(piece)
    assert packed is not None
    assert packed[0] == 1
    assert pack(random.Random(SEED).randbytes(PIECE_SIZE)) is None
    assert pack(b"x") is None


def test_a_sample_that_promises_too_much_does_not_make_a_piece_larger() -> None:
    """Zeros where the sample is taken, noise everywhere else."""
    piece = bytearray(random.Random(SEED).randbytes(PIECE_SIZE))
    for at in range(0, PIECE_SIZE, PIECE_SIZE // 4):
        piece[at : at + 4096] = bytes(4096)
    packed = pack(bytes(piece))
    assert packed is None or len(packed) < len(piece)


SIZED = "a0" + (PIECE_SIZE).to_bytes(4, "little").hex()
"""One segment of a piece's size."""


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (b"\2" + zstandard.compress(bytes(64 << 20)), "says it has 67,108,864 bytes where 1,048,576 are due"),
        (b"\2" + zstandard.compress(bytes(PIECE_SIZE - 1)), "says it has 1,048,575 bytes where 1,048,576 are due"),
        (b"\2" + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PIECE_SIZE)), "has -1 bytes"),
        (by_hand(bytes(PIECE_SIZE), 2) + b"\0", "cannot be unpacked"),
        (by_hand(bytes(PIECE_SIZE), 2) + zstandard.compress(bytes(PIECE_SIZE)), "cannot be unpacked"),
        (by_hand(bytes(PIECE_SIZE), 2)[:-1], "cannot be unpacked"),
        (b"\3" + by_hand(bytes(PIECE_SIZE), 2)[1:], "comes in 3 planes, 1, 2, 4 are known"),
        (b"\0", "comes in 0 planes"),
        (b"\2", "cannot be unpacked"),
        (b"\2" + MAGIC, "cannot be unpacked"),
        (frame(SIZED, *[bytes(1 << 17)] * 7), "cannot be unpacked"),
        (frame(SIZED, *[bytes(1 << 17)] * 9), "cannot be unpacked"),
        # A window of 128 MiB in a frame that does not end.
        (frame("8088" + PIECE_SIZE.to_bytes(4, "little").hex(), bytes(1 << 17))[:-1], "requires too much memory"),
    ],
)
def test_what_is_no_packed_piece_is_refused(packed: bytes, reason: str) -> None:
    with pytest.raises(BadPeer, match=reason):
        unpack(packed)


def test_the_frames_made_by_hand_are_frames() -> None:
    assert unpack(frame(SIZED, *[b"x" * (1 << 17)] * 8)) == b"x" * PIECE_SIZE


@given(st.binary(min_size=1, max_size=400), st.integers(0, 3000), st.integers(0, 255))
def test_noise_and_flipped_bytes_are_refused_or_fill_the_piece(noise: bytes, at: int, flip: int) -> None:
    size = 4096
    packed = bytearray(by_hand(weights(size), 2))
    packed[at % len(packed)] ^= flip
    for data in (noise, b"\2" + MAGIC + noise, bytes(packed)):
        try:
            assert len(unpack(data, size)) == size
        except BadPeer:
            continue
