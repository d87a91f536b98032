"""GGUF to a Hugging Face directory in bfloat16, in its own process: `python -m node.storage.convert FILE DIRECTORY`.

A process of its own, because the file comes from a stranger and the libraries that read it (numpy, torch, transformers)
are large: a crash is then a refusal, and the memory comes back. Tensors go through in slices, so memory stays bounded
whatever the model's size. Offline; nothing of the file is executed. It ends when its standard input does, which is
when its parent ends. Progress goes to standard output, one `done total` line at a time.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from contracts.errors import Refused
from node.storage.gguf_header import GgufTensor, read_gguf_header
from node.storage.gguf_llama import Conversion, plan_llama, to_json

FILE_SIZE_TARGET = 1 << 30
"""Bytes of one weight file: what a move into the store holds twice at most."""

SLICE_VALUES = 1 << 22
"""Values converted at a time."""

EXIT_REFUSED = 3

ReportProgress = Callable[[int, int], None]


def convert(source: Path, target: Path, report: ReportProgress, file_size: int = FILE_SIZE_TARGET) -> None:
    """Write the model in `source` to the empty directory `target`."""
    plan = plan_llama(read_gguf_header(source), str(source))
    (target / "config.json").write_bytes(to_json(plan.config))
    (target / "generation_config.json").write_bytes(to_json(plan.generation_config))
    _convert_tokenizer(source, target, plan.config)
    groups = _groups(plan.conversions, file_size)
    names = _file_names(len(groups))
    done = 0
    for name, group in zip(names, groups, strict=True):
        for size in _write_weights(source, target / name, group):
            done += size
            report(done, plan.size_bytes)
    if len(groups) > 1:
        weight_map = {item.name: name for name, group in zip(names, groups, strict=True) for item in group}
        index = {"metadata": {"total_size": plan.size_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_bytes(to_json(index))


def _groups(conversions: Sequence[Conversion], file_size: int) -> list[list[Conversion]]:
    groups: list[list[Conversion]] = [[]]
    room = file_size
    for conversion in conversions:
        if groups[-1] and conversion.size_bytes > room:
            groups.append([])
            room = file_size
        groups[-1].append(conversion)
        room -= conversion.size_bytes
    return groups


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def _write_weights(source: Path, path: Path, conversions: Sequence[Conversion]) -> Iterator[int]:
    """One safetensors file: the header first (all sizes are known), then each tensor slice by slice."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for conversion in conversions:
        end = offset + conversion.size_bytes
        shape = list(conversion.tensor.shape)
        header[conversion.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for conversion in conversions:
            for values in _slices(source, conversion):
                out.write(values)
                yield len(values)


def _slices(source: Path, conversion: Conversion) -> Iterator[bytes]:
    """A tensor's values in bfloat16, some rows at a time, rows in Hugging Face's order."""
    import numpy as np
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = conversion.tensor
    rows, row_bytes = _rows(tensor), tensor.row_bytes
    raw = np.memmap(source, np.uint8, "r", tensor.offset, (rows, row_bytes))
    order = _row_order(rows, conversion.interleaved_heads)
    step = max(1, SLICE_VALUES // tensor.shape[-1])
    for start in range(0, rows, step):
        # Blocks never span rows, so rows can be reordered while they are still packed.
        packed = np.ascontiguousarray(raw[order[start : start + step]])
        values = dequantize(packed, GGMLQuantizationType(tensor.type_number))
        floats = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        yield floats.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def _rows(tensor: GgufTensor) -> int:
    return tensor.size_bytes // tensor.row_bytes


def _row_order(rows: int, heads: int) -> Any:
    """Which row of the file comes next. llama.cpp keeps pairs (0, h/2), (1, h/2 + 1), ... side by side in a head."""
    import numpy as np

    order = np.arange(rows)
    if heads == 0:
        return order
    return order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _convert_tokenizer(source: Path, target: Path, config: dict[str, object]) -> None:
    """Through transformers, alone in a directory: files that lie beside the GGUF must have no say."""
    from transformers import AutoTokenizer

    alone = target / "alone"
    alone.mkdir()
    link = alone / "model.gguf"
    link.symlink_to(source.resolve())
    tokenizer = AutoTokenizer.from_pretrained(
        str(alone), gguf_file=link.name, local_files_only=True, trust_remote_code=False
    )
    link.unlink()
    alone.rmdir()
    tokenizer.model_max_length = config["max_position_embeddings"]
    vocabulary = config["vocab_size"]
    assert isinstance(vocabulary, int)
    if len(tokenizer) > vocabulary:
        raise Refused(f"{source}: its tokenizer has {len(tokenizer):,} tokens, the model only {vocabulary:,}")
    tokenizer.save_pretrained(str(target))
    # What transformers notes about this very load says nothing about the model.
    path = target / "tokenizer_config.json"
    saved = json.loads(path.read_bytes())
    for noted in ("is_local", "local_files_only", "name_or_path"):
        saved.pop(noted, None)
    path.write_bytes(to_json(saved))


def _end_with_parent() -> None:
    def wait() -> None:
        # Not sys.stdin: a thread inside its lock would abort the interpreter when it ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    source, target = map(Path, arguments)
    _end_with_parent()

    def report(done: int, total: int) -> None:
        sys.stdout.write(f"{done} {total}\n")
        sys.stdout.flush()

    try:
        convert(source, target, report)
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
