"""The memory of conversations: keys and values of what a model was fed, within a number of bytes for all answers.

What an answer leaves is kept for prompts that begin the same, for as long as nobody needs the room. Knows shapes, bytes
and tokens; no model, no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contracts.errors import NoSpace

SHARED_TOKENS_MIN = 16
"""A shorter beginning costs less to feed than to look after."""


@dataclass(frozen=True)
class Shape:
    """The sizes of an architecture's attention; `window` 0 is none."""

    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    context_length: int
    window: int = 0

    @property
    def token_bytes(self) -> int:
        """What a token takes: a key and a value in each layer, fp32."""
        return 2 * 4 * self.layers * self.key_value_heads * self.head_size


class KeyValues:
    """The keys and values of one conversation so far, fp32, written in place. What is not written yet takes no memory:
    the kernel gives pages as they are touched."""

    def __init__(self, shape: Shape, tokens_max: int) -> None:
        assert 0 < tokens_max <= shape.context_length
        size = (shape.layers, shape.key_value_heads, tokens_max, shape.head_size)
        self.length = 0
        self.capacity = tokens_max
        self.keys = torch.empty(size, dtype=torch.float32)
        self.values = torch.empty(size, dtype=torch.float32)

    @property
    def size_bytes(self) -> int:
        """What may be touched."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def touched_bytes(self) -> int:
        """What is written."""
        return self.size_bytes * self.length // self.capacity

    def begin_as(self, other: KeyValues, tokens: int) -> None:
        """Take over the first tokens of another conversation."""
        assert self.length == 0
        self.keys[:, :, :tokens] = other.keys[:, :, :tokens]
        self.values[:, :, :tokens] = other.values[:, :, :tokens]
        self.length = tokens


@dataclass(eq=False)
class _Kept:
    """A conversation that is over."""

    owner: tuple[str, str]
    """The model, and the account whose conversation it was."""
    tokens: Sequence[int]
    memory: KeyValues

    def says_all_of(self, other: _Kept) -> bool:
        return self.owner == other.owner and _shared(self.tokens, other.tokens) == len(other.tokens)


class AnswerMemory:
    """Of all models of an engine process."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0
        """By answers under way; what is kept comes on top, where there is room."""
        self._kept: list[_Kept] = []

    def check(self, shape: Shape, tokens_max: int) -> None:
        """NoSpace when there can never be room for a conversation of so many tokens."""
        if shape.token_bytes * tokens_max > self.bytes_max:
            raise NoSpace(
                f"an answer of {tokens_max} tokens with its prompt takes {shape.token_bytes * tokens_max} bytes beside "
                f"the model, and all answers have {self.bytes_max}; ask for at most "
                f"{self.bytes_max // shape.token_bytes} tokens, or raise inference.cache_size"
            )

    def resize(self, bytes_max: int) -> None:
        """From now on; what is under way ends as it may."""
        self.bytes_max = bytes_max
        self._shrink()

    def take(self, key: str, account: str, shape: Shape, tokens: Sequence[int], tokens_max: int) -> KeyValues | None:
        """Memory for a conversation that begins with `tokens` and may grow to `tokens_max`, with as many of them in it
        as a kept one of this account has: what others said must not show, not even by how soon an answer comes. None
        when there is no room now; NoSpace as `check`."""
        self.check(shape, tokens_max)
        size_bytes = shape.token_bytes * tokens_max
        if self.used_bytes + size_bytes > self.bytes_max:
            return None
        found, shared = self._longest((key, account), tokens)
        memory = KeyValues(shape, tokens_max)
        if found is not None:
            memory.begin_as(found.memory, shared)
            self._kept.remove(found)  # the most recently used is the last to go
            self._kept.append(found)
        self.used_bytes += size_bytes
        self._shrink()
        return memory

    def give_back(self, key: str, account: str, prompt: Sequence[int], memory: KeyValues) -> None:
        """The conversation is over. Only what was fed of its prompt is kept: the tokens of an answer are fed one at a
        time, which rounds otherwise, and a prompt that has them would be answered differently than without."""
        self.used_bytes -= memory.size_bytes
        memory.length = min(memory.length, len(prompt))
        tokens = prompt[: memory.length]
        if len(tokens) >= SHARED_TOKENS_MIN:
            kept = _Kept((key, account), tuple(tokens), memory)
            self._kept = [*(other for other in self._kept if not kept.says_all_of(other)), kept]
            self._shrink()

    def forget(self, key: str) -> None:
        """The model is unloaded."""
        self._kept = [kept for kept in self._kept if kept.owner[0] != key]

    @property
    def kept_bytes(self) -> int:
        return sum(kept.memory.touched_bytes for kept in self._kept)

    def _longest(self, owner: tuple[str, str], tokens: Sequence[int]) -> tuple[_Kept | None, int]:
        """Who shares the longest beginning. The last token is always fed: what comes after it is the answer."""
        best, most = None, SHARED_TOKENS_MIN - 1
        for kept in self._kept:
            if kept.owner == owner and (shared := min(_shared(kept.tokens, tokens), len(tokens) - 1)) > most:
                best, most = kept, shared
        return best, most

    def _shrink(self) -> None:
        """The least recently used go first."""
        while self._kept and self.used_bytes + self.kept_bytes > self.bytes_max:
            self._kept.pop(0)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
