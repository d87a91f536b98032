"""The manifest: which files an artifact has, how its byte stream is cut into shards, and every piece's SHA-256.

Owns the canonical bytes (their SHA-256 is what the ledger holds) and every check on a manifest from a stranger. Pure:
knows no disk and no network.

Canonical form: MessagePack of nested arrays in the field order below, smallest encodings throughout. One content has
exactly one encoding: the decoder encodes again and compares, so a spelling that differs in a single byte is refused.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import sha256

import msgspec

from contracts.errors import BadInput
from contracts.types import PIECE_SIZE, SHARDS_PER_MODEL_MAX, ManifestHash, ShardHash

FORMAT = 1
HASH_SIZE = 32
FILES_MAX = 4096
PATH_SIZE_MAX = 255
PATH_DEPTH_MAX = 8
PIECES_MAX = 1 << 22
"""4 TiB of artifact: 1,024 shards of the default size."""
MANIFEST_SIZE_MAX = PIECES_MAX * HASH_SIZE + (4 << 20)

# No leading dot or dash, no separators, no characters that mean something to a shell or another file system.
_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


class ManifestFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One file of the artifact. The stream is the files' bytes one after the other, in the manifest's order."""

    path: str
    size: int
    sha256: bytes


class ManifestShard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One shard: its name, its size and the SHA-256 of each of its pieces, 32 bytes each, joined."""

    sha256: ShardHash
    size: int
    pieces: bytes

    @property
    def piece_count(self) -> int:
        return len(self.pieces) // HASH_SIZE

    def piece_hash(self, index: int) -> bytes:
        assert 0 <= index < self.piece_count
        return self.pieces[index * HASH_SIZE : (index + 1) * HASH_SIZE]


class Manifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The content of one artifact. It names no model: two models with the same bytes have the same manifest."""

    format: int
    shard_size: int
    piece_size: int
    files: tuple[ManifestFile, ...]
    shards: tuple[ManifestShard, ...]

    @property
    def total_size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def shard_hashes(self) -> tuple[ShardHash, ...]:
        return tuple(shard.sha256 for shard in self.shards)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    def manifest_hash(self) -> ManifestHash:
        return ManifestHash(sha256(self.encode()).digest())

    def shard(self, shard_hash: ShardHash) -> ManifestShard | None:
        return next((shard for shard in self.shards if shard.sha256 == shard_hash), None)

    def file_range(self, path: str) -> tuple[int, int] | None:
        """(offset in the stream, size) of a file, or None when the artifact has no such file."""
        offset = 0
        for file in self.files:
            if file.path == path:
                return offset, file.size
            offset += file.size
        return None


def piece_count(size_bytes: int) -> int:
    return -(-size_bytes // PIECE_SIZE)


def stream_order(path: str) -> tuple[bool, bytes]:
    """The sort key of an artifact's files: weights first, then the rest, each by the bytes of its path.

    Weights first, because a safetensors file starts at a multiple of its tensors' alignment only if nothing of odd
    length stands before it, and the engine maps tensors straight out of the shards.
    """
    return (not path.endswith(".safetensors"), path.encode())


def decode(data: bytes) -> Manifest:
    """A manifest from anyone: every bound and every sum is checked, and only the canonical bytes are accepted."""
    if len(data) > MANIFEST_SIZE_MAX:
        raise BadInput(f"the manifest has {len(data):,} bytes, more than the {MANIFEST_SIZE_MAX:,} one may have")
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"the manifest is malformed: {error}") from error
    check(manifest)
    if manifest.encode() != data:
        raise BadInput("the manifest is not in canonical form: the same content has another encoding")
    return manifest


def check(manifest: Manifest) -> None:
    """Everything a manifest must be, apart from its encoding."""
    _check_format(manifest)
    check_paths([file.path for file in manifest.files])
    _check_files(manifest.files)
    _check_shards(manifest)


def _check_format(manifest: Manifest) -> None:
    if manifest.format != FORMAT:
        raise BadInput(f"the manifest has format {manifest.format}, this version reads format {FORMAT}; update aigen")
    if manifest.piece_size != PIECE_SIZE:
        raise BadInput(f"the manifest has pieces of {manifest.piece_size:,} bytes, they must be {PIECE_SIZE:,}")
    check_shard_size(manifest.shard_size)


def check_shard_size(shard_size: int) -> None:
    if shard_size <= 0 or shard_size % PIECE_SIZE or shard_size > PIECES_MAX * PIECE_SIZE:
        raise BadInput(f"the shard size is {shard_size:,} bytes, it must be a multiple of {PIECE_SIZE:,} (1 MiB)")


def check_paths(paths: Sequence[str]) -> None:
    """Paths of an artifact: few, plain, relative, in stream order, and free of clashes on any file system."""
    if not 0 < len(paths) <= FILES_MAX:
        raise BadInput(f"an artifact has 1 to {FILES_MAX:,} files, this one has {len(paths):,}")
    for path in paths:
        parts = path.split("/")
        if len(path) > PATH_SIZE_MAX or len(parts) > PATH_DEPTH_MAX or not all(map(_PATH_PART.fullmatch, parts)):
            raise BadInput(f"the path {path[:PATH_SIZE_MAX]!r} is not allowed in an artifact; use plain relative names")
    if sorted(paths, key=stream_order) != list(paths):
        raise BadInput("the artifact's files are not in order: weights first, then the rest, each sorted by path")
    # Compared without case, so that the files can be written out on any file system.
    seen = {path.lower() for path in paths}
    if len(seen) != len(paths):
        raise BadInput("two files of the artifact have the same path")
    for path in seen:
        parts = path.split("/")
        if any("/".join(parts[:depth]) in seen for depth in range(1, len(parts))):
            raise BadInput(f"the path {path!r} lies under another file of the artifact")


def _check_files(files: Iterable[ManifestFile]) -> None:
    for file in files:
        if file.size < 0:
            raise BadInput(f"the file {file.path} has a negative size, {file.size:,} bytes")
        if len(file.sha256) != HASH_SIZE:
            raise BadInput(f"the hash of the file {file.path} has {len(file.sha256)} bytes, a SHA-256 has {HASH_SIZE}")


def _check_shards(manifest: Manifest) -> None:
    total, shard_size = manifest.total_size, manifest.shard_size
    expected = check_shard_count(total, shard_size)
    if len(manifest.shards) != expected:
        raise BadInput(
            f"the manifest lists {len(manifest.shards):,} shards, {total:,} bytes in shards of {shard_size:,} "
            f"make {expected:,}"
        )
    known: dict[ShardHash, ManifestShard] = {}
    for index, shard in enumerate(manifest.shards):
        size = min(shard_size, total - index * shard_size)
        if shard.size != size:
            raise BadInput(f"shard {index} is listed with {shard.size:,} bytes, it must have {size:,}")
        if len(shard.sha256) != HASH_SIZE or not any(shard.sha256):
            raise BadInput(f"the hash of shard {index} is not a SHA-256")
        if len(shard.pieces) != piece_count(size) * HASH_SIZE:
            raise BadInput(
                f"shard {index} has {len(shard.pieces):,} bytes of piece hashes, "
                f"{size:,} bytes need {piece_count(size) * HASH_SIZE:,}"
            )
        if known.setdefault(shard.sha256, shard) != shard:
            raise BadInput(f"shard {index} has the name of an earlier shard but not its bytes")


def check_shard_count(total_size: int, shard_size: int) -> int:
    """How many shards a stream makes; refused when it is empty or makes too many."""
    if total_size <= 0:
        raise BadInput("the artifact is empty: its files have no bytes")
    count = -(-total_size // shard_size)
    if count > SHARDS_PER_MODEL_MAX or total_size > PIECES_MAX * PIECE_SIZE:
        raise BadInput(
            f"{total_size:,} bytes in shards of {shard_size:,} make {count:,} shards, at most "
            f"{SHARDS_PER_MODEL_MAX:,} and {PIECES_MAX * PIECE_SIZE:,} bytes are allowed; use a larger shard size"
        )
    return count


def check_registered(manifest: Manifest, total_size: int, shard_size: int, shard_hashes: Sequence[bytes]) -> None:
    """The manifest must describe the very shards the ledger names: its hash alone does not prove that."""
    if (manifest.total_size, manifest.shard_size) != (total_size, shard_size):
        raise BadInput(
            f"the manifest has {manifest.total_size:,} bytes in shards of {manifest.shard_size:,}, the ledger says "
            f"{total_size:,} in shards of {shard_size:,}; the model was registered wrongly"
        )
    if manifest.shard_hashes != tuple(shard_hashes):
        raise BadInput("the manifest's shards are not those on the ledger; the model was registered wrongly")
