"""What an answer may consist of when it has to fit a JSON schema: token by token, those that still lead there.

The grammar is llguidance's (https://github.com/guidance-ai/llguidance), whose bounds on its own work hold here too.
JSON comes on one line with a space after `:` and `,`: a model that may put spaces wherever it likes can do so for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from contracts.errors import BadInput, Refused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

BOUNDS = LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=50_000)
"""Work for one token, some 14 ms at the most, and memory, some 100 MB."""

SPACES: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

OWN_OPTIONS = "x-guidance"
"""llguidance's own word in a schema, which sets its options."""


class Grammar:
    """Of one answer."""

    def __init__(self, vocabulary: LLTokenizer, schema: str) -> None:
        """Raises BadInput for what is no schema, or cannot be kept to."""
        if OWN_OPTIONS in schema:
            raise BadInput(f"the JSON schema has {OWN_OPTIONS}, which would loosen what it is kept to by: leave it out")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=SPACES)
        except ValueError as error:
            raise BadInput(f"the JSON schema is no JSON object: {error}") from error
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=BOUNDS)
        self._matcher.compute_bitmask()  # only that finds out that nothing at all would fit
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0] or "nothing fits it"
            raise BadInput(f"the JSON schema cannot be kept to: {reason}")

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of what may come next; minus infinity for all else. Raises Refused as `take` does."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.bool)
        # Past its bounds it would allow the end token, and nothing else, wherever the answer is.
        self._check_bounds()
        return logits.masked_fill(~allowed, -torch.inf)

    def take(self, token: int) -> bool:
        """Go on after a token that was allowed; whether the answer is complete. Raises Refused where it is too much for
        the grammar's bounds."""
        self._matcher.consume_token(token)
        self._check_bounds()
        return self._matcher.is_stopped()

    def _check_bounds(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise Refused(f"the JSON schema is too much to be kept to: {reason}; ask for something simpler")
