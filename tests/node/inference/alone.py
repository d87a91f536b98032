"""A model without an engine around it."""

from collections.abc import Iterator

import torch

from node.inference.decoder import Decoder
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
        chunk = one.read() if one.is_reading else one.take(model.decoder.step(one.token, one.memory))
        if chunk is not None:
            yield chunk


def fed(decoder: Decoder, tokens: list[int], memory: KeyValues) -> torch.Tensor:
    turns = decoder.prefill(tokens, memory)
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value
