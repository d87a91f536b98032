"""What the engine says its models take, beside what the operating system says of its process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from node.config import Quantization
from node.inference.engine import Engine
from node.inference.spec import ModelSpec, Parameters, QuantisedPlace

from . import tiny
from .home import Home, at_home, set_up

MIB = 1 << 20
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "tie_word_embeddings": True}
"""Some 42 million parameters: what a model takes stands out from what its skeleton and its tokenizer do."""

SLACK = 16 * MIB
"""Modules, tokenizer, norms in fp32, buffers, and what the allocator keeps at hand."""


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root = tmp_path_factory.mktemp(request.param)
    dtype = torch.bfloat16 if request.param == "bf16" else torch.float32
    spec = tiny.cut(tiny.save(root / "model", "llama", dtype, **SIZES), root / "shards", 8 * MIB)
    assert spec.total_size > 70 * MIB
    return msgspec.structs.replace(spec, quantised=QuantisedPlace(str(root / "quantised"), 1 << 30))


@pytest.fixture(scope="module")
def engine(spec: ModelSpec) -> Iterator[Home]:
    with Home(4 * spec.total_size) as home:
        yield home


def resident(engine: Engine, of: str = "") -> tuple[int, int]:
    """Bytes of the engine process, by /proc/PID/smaps: mapped and in memory of files whose path has `of`; and memory of
    its own that belongs to no file."""
    text = Path(f"/proc/{engine.statistics().pid}/smaps").read_text()
    mapped = own = 0
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)[1:]:
        if of and of in entry.partition("\n")[0]:
            mapped += 1024 * int(re.search(r"^Rss: +(\d+) kB", entry, re.MULTILINE)[1])  # type: ignore[index]
        own += 1024 * int(re.search(r"^Anonymous: +(\d+) kB", entry, re.MULTILINE)[1])  # type: ignore[index]
    return mapped, own


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@at_home
async def test_what_is_counted_is_what_the_operating_system_counts(
    engine: Engine, spec: ModelSpec, quantization: Quantization
) -> None:
    set_up(engine, 4 * spec.total_size, quantization=quantization)
    folder = str(Path(spec.shards[0]).parent) if quantization == "none" else str(Path(spec.quantised.stem).parent)  # type: ignore[union-attr]
    prompt = "The capital of France is " * 8
    await engine.load(spec)  # once, for what only the first load and answer of a process allocate
    await engine.complete(spec.key, prompt, Parameters(max_tokens=4))
    await engine.unload(spec.key)
    _, before = resident(engine)

    model = await engine.load(spec)
    done = await engine.complete(spec.key, prompt, Parameters(max_tokens=4))
    assert done.usage.completion_tokens == 4
    mapped, own = resident(engine, folder)
    assert engine.statistics().cache.used_bytes == model.mapped_bytes + model.private_bytes
    # An answer has gone through all weights; of the vocabulary's rows only those are there that it asked for, unless
    # they are the head too, as here.
    assert 0.97 * model.mapped_bytes <= mapped <= model.mapped_bytes + MIB
    assert own - before <= model.private_bytes + SLACK

    await engine.unload(spec.key)
    mapped, own = resident(engine, folder)
    assert mapped == 0
    assert own - before <= SLACK
    assert engine.statistics().cache.used_bytes == 0
