"""The artifact's files by name, over the mapping: small ones as bytes and JSON, safetensors ones by their entries."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from contracts.errors import BadInput
from node.inference.headers import TensorEntry, parse
from node.inference.mapping import ShardMapping
from node.inference.spec import ModelSpec

SMALL_FILE_BYTES_MAX = 64 << 20
"""The largest tokenizer.json is below 40 MB; nothing else that is read whole comes near."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer is made of. Never a tokenizer.model or any Python: only data is read."""


class ArtifactFiles:
    """The files of one model in one mapping."""

    def __init__(self, spec: ModelSpec, mapping: ShardMapping) -> None:
        self._key = spec.key
        self._mapping = mapping
        self._places: dict[str, tuple[int, int]] = {}
        offset = 0
        for entry in spec.files:
            self._places[entry.path] = (offset, entry.size)
            offset += entry.size

    def __contains__(self, path: str) -> bool:
        return path in self._places

    def read(self, path: str) -> bytes:
        """A small file, whole."""
        if path not in self._places:
            raise BadInput(f"{self._key} has no {path}; import the model again from a complete directory")
        offset, size = self._places[path]
        if size > SMALL_FILE_BYTES_MAX:
            raise BadInput(f"{path} of {self._key} has {size} bytes; at most {SMALL_FILE_BYTES_MAX} are read")
        return self._mapping.read(offset, size)

    def read_object(self, path: str) -> dict[str, Any]:
        """A small JSON file that holds an object."""
        try:
            return msgspec.json.decode(self.read(path), type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} of {self._key} is no JSON object: {error}") from error

    def extract_tokenizer(self) -> "TemporaryDirectory[str]":
        """The tokenizer's files in a temporary directory, for the loader that wants a directory."""
        directory = TemporaryDirectory(prefix="aigen-tokenizer-")
        for name in TOKENIZER_FILES:
            if name in self._places:
                Path(directory.name, name).write_bytes(self.read(name))
        return directory

    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of the model's weight files by name, with its offset in the whole stream."""
        found: dict[str, TensorEntry] = {}
        for path in self._weight_files():
            start, size = self._places[path]

            def read(offset: int, count: int, start: int = start) -> bytes:
                return self._mapping.read(start + offset, count)

            for entry in parse(path, size, read):
                if entry.name in found:
                    raise BadInput(f"{self._key} has the tensor {entry.name} twice; import the model again")
                found[entry.name] = TensorEntry(entry.name, entry.dtype, entry.shape, start + entry.offset, entry.size)
        return found

    def _weight_files(self) -> tuple[str, ...]:
        """Those the index names; else the single one; else every safetensors file at the top."""
        if INDEX in self._places:
            weight_map = self.read_object(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise BadInput(f"{INDEX} of {self._key} has no weight_map; import the model again")
            names = sorted({str(name) for name in weight_map.values()})
        elif SINGLE in self._places:
            names = [SINGLE]
        else:
            names = sorted(path for path in self._places if path.endswith(".safetensors") and "/" not in path)
        missing = [name for name in names if name not in self._places]
        if missing or not names:
            raise BadInput(f"{self._key} lacks its weights ({', '.join(missing[:3]) or 'no safetensors file'})")
        return tuple(names)
