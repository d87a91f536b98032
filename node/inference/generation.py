"""From a prompt to an answer, one token at a time, in turns that others can take between.

Owns the loop of one answer: feed, draw, stop. Knows no processes and no other answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from node.inference.decoder import CAPACITY_STEP, Decoder, KeyValues
from node.inference.sampling import Sampler
from node.inference.spec import Chunk, FinishReason, Parameters, Prompt, Usage
from node.inference.tokenizing import GrowingText, StopStrings, Tokenizer


@dataclass(frozen=True)
class RunnableModel:
    """What an answer needs of a loaded model."""

    tokenizer: Tokenizer
    decoder: Decoder


def answer(model: RunnableModel, prompt: Prompt, parameters: Parameters) -> Iterator[Chunk | None]:
    """The answer, chunk by chunk; None is a turn in which nothing came to be shown. Close it to cancel.

    The last chunk, and only it, has the finish reason: `stop` for an end token or a stop string, `length` when
    max_tokens or the context is used up.
    """
    decoder = model.decoder
    tokens = model.tokenizer.prompt(prompt)
    limit = min(parameters.max_tokens, decoder.shape.context_length - len(tokens))
    memory = KeyValues(decoder.shape, min(len(tokens) + limit, len(tokens) + CAPACITY_STEP))
    sampler = Sampler(parameters)
    growing = GrowingText(model.tokenizer)
    stops = StopStrings(parameters.stop)
    turns = decoder.prefill(tokens, memory)
    while True:
        try:
            with torch.inference_mode():
                next(turns)
        except StopIteration as end:
            logits = end.value
            break
        yield None
    count = 0
    while True:
        with torch.inference_mode():
            token = sampler.next(logits)
        count += 1
        if token in model.tokenizer.stop_tokens:
            shown, stopped = stops.add(growing.flush())
            yield _last(shown if stopped else shown + stops.flush(), "stop", len(tokens), count)
            return
        shown, stopped = stops.add(growing.add(token))
        if stopped:
            yield _last(shown, "stop", len(tokens), count)
            return
        if count == limit:
            tail, stopped = stops.add(growing.flush())
            shown += tail if stopped else tail + stops.flush()
            yield _last(shown, "stop" if stopped else "length", len(tokens), count)
            return
        yield Chunk(shown) if shown else None
        with torch.inference_mode():
            logits = decoder.step(token, memory)


def _last(text: str, reason: FinishReason, prompt_tokens: int, completion_tokens: int) -> Chunk:
    return Chunk(text, reason, Usage(prompt_tokens, completion_tokens))
