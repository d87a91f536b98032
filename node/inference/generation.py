"""From a prompt to an answer: what has been fed, what is to be fed next, when it is over.

Owns one answer under way. When it is fed, and together with which others, is the process's to say. Knows no processes.
"""

from dataclasses import dataclass

import torch

from node.inference.decoder import Decoder
from node.inference.memory import KeyValues, Shape
from node.inference.sampling import Sampler
from node.inference.spec import Chunk, FinishReason, Parameters, Prompt, Usage
from node.inference.tokenizing import GrowingText, StopStrings, Tokenizer


@dataclass(frozen=True)
class RunnableModel:
    """What an answer needs of a loaded model."""

    tokenizer: Tokenizer
    decoder: Decoder


class Answering:
    """Once it has begun, and while `is_reading`, `read` feeds the prompt part by part. Then `token` is to be fed to
    `memory`, and `take` is given the logits after it, over and over, until a chunk has a finish reason."""

    def __init__(self, model: RunnableModel, prompt: Prompt, parameters: Parameters) -> None:
        decoder = model.decoder
        self._decoder = decoder
        self._tokenizer = model.tokenizer
        self.prompt = self._tokenizer.prompt(prompt)
        self._limit = min(parameters.max_tokens, decoder.shape.context_length - len(self.prompt))
        self.tokens_max = len(self.prompt) + self._limit
        """With its prompt."""
        self._sampler = Sampler(parameters)
        self._growing = GrowingText(self._tokenizer)
        self._stops = StopStrings(parameters.stop)
        self._drawn: list[int] = []
        self._known = 0
        self.is_reading = True

    @property
    def shape(self) -> Shape:
        return self._decoder.shape

    @property
    def token(self) -> int:
        """The one that was drawn last."""
        return self._drawn[-1]

    def begin(self, memory: KeyValues) -> None:
        """What `memory` has of the prompt already is not fed again."""
        self.memory = memory
        self._known = memory.length
        self._turns = self._decoder.prefill(self.prompt[memory.length :], memory)

    def read(self) -> Chunk | None:
        """Feed the next part of the prompt; the first chunk, or None as long as nothing came to be shown."""
        try:
            next(self._turns)
        except StopIteration as end:
            self.is_reading = False
            return self.take(end.value)
        return None

    def take(self, logits: torch.Tensor) -> Chunk | None:
        """Draw the next token. None when it shows nothing yet. The last chunk, and only it, has the finish reason:
        `stop` for an end token or a stop string, `length` when max_tokens or the context is used up."""
        self._drawn.append(self._sampler.next(logits))
        if self.token in self._tokenizer.stop_tokens:
            return self._end("stop")
        shown, stopped = self._stops.add(self._growing.add(self.token))
        if stopped:
            return self._last(shown, "stop")
        if len(self._drawn) == self._limit:
            return self._end("length", shown)
        return Chunk(shown) if shown else None

    def _end(self, reason: FinishReason, shown: str = "") -> Chunk:
        """With what was held back, unless that completes a stop string."""
        tail, stopped = self._stops.add(self._growing.flush())
        if stopped:
            return self._last(shown + tail, "stop")
        return self._last(shown + tail + self._stops.flush(), reason)

    def _last(self, shown: str, reason: FinishReason) -> Chunk:
        return Chunk(shown, reason, Usage(len(self.prompt), len(self._drawn), self._known))
