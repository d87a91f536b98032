"""Prompts to tokens, and answers that grow character by character."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import BadInput
from node.inference.files import ArtifactFiles
from node.inference.mapping import ShardMapping
from node.inference.spec import Message
from node.inference.tokenizing import GrowingText, StopStrings, Tokenizer

from . import tiny


def tokenizer_of(directory: Path, shards: Path, context: int = tiny.CONTEXT) -> Tokenizer:
    spec = tiny.cut(directory, shards, 1 << 20)
    mapping = ShardMapping([Path(path) for path in spec.shards], spec.shard_size, spec.total_size)
    return Tokenizer(spec.key, ArtifactFiles(spec, mapping), tiny.llama_config(), context)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("tokenizer")
    tiny.train_tokenizer().save_pretrained(root / "model")
    return tokenizer_of(root / "model", root / "shards")


def test_a_conversation_goes_through_the_template(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.prompt((Message("system", "Be brief."), Message("user", "The capital?")))
    assert tokenizer._inner.decode(tokens) == (
        "<|begin|>system\nBe brief.<|end|>\n<|begin|>user\nThe capital?<|end|>\n<|begin|>assistant\n"
    )
    assert tokenizer.stop_tokens == {1}


def test_a_plain_prompt_does_not(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.prompt("The capital of France")) == "The capital of France"


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(tmp_path: Path) -> None:
    tiny.train_tokenizer().save_pretrained(tmp_path / "model")
    small = tokenizer_of(tmp_path / "model", tmp_path / "shards", context=8)
    assert len(small.prompt("1234567")) == 7
    with pytest.raises(BadInput, match="has 8 tokens, tiny@1 reads at most 8"):
        small.prompt("12345678")


def test_without_a_template_messages_are_refused(tmp_path: Path) -> None:
    plain = tiny.train_tokenizer()
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_of(tmp_path / "model", tmp_path / "shards")
    with pytest.raises(BadInput, match="no chat template"):
        tokenizer.prompt((Message("user", "Hello"),))
    assert tokenizer.prompt("Hello")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}", "{% for %}", "{{ 1 / 0 }}"],
)
def test_a_template_that_fails_or_reaches_out_is_refused(tmp_path: Path, template: str) -> None:
    bad = tiny.train_tokenizer()
    bad.chat_template = template
    bad.save_pretrained(tmp_path / "model")
    tokenizer = tokenizer_of(tmp_path / "model", tmp_path / "shards")
    with pytest.raises(BadInput, match="chat template of tiny@1"):
        tokenizer.prompt((Message("user", "Hello"),))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_the_pieces_are_the_whole_and_no_character_is_torn(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer._inner(text, add_special_tokens=False)["input_ids"]
    growing = GrowingText(tokenizer)
    pieces = [growing.add(token) for token in tokens]
    assert "".join(pieces) + growing.flush() == tokenizer.decode(tokens)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(2, 399), max_size=60))
def test_any_tokens_at_all_come_through(tokenizer: Tokenizer, tokens: list[int]) -> None:
    growing = GrowingText(tokenizer)
    text = "".join(growing.add(token) for token in tokens) + growing.flush()
    assert text.replace("\N{REPLACEMENT CHARACTER}", "") == tokenizer.decode(tokens).replace(
        "\N{REPLACEMENT CHARACTER}", ""
    )


@given(st.text("abX", max_size=40), st.lists(st.text("abX", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_wherever_the_pieces_fall(text: str, stops: list[str], data: st.DataObject) -> None:
    stopping = StopStrings(tuple(stops))
    shown, stopped, place = "", False, 0
    while place < len(text) and not stopped:
        size = data.draw(st.integers(1, 5))
        piece, stopped = stopping.add(text[place : place + size])
        shown += piece
        place += size
    if not stopped:
        shown += stopping.flush()
    seen = text[:place]
    places = [seen.find(stop) for stop in stops if stop in seen]
    assert stopped == bool(places)
    assert shown == (seen[: min(places)] if places else text)
