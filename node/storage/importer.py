"""Taking a model in: a Hugging Face directory or a GGUF file becomes shards and a manifest in the store.

Owns the order of an import: look at everything first, refuse what is not a whole and safe model, make sure it fits,
then cut. An import that fails leaves the store as it was; one that was done before changes nothing. Knows no ledger.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from contracts.errors import BadInput, Corrupt, NoSpace, NotFound, Refused
from contracts.types import ManifestHash
from node.storage.artifact import Cutter, FileSource, Progress, ProgressCallback, Source, no_progress
from node.storage.convert import EXIT_REFUSED, FILE_SIZE_TARGET
from node.storage.directory import Description, inspect_directory, refuse_pickle
from node.storage.files import explained, free_bytes, open_regular, read_exactly, size_text
from node.storage.gguf_header import MAGIC, read_gguf_header
from node.storage.gguf_llama import plan_llama
from node.storage.hashing import BLOCK_SIZE
from node.storage.manifest import Manifest, check_shard_count, check_shard_size
from node.storage.moving import Mover, Work, delete_sources, exclusive, interrupted, peak_bytes
from node.storage.proving import digest_and_pieces
from node.storage.store import ShardStore

_ERROR_TEXT_MAX = 4096


@dataclass(frozen=True)
class Imported:
    """A model that is in the store."""

    manifest: Manifest
    manifest_hash: ManifestHash
    description: Description
    skipped: tuple[str, ...]
    """Entries of the directory that are no part of the model and were left where they are."""
    already: bool
    """It was there before, whole and undamaged."""

    @property
    def architecture(self) -> str:
        return self.description.architecture


def import_model(
    source: Path, store: ShardStore, shard_size: int, on_progress: ProgressCallback = no_progress, move: bool = False
) -> Imported:
    """Take a model in. With `move` each file of a directory is deleted once its bytes are safely in shards.

    A GGUF file is never deleted: its bytes are not those of the artifact.
    """
    check_shard_size(shard_size)
    with store.importing():
        return _import(source, _Job(store, shard_size, on_progress, move))


def _import(source: Path, job: _Job) -> Imported:
    if source.is_dir():
        return _import_directory(source, job)
    if not source.exists():
        raise NotFound(f"{source} does not exist; give a Hugging Face directory or a GGUF file")
    path = source.resolve()
    with explained("reading", path):
        descriptor = open_regular(path)
        with open(descriptor, "rb", buffering=0) as file:
            head = file.read(len(MAGIC))
    if head == MAGIC:
        return _import_gguf(path, job)
    refuse_pickle(path)
    raise BadInput(f"{source} is no model: it is neither a Hugging Face directory nor a GGUF file")


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    store: ShardStore
    shard_size: int
    on_progress: ProgressCallback
    move: bool
    expendable: bool = False
    """The source can be made again, so a failed move is undone like any other import."""


def _import_directory(root: Path, job: _Job) -> Imported:
    store = job.store
    with exclusive(root, job.move):
        unfinished = interrupted(root, store, job.shard_size)
        if unfinished is not None:
            # Its first files may exist in shards only: whatever was asked for, it can only be finished.
            return _cut(root, replace(job, move=True), unfinished, skipped=())
        model = inspect_directory(root)
        sources = tuple(FileSource(path, root / path) for path in model.paths)
        check_shard_count(sum(file.size_bytes for file in sources), job.shard_size)
        candidates = _same_outline(sources, job)
        known = _known(sources, candidates, job)
        if known is not None:
            if job.move:
                delete_sources(model)
            return Imported(known, known.manifest_hash(), model.description, model.skipped, already=True)
        _require_room(str(root), sources, candidates, job)
        return _cut(root, job, Work(sources, model.description, recorded=0), model.skipped)


def _cut(root: Path, job: _Job, work: Work, skipped: tuple[str, ...]) -> Imported:
    cutter = Cutter(work.sources, job.store, job.shard_size)
    mover = Mover(root, job.store, job.shard_size, work) if job.move else None
    try:
        manifest = cutter.run(job.on_progress, None if mover is None else lambda: mover.take_behind(cutter))
        manifest_hash = manifest.manifest_hash()
        job.store.put_manifest(manifest.encode(), manifest_hash)
    except BaseException as error:
        if mover is None or not mover.begun or job.expendable:
            cutter.undo()
        elif isinstance(error, Refused):
            more = f"{error} (part of the model is in the store already: run the same import again to finish)"
            raise type(error)(more) from error
        raise
    if mover is not None:
        mover.finish()
    return Imported(manifest, manifest_hash, work.description, skipped, already=False)


def _same_outline(sources: Sequence[Source], job: _Job) -> list[Manifest]:
    """The manifests that have these paths and sizes: only for them is it worth hashing the files beforehand."""
    outline = [(file.path, file.size_bytes) for file in sources]
    found = []
    for manifest_hash in job.store.manifests():
        try:
            manifest = job.store.manifest(manifest_hash)
        except Corrupt:
            # A damaged manifest says nothing about these files; whoever needs it is told when reading it.
            continue
        if manifest.shard_size == job.shard_size and [(file.path, file.size) for file in manifest.files] == outline:
            found.append(manifest)
    return found


def _known(sources: Sequence[FileSource], candidates: list[Manifest], job: _Job) -> Manifest | None:
    """The manifest of exactly these files, if every shard of it is held and undamaged, and all its hashes are true."""
    if all(job.store.missing_shards(manifest) for manifest in candidates):
        return None
    digests = [_digest(file.location, job.on_progress) for file in sources]
    for manifest in candidates:
        if [file.sha256 for file in manifest.files] == digests and _is_whole(manifest, job):
            return manifest
    return None


def _is_whole(manifest: Manifest, job: _Job) -> bool:
    done = 0
    for shard in manifest.shards:
        if not job.store.held(shard.sha256):
            return False
        found = digest_and_pieces(job.store.path(shard.sha256), shard.size, lambda count: None)
        if found != (shard.sha256, shard.pieces):
            return False
        done += shard.size
        job.on_progress(Progress("verifying", done, manifest.total_size))
    return True


def _digest(path: Path, on_progress: ProgressCallback) -> bytes:
    hasher = sha256()
    with explained("reading", path):
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            buffer = memoryview(bytearray(BLOCK_SIZE))
            offset = 0
            while count := read_exactly(descriptor, buffer, offset):
                hasher.update(buffer[:count])
                offset += count
                on_progress(Progress("checking", offset, size))
        finally:
            os.close(descriptor)
    return hasher.digest()


def _require_room(what: str, sources: Sequence[FileSource], candidates: list[Manifest], job: _Job) -> None:
    """Before the first byte is written. Shards of this very outline that are held will be replaced, not added."""
    sizes = [file.size_bytes for file in sources]
    total = sum(sizes)
    held = max((_held_bytes(manifest, job.store) for manifest in candidates), default=0)
    peak = peak_bytes(sizes, job.shard_size) if job.move else total
    replaced = min(job.shard_size, total) if held else 0
    job.store.require_room(what, total - held, max(0, peak - held) + replaced)


def _held_bytes(manifest: Manifest, store: ShardStore) -> int:
    return sum({shard.sha256: shard.size for shard in manifest.shards if store.held(shard.sha256)}.values())


def _import_gguf(path: Path, job: _Job) -> Imported:
    """Convert once into a scratch directory of the store, which is then moved into shards file by file."""
    store, shard_size = job.store, job.shard_size
    plan = plan_llama(read_gguf_header(path), str(path))
    name = b"gguf to bfloat16, 1\0" + shard_size.to_bytes(8, "big") + _digest(path, job.on_progress)
    key = sha256(name).digest()
    before = store.conversion(key)
    if before is not None and store.has_manifest(before):
        manifest = store.manifest(before)
        if _is_whole(manifest, job):
            return Imported(manifest, before, plan.description, (), already=True)
    twice = min(plan.size_bytes, FILE_SIZE_TARGET + shard_size)
    store.require_room(f"the conversion of {path}", plan.size_bytes, plan.size_bytes + twice)
    with store.scratch_directory() as scratch:
        target = scratch / "model"
        with explained("creating", target):
            target.mkdir()
        _run_converter(path, scratch, job.on_progress)
        imported = _import_directory(target, replace(job, move=True, expendable=True))
    store.remember_conversion(key, imported.manifest_hash)
    return imported


def _run_converter(path: Path, scratch: Path, on_progress: ProgressCallback) -> None:
    """Run `node.storage.convert`; its refusals and its crashes become one line."""
    errors = scratch / "errors"
    # Only what it needs: no hub, no GPU, nothing of the user's cache, and our packages wherever they are installed.
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path[1:]]),
        "HOME": str(scratch),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-P", "-m", "node.storage.convert", str(path), str(scratch / "model")]
    with open(errors, "xb") as error_file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=error_file, cwd=scratch, env=environment
        )
    try:
        on_progress(Progress("converting", 0, path.stat().st_size))
        assert process.stdout is not None
        for line in process.stdout:
            done, total = map(int, line.split())
            on_progress(Progress("converting", done, total))
        status = process.wait()
    finally:
        process.kill()
        process.communicate()
    if status == 0:
        return
    lines = errors.read_bytes()[-_ERROR_TEXT_MAX:].decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no message"
    if status == EXIT_REFUSED:
        raise BadInput(last)
    if "No space left" in last or "Disk quota" in last or "File too large" in last:
        raise NoSpace(f"converting {path}: {size_text(free_bytes(scratch))} free are not enough; free some disk space")
    how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
    raise BadInput(f"{path} could not be converted: the converter {how} ({last[:300]})")
