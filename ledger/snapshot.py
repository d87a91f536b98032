"""A snapshot: what is folded from the chain as of one block, in a file beside the ledger, so that a start reads it and
folds only the blocks after.

Owns that file, its checks and the ledger's own part of it, the accounts. What the reader of the events folded travels
in it as bytes that this module does not understand. Nothing here is needed: all of it can be folded again from the
event records, so a snapshot that is damaged, foreign or ahead of the chain is passed over with one line in the log.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from contracts.errors import Corrupt, NoSpace, Refused
from ledger import files
from ledger.accounts import Standing
from ledger.store import Store

FORMAT = b"aigen snapshot 1\n"
"""Raise the number when the file's layout changes, or what `ledger.accounts` folds an event into."""

SNAPSHOT_BYTES_MAX = 128 << 20
"""A state that outgrows this is not kept: the snapshot before it stays, and the starts get slower, not wrong."""

_DIGEST_SIZE = hashlib.sha256().digest_size

log = logging.getLogger(__name__)


class Snapshot(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The fold of the final blocks up to `number`, on the chain that grew from `genesis_hash`."""

    genesis_hash: bytes
    number: int
    hash: bytes
    standing: Standing
    projections: bytes
    """The encoding that the reader of the events gave its own fold."""


_decoder = msgspec.msgpack.Decoder(Snapshot)
_encoder = msgspec.msgpack.Encoder(order="deterministic")


def path_of(ledger: Path) -> Path:
    """Where the snapshot of the ledger in the folder `ledger` is: beside the folder, which is LevelDB's alone."""
    return ledger.with_name(f"{ledger.name}.snapshot")


def encode(snapshot: Snapshot) -> bytes:
    """The file's bytes. Raises NoSpace when they are more than are read back."""
    body = _encoder.encode(snapshot)
    if len(body) > SNAPSHOT_BYTES_MAX:
        raise NoSpace(
            f"a snapshot of block {snapshot.number} has {len(body):,} bytes, at most {SNAPSHOT_BYTES_MAX:,} are kept: "
            "the node goes on without it, and starts more slowly"
        )
    return FORMAT + hashlib.sha256(body).digest() + body


def decode(data: bytes) -> Snapshot:
    """What `encode` made bytes of. Raises Corrupt for anything else, an older version's too."""
    if not data.startswith(FORMAT):
        raise Corrupt(f"it begins with {data[: len(FORMAT)]!r}, not {FORMAT!r}")
    start = len(FORMAT) + _DIGEST_SIZE
    digest, body = data[len(FORMAT) : start], data[start:]
    if hashlib.sha256(body).digest() != digest:
        raise Corrupt(f"its {len(body):,} bytes have another SHA-256 than it says")
    try:
        snapshot = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise Corrupt(str(error)) from error
    if _encoder.encode(snapshot) != body:  # written when the accounts had fewer fields, say
        raise Corrupt("its values are not in the form this version gives them")
    return snapshot


def write(ledger: Path, snapshot: Snapshot) -> None:
    """Put `snapshot` in the place of the one before it: after a crash either is there whole.

    Raises NoSpace when it is too large or the disk is full, Refused for any other trouble with the disk.
    """
    path = path_of(ledger)
    data = encode(snapshot)
    try:
        files.replace_file(path, data)
    except OSError as error:
        raise Refused(
            f"the snapshot {path} cannot be written ({error.strerror}): the node goes on without it, and starts more "
            "slowly; look at the disk"
        ) from error


def load(store: Store, genesis_hash: bytes) -> Snapshot | None:
    """The snapshot of the chain in `store`; None when there is none that can be used, and the log says why.

    Raises Corrupt when the store itself is damaged.
    """
    path = path_of(store.path)
    try:
        with path.open("rb") as file:
            snapshot = decode(file.read(len(FORMAT) + _DIGEST_SIZE + SNAPSHOT_BYTES_MAX + 1))
    except FileNotFoundError:
        return None
    except (OSError, Corrupt) as error:
        unfit = str(error)
    else:
        unfit = _unfit(snapshot, store, genesis_hash)
        if not unfit:
            return snapshot
    log.warning("the snapshot %s is passed over (%s): the state is folded from genesis", path, unfit)
    return None


def _unfit(snapshot: Snapshot, store: Store, genesis_hash: bytes) -> str:
    """Why a whole snapshot is not of the chain in `store`; empty when it is."""
    if snapshot.genesis_hash != genesis_hash:
        return f"it is of the chain from genesis 0x{snapshot.genesis_hash.hex()}"
    head = store.head()
    if head is None or snapshot.number > head[0]:
        return f"it is of block {snapshot.number}, the head is {'not there' if head is None else head[0]}"
    if snapshot.hash != store.record(snapshot.number).hash:
        return f"block {snapshot.number} is not 0x{snapshot.hash.hex()}, which it is of"
    return ""
