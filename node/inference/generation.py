"""From a prompt to an answer: what has been fed, what is to be fed next, when it is over.

Owns one answer under way. When it is fed, and together with which others, is the process's to say. Knows no processes.
"""

from dataclasses import dataclass

import torch

from node.inference.decoder import Decoder, Part
from node.inference.grammar import Grammar
from node.inference.memory import KeyValues, Shape
from node.inference.sampling import Sampler
from node.inference.spec import Chunk, DrawnToken, FinishReason, Parameters, Prompt, TokenLogprob, Usage
from node.inference.tokenizing import GrowingText, StopStrings, Tokenizer


@dataclass(frozen=True)
class RunnableModel:
    """What an answer needs of a loaded model."""

    tokenizer: Tokenizer
    decoder: Decoder


class Answering:
    """Once it has begun, `next` is to be fed and `take` given the logits after it, over and over, until a chunk has a
    finish reason. The prompt comes first, in parts."""

    def __init__(self, model: RunnableModel, prompt: Prompt, parameters: Parameters) -> None:
        decoder = model.decoder
        self._decoder = decoder
        self._tokenizer = model.tokenizer
        self.prompt = self._tokenizer.prompt(prompt)
        self._limit = min(parameters.max_tokens, decoder.shape.context_length - len(self.prompt))
        self.tokens_max = len(self.prompt) + self._limit
        """With its prompt."""
        self._sampler = Sampler(parameters)
        self._logprobs = parameters.logprobs
        self._grammar: Grammar | None = None
        if parameters.json_schema is not None:
            self._grammar = Grammar(self._tokenizer.vocabulary, parameters.json_schema)
        elif self._logprobs is not None:
            self._tokenizer.require_vocabulary()
        self._untold: list[DrawnToken] = []
        self._growing = GrowingText(self._tokenizer)
        self._stops = StopStrings(parameters.stop)
        self._drawn: list[int] = []
        self._known = 0

    @property
    def shape(self) -> Shape:
        return self._decoder.shape

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is still to be fed."""
        return self.memory.length < len(self.prompt)

    def begin(self, memory: KeyValues) -> None:
        """What `memory` has of the prompt already is not fed again."""
        self.memory = memory
        self._known = memory.length

    def next(self, rows_max: int = 1) -> Part:
        """What is to be fed next: of the prompt at most `rows_max` tokens, or the one that was drawn last."""
        fed = self.memory.length
        return Part(self.prompt[fed : fed + rows_max] if self.is_reading else self._drawn[-1:], self.memory)

    def take(self, logits: torch.Tensor) -> Chunk | None:
        """Draw the next token, unless some of the prompt is still to be fed. None when there is nothing to show yet.
        The last chunk, and only it, has the finish reason: `stop` for an end token or a stop string, `length` when
        max_tokens or the context is used up. Raises Refused when the grammar cannot go on."""
        if self.is_reading:
            return None
        token = self._sampler.next(logits if self._grammar is None else self._grammar.allowed(logits))
        self._drawn.append(token)
        if token in self._tokenizer.stop_tokens:
            return self._end("stop")
        if self._logprobs is not None:
            self._untold.append(self._told(token, logits, self._logprobs))
        shown, stopped = self._stops.add(self._growing.add(token))
        if stopped:
            return self._last(shown, "stop")
        if self._grammar is not None and self._grammar.take(token):
            return self._end("stop", shown)
        if len(self._drawn) == self._limit:
            return self._end("length", shown)
        return Chunk(shown, tokens=self._tell()) if shown else None

    def _told(self, token: int, logits: torch.Tensor, others: int) -> DrawnToken:
        logprobs = torch.log_softmax(logits, 0)

        def about(one: int) -> TokenLogprob:
            data = self._tokenizer.bytes_of(one)
            return TokenLogprob(data.decode(errors="replace"), data, logprobs[one].item())

        likeliest = torch.topk(logprobs, min(others, len(logprobs))).indices.tolist()
        return DrawnToken(about(token), tuple(about(one) for one in likeliest))

    def _tell(self) -> tuple[DrawnToken, ...]:
        untold, self._untold = self._untold, []
        return tuple(untold)

    def _end(self, reason: FinishReason, shown: str = "") -> Chunk:
        """With what was held back, unless that completes a stop string."""
        tail, stopped = self._stops.add(self._growing.flush())
        if stopped:
            return self._last(shown + tail, "stop")
        return self._last(shown + tail + self._stops.flush(), reason)

    def _last(self, shown: str, reason: FinishReason) -> Chunk:
        return Chunk(shown, reason, Usage(len(self.prompt), len(self._drawn), self._known), self._tell())
