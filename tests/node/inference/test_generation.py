"""The decoders beside transformers, token for token, and the loop around them."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from contracts.errors import Refused
from node.inference.decoder import Part, finished
from node.inference.loading import MappedModel
from node.inference.memory import KeyValues
from node.inference.sampling import Sampler
from node.inference.spec import Chunk, Message, Parameters

from . import tiny
from .alone import answer, fed, stepped

PROMPT = [5, 300, 17, 42, 99, 7, 260, 301, 8, 11, 400] * 4


@pytest.fixture(scope="module", params=tiny.MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def loaded(directory: Path) -> MappedModel:
    return MappedModel(tiny.cut(directory, directory.parent / "shards", 16384))


@pytest.fixture(scope="module")
def reference(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@torch.inference_mode()
def test_logits_of_a_prompt_and_of_each_step(loaded: MappedModel, reference: torch.nn.Module) -> None:
    expected = reference(torch.tensor([PROMPT])).logits[0]
    decoder = loaded.runnable.decoder
    for split in (1, 5, 30, len(PROMPT)):
        memory = KeyValues(decoder.shape, len(PROMPT))
        logits = fed(decoder, PROMPT[:split], memory)
        torch.testing.assert_close(logits, expected[split - 1], rtol=1e-4, atol=1e-4)
        for place in range(split, len(PROMPT)):
            logits = stepped(decoder, PROMPT[place], memory)
            torch.testing.assert_close(logits, expected[place], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "codegen"])
@pytest.mark.parametrize("threads", [1, 3], ids=["heads-that-share-a-key-together", "each-head-alone"])
def test_attention_of_a_step_however_many_threads_there_are(
    tmp_path: Path, name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.save(tmp_path / "model", name, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(directory).eval()(torch.tensor([PROMPT])).logits[0]
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    decoder = MappedModel(tiny.cut(directory, tmp_path / "shards", 16384)).runnable.decoder
    memory = KeyValues(decoder.shape, len(PROMPT))
    for place, token in enumerate(PROMPT):
        torch.testing.assert_close(stepped(decoder, token, memory), expected[place], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_prompt_in_several_parts_is_the_same(
    loaded: MappedModel, reference: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = loaded.runnable.decoder
    logits = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)), 7)
    expected = reference(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("count", [2, 3, 9])
def test_steps_of_several_conversations_together_are_those_of_each_alone(
    loaded: MappedModel, reference: torch.nn.Module, count: int
) -> None:
    """They are of different lengths, and some are joined later."""
    decoder = loaded.runnable.decoder
    memories = [KeyValues(decoder.shape, len(PROMPT)) for _ in range(count)]
    for number, memory in enumerate(memories):
        fed(decoder, PROMPT[: number + 1], memory)
    for _ in range(12):
        tokens = [PROMPT[memory.length] for memory in memories]
        logits = decoder.step([Part([token], memory) for token, memory in zip(tokens, memories, strict=True)])
        for row, memory in zip(logits, memories, strict=True):
            expected = reference(torch.tensor([PROMPT[: memory.length]])).logits[0, -1]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_half_precision_stays_close_to_the_exact_answer(
    tmp_path: Path, name: str, dtype: torch.dtype, multiplies_bf16: bool
) -> None:
    # Measured against fp32 with the same (rounded) weights: we must not be further from it than transformers is.
    half = tiny.save(tmp_path / "half", name, dtype)
    decoder = MappedModel(tiny.cut(half, tmp_path / "shards", 16384)).runnable.decoder
    theirs = AutoModelForCausalLM.from_pretrained(half, dtype="auto").eval()
    exact = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).eval()(torch.tensor([PROMPT])).logits[0]
    their_error = (theirs(torch.tensor([PROMPT])).logits[0, 1:].float() - exact[1:]).abs().mean()
    memory = KeyValues(decoder.shape, len(PROMPT))
    ours = torch.stack([stepped(decoder, token, memory) for token in PROMPT])[1:]
    assert (ours - exact[1:]).abs().mean() <= their_error * 1.1
    prefilled = fed(decoder, PROMPT, KeyValues(decoder.shape, len(PROMPT)))
    assert (prefilled - exact[-1]).abs().mean() <= their_error * 1.1


@torch.inference_mode()
@pytest.mark.parametrize("name", tiny.MODELS)
def test_in_bf16_answers_do_not_depend_on_what_is_answered_beside_them(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: prompts where products of many rows are in bf16 too, and steps of as many as are made one by one."""
    monkeypatch.setattr("node.inference.products.multiplies_bf16", lambda: True)
    directory = tiny.save(tmp_path / "bf16", name, torch.bfloat16)
    decoder = MappedModel(tiny.cut(directory, tmp_path / "shards", 16384)).runnable.decoder
    count = decoder.matrices.steps_each_max
    memories = [KeyValues(decoder.shape, 64) for _ in range(count)]
    tokens = [[*PROMPT[:13], number] for number in range(count)]
    parts = [Part(one, memory) for one, memory in zip(tokens, memories, strict=True)]
    together = finished(decoder.feed(parts))
    together_next = decoder.step([Part([7], memory) for memory in memories])
    for number in range(count):
        memory = KeyValues(decoder.shape, 64)
        assert torch.equal(together[number], fed(decoder, tokens[number], memory))
        assert torch.equal(together_next[number], decoder.step([Part([7], memory)])[0])


@torch.inference_mode()
def test_greedy_answers_equal_transformers_generate(loaded: MappedModel, reference: torch.nn.Module) -> None:
    runnable = loaded.runnable
    prompt = (Message("user", "The capital of France"),)
    tokens = runnable.tokenizer.prompt(prompt)
    theirs = reference.generate(torch.tensor([tokens]), max_new_tokens=300, do_sample=False, pad_token_id=1)
    theirs = theirs[0, len(tokens) :].tolist()
    chunks = list(answer(runnable, prompt, Parameters(max_tokens=300)))
    last = chunks[-1]
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert last.usage is not None
    assert last.usage.prompt_tokens == len(tokens)
    assert last.usage.completion_tokens == len(theirs)
    assert (len(theirs), last.finish_reason) == (300, "length"), "the end token does not come up in these"
    assert "".join(chunk.text for chunk in chunks) == runnable.tokenizer.decode(theirs)


@torch.inference_mode()
def test_the_end_token_ends_the_answer(directory: Path, reference: torch.nn.Module, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    prompt = (Message("user", "The capital of France"),)
    tokens = MappedModel(tiny.cut(model, tmp_path / "before", 16384)).runnable.tokenizer.prompt(prompt)
    theirs = reference.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False, pad_token_id=1)
    theirs = theirs[0, len(tokens) :].tolist()
    # As far from the beginning as this answer has a token for the first time.
    place = max(theirs.index(token) for token in theirs)
    assert place > 0
    for name in ("config.json", "generation_config.json"):
        tiny.edit_json(model / name, eos_token_id=theirs[place])
    runnable = MappedModel(tiny.cut(model, tmp_path / "after", 16384)).runnable
    text, last = text_of(answer(runnable, prompt, Parameters(max_tokens=40)))
    assert last.finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == place + 1
    assert text == runnable.tokenizer.decode(theirs[:place])


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-40, 1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 3}], ids=str)
def test_next_to_no_temperature_is_the_likeliest_token(temperature: float, more: dict[str, Any]) -> None:
    parameters = Parameters(temperature=temperature, seed=1, **more)
    parameters.check()
    logits = torch.randn(448, generator=torch.Generator().manual_seed(3)) * 10
    assert Sampler(parameters).next(logits) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_a_refusal(temperature: float, value: float) -> None:
    with pytest.raises(Refused, match="numbers that are none"):
        Sampler(Parameters(temperature=temperature)).next(torch.full((448,), value))


def text_of(chunks: Iterator[Chunk]) -> tuple[str, Chunk]:
    parts = list(chunks)
    return "".join(part.text for part in parts), parts[-1]


def test_stop_strings_end_the_answer(loaded: MappedModel) -> None:
    whole, last = text_of(answer(loaded.runnable, "The capital", Parameters(max_tokens=40)))
    stop = whole[5:8]
    text, stopped = text_of(answer(loaded.runnable, "The capital", Parameters(max_tokens=40, stop=(stop,))))
    assert text == whole[: whole.find(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.usage is not None
    assert last.usage is not None
    assert stopped.usage.completion_tokens <= last.usage.completion_tokens


def test_the_context_ends_the_answer(loaded: MappedModel) -> None:
    prompt = "The capital of France is Paris. " * 45
    size = len(loaded.runnable.tokenizer.prompt(prompt))
    assert 400 < size < tiny.CONTEXT
    text_of(answer(loaded.runnable, prompt, Parameters(max_tokens=1)))
    _, last = text_of(answer(loaded.runnable, prompt, Parameters(max_tokens=1000, temperature=1.0, seed=3)))
    assert last.usage is not None
    assert last.usage.total_tokens <= tiny.CONTEXT


def test_the_same_seed_the_same_answer(loaded: MappedModel) -> None:
    def drawn(seed: int | None) -> str:
        parameters = Parameters(max_tokens=30, temperature=1.5, top_p=0.95, seed=seed)
        return text_of(answer(loaded.runnable, "The capital", parameters))[0]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(5)}) > 1
    assert len({drawn(None) for _ in range(5)}) > 1


@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 3, 300])
def test_draws_follow_the_distribution(top_p: float, top_k: int, min_p: float) -> None:
    size = 600
    logits = torch.randn(size, generator=torch.Generator().manual_seed(5)) * 3
    temperature = 0.8
    kept = torch.softmax(logits / temperature, 0)
    order = kept.argsort(descending=True)
    if top_k:
        kept[order[top_k:]] = 0
    kept /= kept.sum()
    before = kept[order].cumsum(0) - kept[order]
    kept[order[before >= top_p]] = 0
    kept[kept < min_p * kept.max()] = 0
    kept /= kept.sum()
    sampler = Sampler(Parameters(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=7))
    count = 3000
    drawn = Counter(sampler.next(logits) for _ in range(count))
    assert all(kept[token] > 0 for token in drawn)
    for token, expected in enumerate(kept.tolist()):
        slack = 5 * (expected * (1 - expected) / count) ** 0.5 + 1e-3
        assert abs(drawn[token] / count - expected) < slack


def test_a_flat_distribution_is_drawn_from_in_full() -> None:
    # Wider than what is sorted at first: the nucleus must not be cut there.
    logits = torch.zeros(2000)
    sampler = Sampler(Parameters(temperature=1.0, top_p=0.99, seed=1))
    assert len({sampler.next(logits) for _ in range(3000)}) > 1200
