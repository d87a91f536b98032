"""Answers that fit a JSON schema, whatever the model would rather say; and what it thinks of each token."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from llguidance import LLParserLimits

from contracts.errors import BadInput, Refused
from node.inference.engine import Engine, EngineSettings
from node.inference.generation import RunnableModel
from node.inference.grammar import Grammar
from node.inference.loading import MappedModel
from node.inference.memory import KeyValues
from node.inference.spec import Chunk, Completion, Parameters
from node.inference.tokenizing import Tokenizer

from . import tiny
from .alone import answer, fed, stepped

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["fox", "bear"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RunnableModel:
    root = tmp_path_factory.mktemp("llama")
    return MappedModel(tiny.cut(tiny.save(root / "model", "llama"), root / "shards", 16384)).runnable


def whole(model: RunnableModel, **parameters: Any) -> Completion:
    return Completion.of(list(answer(model, "The capital of", Parameters(**parameters))))


@pytest.mark.parametrize("seed", range(12))
def test_what_is_drawn_fits_the_schema(model: RunnableModel, seed: int) -> None:
    """A model of random weights would never say any of it by itself."""
    schema = json.dumps(PERSON)
    done = whole(model, max_tokens=200, temperature=1.0, seed=seed, json_schema=schema)
    assert done.finish_reason == "stop"
    person = json.loads(done.text)
    assert set(person) == {"name", "age", "kind"}
    assert len(person["name"]) <= 8
    assert person["age"] in range(151)
    assert person["kind"] in {"fox", "bear"}
    assert done == whole(model, max_tokens=200, temperature=1.0, seed=seed, json_schema=schema)


def test_the_likeliest_of_what_fits(model: RunnableModel) -> None:
    done = whole(model, json_schema='{"enum": ["fox", "bear"]}')
    assert (json.loads(done.text) in {"fox", "bear"}, done.finish_reason) == (True, "stop")
    assert whole(model, json_schema='{"const": "Zürich"}').text == '"Zürich"'


def test_an_answer_that_is_cut_off_says_so(model: RunnableModel) -> None:
    done = whole(model, max_tokens=5, json_schema='{"const": "a text of many tokens, more than five"}')
    assert done.finish_reason == "length"
    assert '"a text of many tokens, more than five"'.startswith(done.text)


HOSTILE = {
    "no JSON": "{",
    "a list": "[]",
    "a type that is none": '{"type": "objec"}',
    "what is elsewhere": '{"$ref": "http://example.org/schema"}',
    "what is not known": '{"not": {"type": "string"}}',
    "nothing fits": '{"enum": []}',
    "endless": '{"$ref": "#"}',
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_schema_or_cannot_be_kept_to_is_refused_in_one_line(model: RunnableModel, schema: str) -> None:
    with pytest.raises(BadInput, match="JSON schema") as refused:
        Grammar(model.tokenizer.vocabulary, schema)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pattern", ["(((a{100}){100}){100}){100}", "(x+x+)+y", "[^\\\\x00]{1,100000}"])
def test_a_pattern_that_explodes_is_bounded(model: RunnableModel, pattern: str) -> None:
    """Either it is refused, or it is kept to; it takes neither the memory nor the time it spells out."""
    try:
        grammar = Grammar(model.tokenizer.vocabulary, json.dumps({"type": "string", "pattern": f"^{pattern}$"}))
        for _ in range(50):
            token = int(grammar.allowed(torch.zeros(448)).argmax())
            if token in model.tokenizer.stop_tokens or grammar.take(token):
                break
    except Refused:
        return
    assert grammar.allowed(torch.zeros(448)).isfinite().any()


def test_past_the_bounds_an_answer_is_refused_and_not_ended_as_if_it_were_whole(
    model: RunnableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past them llguidance allows the end token alone."""
    monkeypatch.setattr("node.inference.grammar.BOUNDS", LLParserLimits(step_lexer_fuel=2000))
    schema = json.dumps({"anyOf": [{"type": "string", "pattern": f"^.*a.{{{n}}}b{n}$"} for n in range(12)]})
    grammar = Grammar(model.tokenizer.vocabulary, schema)

    def go_on() -> None:
        for seed in range(400):
            logits = torch.randn(448, generator=torch.Generator().manual_seed(seed))
            token = int(grammar.allowed(logits).argmax())
            assert token not in model.tokenizer.stop_tokens
            grammar.take(token)

    with pytest.raises(Refused, match="too much to be kept to"):
        go_on()


def test_options_of_llguidance_in_a_schema_are_refused(model: RunnableModel) -> None:
    with pytest.raises(BadInput, match="x-guidance"):
        Grammar(model.tokenizer.vocabulary, '{"type": "object", "x-guidance": {"whitespace_flexible": true}}')


def test_a_tokenizer_that_llguidance_cannot_read_is_a_refusal(tmp_path: Path) -> None:
    """Here one without an end token; the model answers otherwise."""
    directory = tiny.save(tmp_path / "model", "llama", eos_token_id=None)
    (directory / "generation_config.json").unlink()
    tiny.edit_json(directory / "tokenizer_config.json", eos_token=None)
    endless = MappedModel(tiny.cut(directory, tmp_path / "shards", 16384)).runnable
    assert whole(endless, max_tokens=2).usage.completion_tokens == 2
    for more in ({"json_schema": "{}"}, {"logprobs": 0}):
        with pytest.raises(BadInput, match="its tokenizer cannot be read for that"):
            whole(endless, max_tokens=2, **more)


async def test_a_refused_schema_is_one_answers_own_affair(tmp_path: Path) -> None:
    spec = tiny.cut(tiny.save(tmp_path / "model", "llama"), tmp_path / "shards", 16384)
    async with trio.open_nursery() as nursery:
        engine = Engine(EngineSettings(cache_bytes=1 << 30, threads=1))
        await nursery.start(engine.run)
        await engine.load(spec)
        with pytest.raises(BadInput, match="JSON schema"):
            await engine.complete(spec.key, "one", Parameters(json_schema='{"enum": []}'))
        done = await engine.complete(spec.key, "one", Parameters(json_schema='{"const": 1}', logprobs=1))
        assert done.text == "1"
        assert [token.drawn.token for token in done.tokens] == ["1"]
        assert engine.statistics().crashes == 0
        nursery.cancel_scope.cancel()


# Probabilities


def test_logprobs_are_the_models_own(model: RunnableModel) -> None:
    chunks = list(answer(model, "The capital of", Parameters(max_tokens=8, logprobs=3)))
    done = Completion.of(chunks)
    assert len(done.tokens) == 8
    assert b"".join(token.drawn.data for token in done.tokens).decode(errors="replace") == done.text
    memory = KeyValues(model.decoder.shape, 64)
    tokens = model.tokenizer.prompt("The capital of")
    logits = fed(model.decoder, tokens, memory)
    for token in done.tokens:
        expected = torch.log_softmax(logits, 0)
        assert token.drawn.logprob == pytest.approx(expected.max().item(), abs=1e-4)
        assert token.drawn == token.likeliest[0]
        assert [one.logprob for one in token.likeliest] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
        assert math.exp(token.drawn.logprob) <= 1
        logits = stepped(model.decoder, int(logits.argmax()), memory)


def test_logprobs_do_not_know_of_temperature_or_schema(model: RunnableModel) -> None:
    plain = whole(model, max_tokens=1, logprobs=20)
    forced = whole(model, max_tokens=1, logprobs=20, temperature=0.5, seed=1, json_schema='{"const": 7}')
    assert forced.text == "7"
    assert forced.tokens[0].likeliest == plain.tokens[0].likeliest
    assert forced.tokens[0].drawn not in plain.tokens[0].likeliest


def test_without_being_asked_nothing_is_told(model: RunnableModel) -> None:
    assert whole(model, max_tokens=4).tokens == ()
    assert all(token.likeliest == () for token in whole(model, max_tokens=4, logprobs=0).tokens)


def test_every_token_is_told_once_however_the_text_comes(model: RunnableModel) -> None:
    """Text waits while it may be the beginning of a stop string, or half a character; its tokens wait with it."""
    told: list[Chunk] = list(answer(model, "The capital of", Parameters(max_tokens=40, logprobs=0)))
    text = "".join(chunk.text for chunk in told)
    stopped = whole(model, max_tokens=40, logprobs=0, stop=(text[10:14],))
    everything = [token.drawn.data for chunk in told for token in chunk.tokens]
    assert len(everything) == 40
    assert [token.drawn.data for token in stopped.tokens] == everything[: len(stopped.tokens)]
    assert b"".join(everything[: len(stopped.tokens)]).decode(errors="replace").startswith(stopped.text)


def test_limits() -> None:
    with pytest.raises(BadInput, match="logprobs is 21"):
        Parameters(logprobs=21).check()
    with pytest.raises(BadInput, match="the JSON schema has 65537 characters"):
        Parameters(json_schema=" " * 65537).check()


def test_bytes_of_special_tokens_are_their_names(model: RunnableModel) -> None:
    tokenizer: Tokenizer = model.tokenizer
    assert tokenizer.bytes_of(1) == b"<|end|>"
