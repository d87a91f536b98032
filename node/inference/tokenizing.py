"""Text to tokens and back: the artifact's tokenizer, its chat template, answers as text that grows.

Owns what ends an answer on the token side. Knows no weights. Runs data only: no code that came with a model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
from llguidance import LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from contracts.errors import BadInput
from node.inference.files import ArtifactFiles
from node.inference.spec import Message, Prompt

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are not yet, or never, a character."""

PENDING_TOKENS_MAX = 16
"""A character has at most four bytes; an answer that is not text is let through after this many tokens."""


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(self, key: str, files: ArtifactFiles, config: Any, context_length: int) -> None:
        self._key = key
        self._size = int(config.vocab_size)
        self._context_length = context_length
        _check_no_code(key, files)
        try:
            with files.extract_tokenizer() as directory:
                self._inner = PreTrainedTokenizerFast.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
        # The tokenizers library raises plain Exception for whatever is wrong with a tokenizer.json.
        except Exception as error:
            raise BadInput(f"the tokenizer of {key} cannot be loaded: {error}; import the model again") from error
        largest = max(self._inner.get_vocab().values(), default=-1)
        if largest >= config.vocab_size:
            raise BadInput(f"the tokenizer of {key} knows token {largest}, the model has {config.vocab_size}")
        self.stop_tokens = self._stop_tokens(files, config)

    def prompt(self, prompt: Prompt) -> list[int]:
        """The tokens to feed; refused when there is no room left for an answer."""
        tokens = self._plain(prompt) if isinstance(prompt, str) else self._conversation(prompt)
        if not tokens:
            raise BadInput("the prompt has no tokens; write something")
        if len(tokens) >= self._context_length:
            raise BadInput(
                f"the prompt has {len(tokens)} tokens, {self._key} reads at most {self._context_length} "
                "with the answer; shorten it"
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without the special ones."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @functools.cached_property
    def vocabulary(self) -> LLTokenizer:
        """Every token's bytes, for grammars. The first use takes a second for a large vocabulary. Raises BadInput."""
        try:
            return from_tokenizer(self._inner, n_vocab=self._size, eos_token=sorted(self.stop_tokens))
        # It is not written down what llguidance raises for a tokenizer that it cannot read.
        except Exception as error:
            raise BadInput(
                f"{self._key} is held to no JSON schema and tells no logprobs: its tokenizer cannot be read for that "
                f"({error})"
            ) from error

    def require_vocabulary(self) -> None:
        """Raise BadInput now rather than in the middle of an answer."""
        _ = self.vocabulary

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return bytes(self.vocabulary.decode_bytes([token]))

    def _plain(self, text: str) -> list[int]:
        return list(self._inner(text, add_special_tokens=True)["input_ids"])

    def _conversation(self, messages: tuple[Message, ...]) -> list[int]:
        if not self._inner.chat_template:
            raise BadInput(f"{self._key} has no chat template: it continues plain text; send a prompt, not messages")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            # Rendered by transformers in jinja's immutable sandbox.
            text = self._inner.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise BadInput(f"the chat template of {self._key} refuses this conversation: {error}") from error
        return list(self._inner(text, add_special_tokens=False)["input_ids"])

    def _stop_tokens(self, files: ArtifactFiles, config: Any) -> frozenset[int]:
        """The end tokens of the generation config, the config and the tokenizer together."""
        found: set[int] = set()
        candidates = [getattr(config, "eos_token_id", None), self._inner.eos_token_id]
        if "generation_config.json" in files:
            candidates.append(files.read_object("generation_config.json").get("eos_token_id"))
        for candidate in candidates:
            for token in candidate if isinstance(candidate, list) else [candidate]:
                if token is None:
                    continue
                if type(token) is not int or not 0 <= token < config.vocab_size:
                    raise BadInput(f"{self._key} has the end token {str(token)[:32]}; it is below {config.vocab_size}")
                found.add(token)
        return frozenset(found)


class GrowingText:
    """An answer's text as its tokens come: a character is handed out once all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # Text before `_shown` is out; decoding begins at `_start`, a little earlier, because what a token's text is
        # (a leading space, above all) depends on the token before it.
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """The text this token completes, perhaps none yet."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._shown < PENDING_TOKENS_MAX:
            return ""
        if text:
            self._start, self._shown = self._shown, len(self._tokens)
        return text

    def flush(self) -> str:
        """What is left when no more tokens come."""
        text = self._new_text()
        self._start = self._shown = len(self._tokens)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._shown])
        return self._tokenizer.decode(self._tokens[self._start :])[len(before) :]


class StopStrings:
    """Cuts an answer before the first stop string, also one that comes in pieces."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has come."""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            return self._held[: min(places)], True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown, False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that a stop string begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _check_no_code(key: str, files: ArtifactFiles) -> None:
    if "tokenizer.json" not in files:
        raise BadInput(f"{key} has no tokenizer.json; save its tokenizer in the fast format and import it again")
    if "tokenizer_config.json" in files and "auto_map" in files.read_object("tokenizer_config.json"):
        raise BadInput(f"tokenizer_config.json of {key} names code of its own (auto_map); only data is read")
