"""The next token from its logits: greedy, or drawn by temperature, top_k, top_p and min_p. Knows no model."""

import os

import torch

from contracts.errors import Refused
from node.inference.spec import Parameters

GREEDY_BELOW = 1e-6
"""A temperature that leaves nothing but the likeliest token, and that fp32 cannot divide by."""

NUCLEUS_FIRST = 256
"""The nucleus of top_p is nearly always among this many tokens; the whole vocabulary is sorted only when it is not."""


class Sampler:
    """Draws for one answer. The same seed and logits give the same tokens."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._generator = torch.Generator()
        seed = parameters.seed
        self._generator.manual_seed(int.from_bytes(os.urandom(7), "big") if seed is None else seed)

    def next(self, logits: torch.Tensor) -> int:
        """One token for a vector of fp32 logits. Raises Refused when they are no numbers."""
        highest = logits.max()
        if not bool(torch.isfinite(highest)):
            raise Refused("the model came to numbers that are none (infinite or NaN): its weights may not be meant so")
        if self._parameters.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        # Nothing is above 0 then, whatever the temperature.
        probabilities, tokens = self._candidates((logits - highest) / self._parameters.temperature)
        if self._parameters.min_p:
            kept = probabilities >= self._parameters.min_p * probabilities.max()
            probabilities, tokens = probabilities[kept], tokens[kept]
        drawn = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(tokens[drawn])

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that may be drawn, most likely first, with their weights."""
        size = logits.shape[0]
        limit = min(self._parameters.top_k or size, size)
        top_p = self._parameters.top_p
        if limit == size and top_p == 1.0:
            return torch.softmax(logits, 0), torch.arange(size)
        count = limit if top_p == 1.0 else min(limit, NUCLEUS_FIRST)
        while True:
            values, tokens = torch.topk(logits, count)
            # top_p counts what is left after top_k, as transformers has it.
            normaliser = torch.logsumexp(logits if limit == size else torch.topk(logits, limit).values, 0)
            probabilities = torch.exp(values - normaliser)
            if top_p == 1.0:
                return probabilities, tokens
            before = probabilities.cumsum(0) - probabilities
            kept = int((before < top_p).sum())
            if kept < count or count == limit:
                return probabilities[:kept], tokens[:kept]
            count = limit
