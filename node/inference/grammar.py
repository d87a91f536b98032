"""What an answer may consist of when it has to fit a JSON schema: token by token, those that still lead there.

The grammar is llguidance's (https://github.com/guidance-ai/llguidance), whose bounds on its own work hold here too.
JSON comes on one line with a space after `:` and `,`: a model that may put spaces wherever it likes can do so for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLTokenizer

from contracts.errors import BadInput, Refused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

SPACES: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """Of one answer."""

    def __init__(self, vocabulary: LLTokenizer, schema: str) -> None:
        """Raises BadInput for what is no schema, or cannot be kept to."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=SPACES)
        except ValueError as error:
            raise BadInput(f"the JSON schema is no JSON object: {error}") from error
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._matcher.compute_bitmask()  # only that finds out that nothing at all would fit
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0] or "nothing fits it"
            raise BadInput(f"the JSON schema cannot be kept to: {reason}")

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of what may come next; minus infinity for all else."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.bool)
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> bool:
        """Go on after a token that was allowed; whether the answer is complete. Raises Refused where it is too much for
        the grammar's bounds."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise Refused(f"the JSON schema is too much to keep to: {self._matcher.get_error().partition(chr(10))[0]}")
        return self._matcher.is_stopped()
