"""What OpenAI's API takes and gives, as far as it is served here. Knows no HTTP and no node.

Fields that would change the answer and are not served are refused by name, as are unknown ones: nothing that a client
asks for is silently left out. The API: https://platform.openai.com/docs/api-reference (chat, completions, models).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from contracts.errors import BadInput
from contracts.types import ModelId, Version
from node.inference.spec import (
    TOKENS_DEFAULT,
    Completion,
    DrawnToken,
    FinishReason,
    Message,
    Parameters,
    Prompt,
    Usage,
    check_prompt,
)
from node.rpc.answers import logprobs, usage
from node.rpc.values import ModelInfo

TEMPERATURE_DEFAULT = 1.0
"""Theirs, not ours: whoever wants the likeliest answer there says 0."""

ANY_OBJECT = '{"type": "object"}'
"""The schema of JSON mode."""

VERSION_SIGN = "@"
"""`model_id@version` names a version; without it the newest is meant."""


class BadField(BadInput):
    """A field of the request; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class _Taken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every part of a request is."""


class TextPart(_Taken, frozen=True):
    type: Literal["text"]
    text: str


class Turn(_Taken, frozen=True):
    """A message. `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...]
    name: str | None = None


class NamedSchema(_Taken, frozen=True):
    """What name and description are is the schema's to say; `strict` is always meant."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Taken, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def schema(self) -> str | None:
        """The JSON schema of the answer, None for one that is free. Raises BadField."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise BadField("response_format", "response_format has a json_schema if, and only if, that is its type")
        if self.type == "json_object":
            return ANY_OBJECT
        return None if self.json_schema is None else msgspec.json.encode(self.json_schema.schema).decode()


class StreamOptions(_Taken, frozen=True):
    include_usage: bool = False


class _Asked(_Taken, frozen=True, kw_only=True):
    """What chat and plain completions have in common. `top_k` and `min_p` are ours; `user`, `metadata` and `store` mean
    nothing here: who asks says the token, and nothing is stored."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def is_streamed(self) -> bool:
        return self.stream is True

    @property
    def wants_usage(self) -> bool:
        """A stream has it only when it is asked for."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def model_key(self) -> tuple[ModelId, Version | None]:
        model_id, _, version = self.model.partition(VERSION_SIGN)
        return ModelId(model_id), Version(version) if version else None

    def _parameters(self, max_tokens: int | None, logprobs: int | None, schema: str | None = None) -> Parameters:
        _check_unserved("n", self.n, (None, 1))
        _check_unserved("presence_penalty", self.presence_penalty, (None, 0))
        _check_unserved("frequency_penalty", self.frequency_penalty, (None, 0))
        _check_unserved("logit_bias", self.logit_bias, (None, {}))
        stop = self.stop or ()
        parameters = Parameters(
            max_tokens=TOKENS_DEFAULT if max_tokens is None else max_tokens,
            temperature=TEMPERATURE_DEFAULT if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=(stop,) if isinstance(stop, str) else stop,
            logprobs=logprobs,
            json_schema=schema,
        )
        parameters.check()
        return parameters


class ChatRequest(_Asked, frozen=True, kw_only=True):
    messages: tuple[Turn, ...]
    max_completion_tokens: int | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompt(self) -> Prompt:
        turns = tuple(
            Message("system" if turn.role == "developer" else turn.role, _text(turn.content)) for turn in self.messages
        )
        check_prompt(turns)
        return turns

    def parameters(self) -> Parameters:
        if self.top_logprobs and not self.logprobs:
            raise BadField("top_logprobs", "top_logprobs are told with logprobs: set logprobs to true")
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        schema = None if self.response_format is None else self.response_format.schema()
        return self._parameters(asked, (self.top_logprobs or 0) if self.logprobs else None, schema)


class TextRequest(_Asked, frozen=True, kw_only=True):
    prompt_given: str | tuple[str, ...] = msgspec.field(name="prompt")
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    logprobs: int | None = None

    def prompt(self) -> Prompt:
        given = (self.prompt_given,) if isinstance(self.prompt_given, str) else self.prompt_given
        if len(given) != 1:
            raise BadField("prompt", f"{len(given)} prompts in one request; one is taken")
        check_prompt(given[0])
        return given[0]

    def parameters(self) -> Parameters:
        _check_unserved("echo", self.echo, (None, False))
        _check_unserved("best_of", self.best_of, (None, 1))
        _check_unserved("suffix", self.suffix, (None, ""))
        return self._parameters(self.max_tokens, self.logprobs)


def decode(body: object, kind: type[ChatRequest] | type[TextRequest]) -> ChatRequest | TextRequest:
    """A request. Raises BadField, or BadInput when it is no object."""
    if not isinstance(body, Mapping):
        raise BadInput("the body is no JSON object")
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "'")
        field = text.partition("$.")[2].partition("'")[0].partition("[")[0] or _unknown(text)
        raise BadField(field, text.replace("$.", "")) from error


def _unknown(text: str) -> str:
    """The name in msgspec's line about an unknown or a missing field."""
    return text.partition("field '")[2].partition("'")[0]


def _text(content: str | tuple[TextPart, ...]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _check_unserved(name: str, value: object, served: tuple[object, ...]) -> None:
    if value not in served:
        raise BadField(name, f"{name} is not served here: leave it out")


# What is given


def model_name(model: ModelInfo) -> str:
    return f"{model.model_id}{VERSION_SIGN}{model.version}"


def model_row(model: ModelInfo, is_newest: bool) -> dict[str, Any]:
    """`created` is left out: a model is older than its registration."""
    name = model.model_id if is_newest else model_name(model)
    return {"id": name, "object": "model", "owned_by": "aigen"}


class Form:
    """How an answer is written, whole and in parts: one of the two kinds of completion."""

    def __init__(self, request: ChatRequest | TextRequest, model: ModelInfo, number: str, created: int) -> None:
        self._is_chat = isinstance(request, ChatRequest)
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{number}",
            "created": created,
            "model": model_name(model),
        }
        self._offset = 0

    def whole(self, done: Completion) -> dict[str, Any]:
        said: dict[str, Any] = {"text": done.text}
        if self._is_chat:
            said = {"message": {"role": "assistant", "content": done.text, "refusal": None}}
        kind = "chat.completion" if self._is_chat else "text_completion"
        choice = self._choice(said, done.tokens, done.finish_reason)
        return {**self._head, "object": kind, "choices": [choice], "usage": usage(done.usage)}

    def begin(self) -> dict[str, Any] | None:
        """What a stream begins with: who speaks."""
        return self._part({"delta": {"role": "assistant", "content": ""}}) if self._is_chat else None

    def part(self, text: str, tokens: tuple[DrawnToken, ...]) -> dict[str, Any]:
        return self._part({"delta": {"content": text}} if self._is_chat else {"text": text}, tokens)

    def end(self, reason: FinishReason) -> dict[str, Any]:
        return self._part({"delta": {}} if self._is_chat else {"text": ""}, reason=reason)

    def counted(self, used: Usage) -> dict[str, Any]:
        """The last part of a stream that is to have it."""
        return {**self._head, "object": self._part_kind, "choices": [], "usage": usage(used)}

    @property
    def _part_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _part(
        self, said: dict[str, Any], tokens: tuple[DrawnToken, ...] = (), reason: FinishReason | None = None
    ) -> dict[str, Any]:
        return {**self._head, "object": self._part_kind, "choices": [self._choice(said, tokens, reason)]}

    def _choice(
        self, said: dict[str, Any], tokens: tuple[DrawnToken, ...], reason: FinishReason | None
    ) -> dict[str, Any]:
        told = None
        if tokens:
            told = {"content": logprobs(tokens), "refusal": None} if self._is_chat else self._told(tokens)
        return {"index": 0, **said, "logprobs": told, "finish_reason": reason}

    def _told(self, tokens: tuple[DrawnToken, ...]) -> dict[str, Any]:
        """The older form: lists side by side, offsets counted in characters of the answer."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.drawn.token)
        return {
            "tokens": [token.drawn.token for token in tokens],
            "token_logprobs": [token.drawn.logprob for token in tokens],
            "top_logprobs": [{one.token: one.logprob for one in token.likeliest} for token in tokens],
            "text_offset": offsets,
        }
