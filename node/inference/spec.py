"""What crosses the line between the node and its engine process, as frozen values. Knows no torch and does no I/O."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from contracts.errors import BadInput

FILES_MAX = 4096
"""Files one artifact may have."""

MESSAGES_MAX = 1024
"""Messages one conversation may have."""

PROMPT_CHARACTERS_MAX = 2 << 20
"""Characters of all messages together, or of a plain prompt. The model's context is the tighter bound."""

STOPS_MAX = 16
"""Stop strings of one request."""

STOP_CHARACTERS_MAX = 256
"""Characters of one stop string."""

TOKENS_MAX = 1 << 20
"""The largest `max_tokens` that is still a number of tokens and not a mistake."""

TOKENS_DEFAULT = 512
"""Tokens of an answer when the request names no maximum."""

TEMPERATURE_MAX = 2.0
"""As the OpenAI API has it; beyond it, the distribution is noise."""

TOP_K_MAX = 1 << 20
"""Larger than any vocabulary."""

LOGPROBS_MAX = 20
"""Tokens beside the one drawn whose logarithms of probability are told."""

SCHEMA_CHARACTERS_MAX = 64 << 10
"""Characters of a JSON schema."""

SEED_MAX = (1 << 63) - 1
"""What torch's generator takes."""

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the artifact; its place in the stream is the sum of the sizes before it."""

    path: str
    size: int


class QuantisedPlace(msgspec.Struct, frozen=True):
    """Where a model's quantised weights are kept: files that begin with `stem`, whose last part names the model by its
    manifest. `room_bytes` are free for more of them."""

    stem: str
    room_bytes: int


class LoadStep(msgspec.Struct, frozen=True):
    """How far a load is that has work to do before the weights can be mapped."""

    action: Literal["checking", "quantising"]
    precision: str
    done_bytes: int
    total_bytes: int


class ModelSpec(msgspec.Struct, frozen=True):
    """A model whose shards are all held and verified. `shards` are paths on this machine, in shard order. Without a
    place for quantised weights it is only loaded as stored."""

    key: str
    total_size: int
    shard_size: int
    files: tuple[FileEntry, ...]
    shards: tuple[str, ...]
    quantised: QuantisedPlace | None = None

    def check(self) -> None:
        """Refuse a spec whose sizes do not agree with one another."""
        if not self.files or len(self.files) > FILES_MAX:
            raise BadInput(f"{self.key} has {len(self.files)} files; a model has 1 to {FILES_MAX}")
        if self.shard_size <= 0 or any(entry.size < 0 for entry in self.files):
            raise BadInput(f"{self.key} has a negative size; import the model again")
        if len({entry.path for entry in self.files}) != len(self.files):
            raise BadInput(f"{self.key} names a file twice; import the model again")
        total = sum(entry.size for entry in self.files)
        if total != self.total_size:
            raise BadInput(f"the files of {self.key} hold {total} bytes, its total_size is {self.total_size}")
        count = -(-self.total_size // self.shard_size)
        if len(self.shards) != count:
            raise BadInput(
                f"{self.key} needs {count} shards of {self.shard_size} bytes for {self.total_size} bytes, "
                f"{len(self.shards)} were given"
            )


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = tuple[Message, ...] | str
"""A conversation for the model's chat template, or a plain text to go on from."""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to answer. A temperature of 0 is greedy: the likeliest token, every time. With `logprobs`, the logarithm of
    the probability of each token is told, and of so many others. The answer fits `json_schema`."""

    max_tokens: int = TOKENS_DEFAULT
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None

    def check(self) -> None:
        """Refuse what is out of range, naming the parameter, its value and its range."""
        _within("max_tokens", self.max_tokens, 1, TOKENS_MAX)
        _within("temperature", self.temperature, 0.0, TEMPERATURE_MAX)
        _within("top_k", self.top_k, 0, TOP_K_MAX)
        if not 0.0 < self.top_p <= 1.0:
            raise BadInput(f"top_p is {self.top_p}; it is above 0 and at most 1")
        _within("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _within("seed", self.seed, 0, SEED_MAX)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, LOGPROBS_MAX)
        size = len(self.json_schema or "")
        if size > SCHEMA_CHARACTERS_MAX:
            raise BadInput(f"the JSON schema has {size} characters; it has at most {SCHEMA_CHARACTERS_MAX}")
        if len(self.stop) > STOPS_MAX:
            raise BadInput(f"stop has {len(self.stop)} strings; at most {STOPS_MAX} are taken")
        for stop in self.stop:
            if not 1 <= len(stop) <= STOP_CHARACTERS_MAX:
                raise BadInput(f"a stop string has {len(stop)} characters; it has 1 to {STOP_CHARACTERS_MAX}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadInput(f"{name} is {value}; it is between {low} and {high}")


def check_prompt(prompt: Prompt) -> None:
    """Refuse an empty or an oversized prompt before it travels."""
    if isinstance(prompt, str):
        characters = len(prompt)
    else:
        if not 1 <= len(prompt) <= MESSAGES_MAX:
            raise BadInput(f"the conversation has {len(prompt)} messages; it has 1 to {MESSAGES_MAX}")
        characters = sum(len(message.content) for message in prompt)
    if not 1 <= characters <= PROMPT_CHARACTERS_MAX:
        raise BadInput(f"the prompt has {characters} characters; it has 1 to {PROMPT_CHARACTERS_MAX}")


class Usage(msgspec.Struct, frozen=True):
    """Tokens counted by the engine, special ones included. `cached_tokens` of the prompt were not fed again: an earlier
    conversation began with them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token, its bytes, and the natural logarithm of its probability as the model has it: before temperature, cuts
    and schema. Bytes that are no text of their own stand as replacement characters in `token`."""

    token: str
    data: bytes
    logprob: float


class DrawnToken(msgspec.Struct, frozen=True):
    """A token of an answer, and the likeliest in its place."""

    drawn: TokenLogprob
    likeliest: tuple[TokenLogprob, ...]


class Chunk(msgspec.Struct, frozen=True):
    """A part of an answer. The last one, and only it, has a finish reason and the usage. `tokens` are those drawn since
    the chunk before, if logprobs are asked for: all but the end token, also those of a stop string."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tokens: tuple[DrawnToken, ...] = ()


class Completion(msgspec.Struct, frozen=True):
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    tokens: tuple[DrawnToken, ...] = ()

    @staticmethod
    def of(chunks: Sequence[Chunk]) -> "Completion":
        """From all its parts."""
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.usage is not None
        joined = joined_chunk(chunks)
        return Completion(joined.text, last.finish_reason, last.usage, joined.tokens)


def joined_chunk(chunks: Sequence[Chunk]) -> Chunk:
    """Several as one."""
    last = chunks[-1] if chunks else Chunk("")
    text = "".join(chunk.text for chunk in chunks)
    return Chunk(text, last.finish_reason, last.usage, tuple(token for chunk in chunks for token in chunk.tokens))


class LoadedModel(msgspec.Struct, frozen=True):
    """What the engine says of a model it has loaded. `mapped_bytes` are shared with the page cache."""

    key: str
    architecture: str
    precision: str
    parameters: int
    context_length: int
    mapped_bytes: int
    private_bytes: int
    load_s: float
    pinned: bool = False
