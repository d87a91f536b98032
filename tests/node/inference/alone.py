"""A model without an engine around it."""

from collections.abc import Iterator

import torch

from node.inference.decoder import ROWS_MAX, Decoder, Part, finished
from node.inference.generation import Answering, RunnableModel
from node.inference.memory import KeyValues
from node.inference.spec import Chunk, Parameters, Prompt


@torch.inference_mode()
def answer(model: RunnableModel, prompt: Prompt, parameters: Parameters) -> Iterator[Chunk]:
    """An answer alone."""
    one = Answering(model, prompt, parameters)
    one.begin(KeyValues(one.shape, one.tokens_max))
    chunk = None
    while chunk is None or chunk.finish_reason is None:
        part = [one.next(ROWS_MAX)]
        (logits,) = finished(model.decoder.feed(part)) if one.is_reading else model.decoder.step(part)
        chunk = one.take(logits)
        if chunk is not None:
            yield chunk


def fed(decoder: Decoder, tokens: list[int], memory: KeyValues, rows_max: int = ROWS_MAX) -> torch.Tensor:
    """A prompt at once; the logits after it."""
    for begin in range(0, len(tokens), rows_max):
        (logits,) = finished(decoder.feed([Part(tokens[begin : begin + rows_max], memory)]))
    return logits


def stepped(decoder: Decoder, token: int, memory: KeyValues) -> torch.Tensor:
    """One token; the logits after it."""
    return decoder.step([Part([token], memory)])[0]
