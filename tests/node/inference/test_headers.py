"""safetensors headers from strangers: every lie is refused, nothing is allocated for it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadInput
from node.inference.headers import parse


def file_of(header: object, data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def parsed(content: bytes) -> object:
    return parse("model.safetensors", len(content), lambda offset, size: content[offset : offset + size])


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_good_header() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F32", [2, 2], 6, 22),
        "a": entry("BF16", [3], 0, 6),
        "s": entry("F32", [], 22, 26),
        "z": entry("F16", [0, 5], 26, 26),
    }
    content = file_of(header, 26)
    tensors = parse("m", len(content), lambda offset, size: content[offset : offset + size])
    start = len(content) - 26
    assert [(t.name, t.shape, t.offset - start, t.size) for t in tensors] == [
        ("a", (3,), 0, 6),
        ("b", (2, 2), 6, 16),
        ("s", (), 22, 4),
        ("z", (0, 5), 26, 0),
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "has 0 bytes"),
        (b"\x05\0\0", "has 3 bytes"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "truncated"),
        ((3).to_bytes(8, "little") + b"{}", "truncated"),
        (file_of(b"\x80\x04\x95pickle", 0), "no safetensors header"),
        (file_of(b"[]", 0), "no safetensors header"),
        (file_of(b"{" * 100_000, 0), "no safetensors header"),
        (file_of(b'{"a":' + b"[" * 100_000, 0), "no safetensors header"),
        (file_of({"a": {"dtype": "F32", "shape": [1]}}, 4), "data_offsets"),
        (file_of({"a": entry("F32", [1], 0, 4)}, 3), "truncated"),
        (file_of({"a": entry("F32", [1], 0, 4)}, 5), "padded"),
        (file_of({"a": entry("F32", [2], 0, 4)}, 4), "takes 8 bytes"),
        (file_of({"a": entry("F32", [1], 4, 8)}, 8), "overlap or hole"),
        (file_of({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, 6), "overlap or hole"),
        (file_of({"a": entry("F32", [1], -4, 0)}, 0), "lies at -4"),
        (file_of({"a": entry("F32", [-1, -1], 0, 4)}, 4), "shape"),
        (file_of({"a": entry("F32", [1 << 40, 1 << 40], 0, 4)}, 4), "takes"),
        (file_of({"a": entry("F32", [1] * 9, 0, 4)}, 4), "shape"),
        (file_of({"a": entry("Q4", [1], 0, 4)}, 4), "unknown type"),
        (file_of({"a": entry("F32", [True], 0, 4)}, 4), "no safetensors header"),
        (file_of({"a": entry("F32", [1.5], 0, 4)}, 4), "no safetensors header"),
    ],
)
def test_a_lie_is_refused(content: bytes, line: str) -> None:
    with pytest.raises(BadInput, match=line):
        parsed(content)


@given(st.binary(max_size=300))
def test_noise_is_refused_or_is_an_empty_file(noise: bytes) -> None:
    try:
        tensors = parsed(noise)
    except BadInput:
        return
    assert tensors == ()


@given(st.data())
def test_a_flipped_byte_never_reaches_outside_the_file(data: st.DataObject) -> None:
    content = bytearray(file_of({"a": entry("F32", [2, 3], 0, 24), "b": entry("F16", [4], 24, 32)}, 32))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))

    def read(offset: int, size: int) -> bytes:
        assert offset >= 0
        assert offset + size <= len(content)
        return bytes(content[offset : offset + size])

    try:
        for tensor in parse("m", len(content), read):
            assert tensor.offset >= 0
            assert tensor.offset + tensor.size <= len(content)
    except BadInput:
        pass
