"""The manifest: one encoding for one content, and nothing of a stranger's believed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_helpers import manifest_of, noise

from contracts.errors import BadInput
from contracts.types import PIECE_SIZE, SHARDS_PER_MODEL_MAX
from node.storage import manifest as m
from node.storage.manifest import Manifest, ManifestFile, check_registered, decode

SAMPLE, _ = manifest_of([noise(PIECE_SIZE + 5, 1), noise(2 * PIECE_SIZE, 2)], 2 * PIECE_SIZE)


def changed(**fields: object) -> Manifest:
    return msgspec.structs.replace(SAMPLE, **fields)


def shard(index: int, **fields: object) -> Manifest:
    shards = list(SAMPLE.shards)
    shards[index] = msgspec.structs.replace(shards[index], **fields)
    return changed(shards=tuple(shards))


def paths(*names: str) -> Manifest:
    first, second = SAMPLE.files
    files = tuple(msgspec.structs.replace(f, path=n) for f, n in zip((first, second), names, strict=True))
    return changed(files=files)


def test_a_manifest_decodes_to_itself() -> None:
    assert decode(SAMPLE.encode()) == SAMPLE
    assert SAMPLE.total_size == 3 * PIECE_SIZE + 5
    assert SAMPLE.file_range("file-0001") == (PIECE_SIZE + 5, 2 * PIECE_SIZE)
    assert SAMPLE.file_range("nothing") is None
    assert SAMPLE.shard(SAMPLE.shard_hashes[1]) == SAMPLE.shards[1]
    assert SAMPLE.shard(m.ShardHash(bytes(32))) is None


@given(st.integers(0, len(SAMPLE.encode()) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_is_another_manifest(position: int, change: int) -> None:
    data = bytearray(SAMPLE.encode())
    data[position] ^= change
    try:
        found = decode(bytes(data))
    except BadInput:
        return
    assert found != SAMPLE
    assert found.encode() == data


@given(st.binary(max_size=300) | st.integers(0, 200).map(lambda n: SAMPLE.encode()[:n]))
def test_junk_is_refused_with_one_line(data: bytes) -> None:
    with pytest.raises(BadInput) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_second_spelling_of_the_same_content_is_refused() -> None:
    data = SAMPLE.encode()
    # The format number 1 written in two bytes (uint8) instead of one.
    assert data[1] == 1
    with pytest.raises(BadInput, match="canonical"):
        decode(data[:1] + b"\xcc\x01" + data[2:])
    with pytest.raises(BadInput, match="malformed"):
        decode(data + b"\x00")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (changed(format=2), "format 2"),
        (changed(piece_size=PIECE_SIZE // 2), "pieces of"),
        (changed(shard_size=PIECE_SIZE + 1), "shard size"),
        (changed(shard_size=0), "shard size"),
        (changed(shard_size=-PIECE_SIZE), "shard size"),
        (changed(files=()), "files"),
        (changed(shards=SAMPLE.shards[:1]), "lists 1 shards"),
        (changed(shards=SAMPLE.shards + SAMPLE.shards[:1]), "lists 3 shards"),
        (shard(0, size=PIECE_SIZE), "must have"),
        (shard(1, size=PIECE_SIZE + 6), "must have"),
        (shard(0, sha256=bytes(32)), "not a SHA-256"),
        (shard(0, sha256=b"short"), "not a SHA-256"),
        (shard(0, pieces=bytes(32)), "piece hashes"),
        (shard(1, sha256=SAMPLE.shards[0].sha256), "name of an earlier shard"),
        (changed(files=(ManifestFile("a", -1, bytes(32)), ManifestFile("b", 5, bytes(32)))), "negative"),
        (changed(files=(ManifestFile("a", 1, b"short"),)), "hash of the file"),
        (changed(files=(ManifestFile("a", 0, bytes(32)),), shards=()), "empty"),
        (changed(files=(ManifestFile("a", (SHARDS_PER_MODEL_MAX + 1) * 2 * PIECE_SIZE, bytes(32)),)), "at most"),
        (changed(files=(ManifestFile("a", 1 << 62, bytes(32)),) * 2), "same path"),
        (changed(files=tuple(ManifestFile(f"{n:05d}", 1, bytes(32)) for n in range(m.FILES_MAX + 1))), "files"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(wrong: Manifest, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        decode(wrong.encode())


@pytest.mark.parametrize(
    "path",
    [
        *("../x", "a/../x", "/etc/passwd", "a//b", "", ".", "..", "a/", ".ssh", "a/.b", "-rf"),
        *("a\\b", "a\0b", "a\nb", "é", "c:", "a b", "x" * 256, "/".join("abcdefghi")),
    ],
)
def test_a_path_that_could_leave_its_directory_or_confuse_is_refused(path: str) -> None:
    first = sorted([path, "zzz"], key=m.stream_order)
    with pytest.raises(BadInput, match="path"):
        decode(paths(*first).encode())


@pytest.mark.parametrize(
    "names", [("b", "a"), ("a", "a.safetensors"), ("a", "a"), ("A", "a"), ("a", "a/b"), ("A", "a/b")]
)
def test_order_and_clashes(names: tuple[str, str]) -> None:
    with pytest.raises(BadInput, match=r"order|same path|under another"):
        decode(paths(*names).encode())


def test_weights_come_first() -> None:
    names = ["tokenizer.json", "model-2.safetensors", "config.json", "model-1.safetensors"]
    assert sorted(names, key=m.stream_order) == [
        "model-1.safetensors",
        "model-2.safetensors",
        "config.json",
        "tokenizer.json",
    ]


def test_a_manifest_must_be_the_registered_one() -> None:
    check_registered(SAMPLE, SAMPLE.total_size, SAMPLE.shard_size, SAMPLE.shard_hashes)
    with pytest.raises(BadInput, match="ledger says"):
        check_registered(SAMPLE, SAMPLE.total_size + 1, SAMPLE.shard_size, SAMPLE.shard_hashes)
    with pytest.raises(BadInput, match="not those on the ledger"):
        check_registered(SAMPLE, SAMPLE.total_size, SAMPLE.shard_size, SAMPLE.shard_hashes[::-1])
