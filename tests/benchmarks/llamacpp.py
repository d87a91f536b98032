"""llama.cpp as a peer, in a process of its own: one JSON question a line, one answer a line.

`python -m tests.benchmarks.llamacpp SOURCE.gguf DIRECTORY PRECISION THREADS`. llama-cpp-python is built once by the
Makefile with the instructions of this CPU, apart from our own packages. Its C interface is used without the layers
above: no text, no HTTP, the likeliest token each time. Sixteen conversations are decoded together, as its server does
with sixteen slots.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.benchmarks.processes import line, running, tell

BUILD = Path(__file__).resolve().parents[2] / "build" / "llama"
CONTEXT = 1024
SLOTS = 16
BATCH = 512


def is_built() -> bool:
    return (BUILD / "llama_cpp").is_dir()


def serving(source: Path, directory: Path, precision: str, threads: int) -> AbstractContextManager[Popen[str]]:
    """`precision` is `bf16` or `q8_0`."""
    words = (source, directory, precision, threads)
    return running([sys.executable, "-m", "tests.benchmarks.llamacpp", *map(str, words)])


def asked(process: Popen[str], what: str, *given: Any) -> float:
    """Seconds of `decode` (prompt, tokens), `prefill` (prompt) or `together` (prompts, tokens)."""
    tell(process, json.dumps([what, *given]))
    answer = line(process)
    assert answer, "llama.cpp ended; its error output says why"
    return float(answer)


class Model:
    """One model in one precision."""

    def __init__(self, source: Path, directory: Path, precision: str, threads: int) -> None:
        sys.path.insert(0, str(BUILD))
        import llama_cpp
        import numpy

        self._lib: Any = llama_cpp
        self._numpy = numpy
        path = directory / f"{precision}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[precision]
        params.allow_requantize, params.nthread = True, threads
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = CONTEXT * SLOTS, BATCH, BATCH, SLOTS
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, SLOTS)

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Seconds for so many tokens after the first."""
        self._clear()
        (token,) = self._feed([(0, place, token) for place, token in enumerate(prompt)], [0])
        started = time.perf_counter()
        for place in range(tokens):
            (token,) = self._feed([(0, len(prompt) + place, token)], [0])
        return time.perf_counter() - started

    def prefill(self, prompt: list[int]) -> float:
        self._clear()
        started = time.perf_counter()
        self._feed([(0, place, token) for place, token in enumerate(prompt)], [0])
        return time.perf_counter() - started

    def together(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds from the first prompt to the last token of all."""
        self._clear()
        started = time.perf_counter()
        rows = [(number, place, token) for number, prompt in enumerate(prompts) for place, token in enumerate(prompt)]
        drawn = self._feed(rows, list(range(len(prompts))))
        for step in range(tokens - 1):
            rows = [(number, len(prompt) + step, drawn[number]) for number, prompt in enumerate(prompts)]
            drawn = self._feed(rows, list(range(len(prompts))))
        return time.perf_counter() - started

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _feed(self, rows: Sequence[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """Tokens of conversations at places; the likeliest after the last of each that is wanted."""
        last = {number: index for index, (number, _, _) in enumerate(rows)}
        drawn: dict[int, int] = {}
        for begin in range(0, len(rows), BATCH):
            part = rows[begin : begin + BATCH]
            self._batch.n_tokens = len(part)
            for index, (number, place, token) in enumerate(part):
                self._batch.token[index] = token
                self._batch.pos[index] = place
                self._batch.n_seq_id[index] = 1
                self._batch.seq_id[index][0] = number
                self._batch.logits[index] = last[number] == begin + index
            assert self._lib.llama_decode(self._context, self._batch) == 0
            for index, (number, _, _) in enumerate(part):
                if last[number] == begin + index:
                    logits = self._lib.llama_get_logits_ith(self._context, index)
                    drawn[number] = int(self._numpy.ctypeslib.as_array(logits, shape=(self._words,)).argmax())
        return [drawn[number] for number in wanted]


def main() -> None:
    # Its library writes on standard output too: the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    source, directory, precision, threads = sys.argv[1:5]
    model = Model(Path(source), Path(directory), precision, int(threads))
    for question in sys.stdin:
        what, *given = json.loads(question)
        print(getattr(model, what)(*given), file=answers, flush=True)


if __name__ == "__main__":
    main()
