"""Values of the node as JSON: a struct becomes an object with the same names, bytes become 0x-hex. Knows no method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from node.agreement import StateMark
from node.inference.spec import DrawnToken, TokenLogprob, Usage
from node.rpc.values import Answered, ChainInfo, ChatChunk, ModelInfo, ShardInfo


def answer(value: object) -> Any:
    """Plain JSON of a value made of structs, mappings, sequences, bytes and scalars."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return f"0x{value.hex()}"
        case msgspec.Struct():
            return {name: answer(getattr(value, name)) for name in value.__struct_fields__}
        case Mapping():
            return {str(name): answer(item) for name, item in value.items()}
        case tuple() | list():
            return [answer(item) for item in value]
    raise AssertionError(f"{type(value).__name__} has no JSON form")


def model_summary(model: ModelInfo, known: bool) -> dict[str, Any]:
    """A model without its shard hashes: a list of models stays short. What is loaded is told to the `known` alone."""
    content: dict[str, Any] = answer(model)
    del content["shard_hashes"]
    if not known:
        content["precision"] = None
    return content


def model_in_full(model: ModelInfo, known: bool) -> dict[str, Any]:
    """A model with each of its shards."""
    content = model_summary(model, known)
    content["shards"] = [
        {
            "shard_index": index,
            "total_shards": model.shard_count,
            "shard_hash": answer(shard_hash),
            "size": min(model.shard_size, model.total_size - index * model.shard_size),
        }
        for index, shard_hash in enumerate(model.shard_hashes)
    ]
    return content


def locations(model: ModelInfo, shards: tuple[ShardInfo, ...], redundancy: int) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "version": model.version,
        "total_shards": model.shard_count,
        "redundancy": redundancy,
        "shards": answer(shards),
    }


def chain(found: ChainInfo, state_hashes: tuple[StateMark, ...]) -> dict[str, Any]:
    return {**answer(found), "state_hashes": answer(state_hashes)}


def completion(model: ModelInfo, answered: Answered) -> dict[str, Any]:
    done, receipt = answered.completion, answered.receipt
    return {
        "model_id": model.model_id,
        "version": model.version,
        "message": {"role": "assistant", "content": done.text},
        "finish_reason": done.finish_reason,
        "usage": usage(done.usage),
        **({"logprobs": logprobs(done.tokens)} if done.tokens else {}),
        **({} if receipt is None else {"receipt": answer(receipt)}),
    }


def chunk(news: ChatChunk) -> dict[str, Any]:
    return {"content": news.content, **({"logprobs": logprobs(news.tokens)} if news.tokens else {})}


def logprobs(tokens: Iterable[DrawnToken]) -> list[dict[str, Any]]:
    """As OpenAI's chat API has them too."""
    return [
        {**_logprob(token.drawn), "top_logprobs": [_logprob(other) for other in token.likeliest]} for token in tokens
    ]


def _logprob(about: TokenLogprob) -> dict[str, Any]:
    return {"token": about.token, "bytes": list(about.data), "logprob": about.logprob}


def usage(used: Usage) -> dict[str, Any]:
    """As OpenAI's API has it too."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }
