"""A model directory in Hugging Face layout, looked at before anything is taken in: is it whole, is it safe.

Owns what belongs to an artifact and what is refused. Runs no code of the directory and unpickles nothing. Knows no
store.
"""

import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from contracts.errors import BadInput
from node.storage.files import explained, open_regular, read_exactly, read_file
from node.storage.manifest import check_paths, stream_order
from node.storage.safetensors_header import Header, Tensor, read_header

CONFIG_SIZE_MAX = 4 << 20
INDEX_SIZE_MAX = 64 << 20
SIDE_FILE_SIZE_MAX = 256 << 20
ENTRIES_MAX = 100_000

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
JOURNAL = ".aigen-import"
"""What an interrupted move leaves in the directory; see `moving`."""

_SIDE_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "README.md",
    }
)
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)(\.(md|txt|pdf))?", re.IGNORECASE)
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
_ZIP_MAGIC = b"PK\x03\x04"
_TORCH_ENTRY = b"data.pkl"
_HEAD_SIZE = 512
_PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the directory says about its model."""

    architecture: str
    model_type: str
    parameters: int
    dtype: str
    context_length: int | None


@dataclass(frozen=True)
class ModelDirectory:
    """A directory that passed: its files in stream order, and what stays behind."""

    root: Path
    paths: tuple[str, ...]
    skipped: tuple[str, ...]
    description: Description


def inspect_directory(root: Path) -> ModelDirectory:
    """Check a directory whole; BadInput with one clear line when it is no model we take."""
    names = _entries(root)
    _refuse_pickles(root, names)
    if "config.json" not in names:
        raise BadInput(f"{root} is no model: it has no config.json; give a Hugging Face directory or a GGUF file")
    config = _config(root / "config.json")
    weights, headers = _weights(root, names)
    if not any(all(name in names for name in kind) for kind in _TOKENIZERS):
        raise BadInput(f"{root} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt)")
    side = {name for name in names if name in _SIDE_FILES or _LICENCE.fullmatch(name)}
    if INDEX in names:
        side.add(INDEX)
    for name in side:
        _check_side_file(root / name)
    paths = sorted(side | set(weights), key=stream_order)
    check_paths(paths)
    skipped = sorted(names - set(paths) - {JOURNAL})
    return ModelDirectory(root, tuple(paths), tuple(skipped), _describe(root, config, headers))


def refuse_pickle(path: Path) -> None:
    """A pickle runs code when it is read: refused by its name and by its first bytes, never opened as one."""
    if path.suffix.lower() in _PICKLES:
        raise _pickle(path)
    with explained("reading", path):
        descriptor = open_regular(path)
        with open(descriptor, "rb", buffering=0):
            head = bytearray(_HEAD_SIZE)
            read_exactly(descriptor, memoryview(head), 0)
    if head.startswith(_PICKLE_MAGIC) or (head.startswith(_ZIP_MAGIC) and _TORCH_ENTRY in head):
        raise _pickle(path)


def _pickle(path: Path) -> BadInput:
    return BadInput(
        f"{path} is a pickle, which can run code and is never taken in; "
        "remove it, and if it holds the weights convert them to safetensors first"
    )


def _entries(root: Path) -> set[str]:
    with explained("reading", root):
        entries = sorted(root.iterdir())
        if len(entries) > ENTRIES_MAX:
            raise BadInput(f"{root} has {len(entries):,} entries, more than the {ENTRIES_MAX:,} of any model directory")
        for entry in entries:
            mode = entry.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise BadInput(
                    f"{entry} is a symbolic link, which could publish any file of this machine; "
                    "download the model into a real directory (hf download --local-dir)"
                )
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise BadInput(f"{entry} is neither a file nor a directory; remove it")
        return {entry.name for entry in entries}


def _refuse_pickles(root: Path, names: set[str]) -> None:
    for name in sorted(names):
        path = root / name
        if path.is_file():
            refuse_pickle(path)


def _config(path: Path) -> dict[str, object]:
    data = read_file(path, CONFIG_SIZE_MAX)
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is malformed: {error}") from error


def _weights(root: Path, names: set[str]) -> tuple[list[str], list[Header]]:
    if INDEX in names and WEIGHTS in names:
        raise BadInput(f"{root} has both {WEIGHTS} and {INDEX}: two sets of weights; remove one of them")
    if INDEX in names:
        weight_map = _weight_map(root / INDEX)
        weights = sorted(set(weight_map.values()))
        missing = [name for name in weights if name not in names]
        if missing:
            raise BadInput(
                f"{root} is incomplete: {len(missing)} of {len(weights)} weight files are missing, "
                f"first {missing[0][:80]!r}; download it again"
            )
        headers = [read_header(root / name) for name in weights]
        found = {name: file for file, header in zip(weights, headers, strict=True) for name in header.tensors}
        wrong = [name for name, file in weight_map.items() if found.get(name) != file]
        if wrong or len(found) != len(weight_map):
            raise BadInput(
                f"{root / INDEX} names {len(weight_map):,} tensors, the files have {len(found):,} "
                f"and {len(wrong):,} are not where it says; download the model again"
            )
        return weights, headers
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if WEIGHTS in weights:
        weights = [WEIGHTS]
    if not weights:
        raise BadInput(f"{root} has no weights in safetensors; other formats are not taken in")
    if len(weights) > 1:
        raise BadInput(f"{root} has {len(weights)} safetensors files and no {INDEX}; download the model again")
    return weights, [read_header(root / weights[0])]


def _weight_map(path: Path) -> dict[str, str]:
    class Index(msgspec.Struct):
        weight_map: dict[str, str]

    data = read_file(path, INDEX_SIZE_MAX)
    try:
        weight_map = msgspec.json.decode(data, type=Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"{path} is malformed: {error}") from error
    bad = [name for name in weight_map.values() if "/" in name or not name.endswith(".safetensors")]
    if bad or not weight_map:
        raise BadInput(
            f"{path} names {bad[0][:80]!r} as a weight file; only *.safetensors beside it are allowed"
            if bad
            else f"{path} names no weights; download the model again"
        )
    return weight_map


def _check_side_file(path: Path) -> None:
    with explained("reading", path):
        facts = path.lstat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > SIDE_FILE_SIZE_MAX:
        raise BadInput(f"{path} is no regular file of at most {SIDE_FILE_SIZE_MAX:,} bytes")


def _describe(root: Path, config: dict[str, object], headers: list[Header]) -> Description:
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise BadInput(f"{root / 'config.json'} names no architecture; it must have architectures: [one class name]")
    if not isinstance(model_type, str):
        raise BadInput(f"{root / 'config.json'} names no model_type")
    tensors: list[Tensor] = [tensor for header in headers for tensor in header.tensors.values()]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.elements
    context = config.get("max_position_embeddings", config.get("n_positions"))
    return Description(
        architecture=architectures[0],
        model_type=model_type,
        parameters=sizes.total(),
        dtype=sizes.most_common(1)[0][0],
        context_length=context if isinstance(context, int) else None,
    )
