"""The memory of conversations: what fits, who waits, and what is kept for prompts that begin the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import NoSpace
from node.inference.memory import SHARED_TOKENS_MIN, AnswerMemory, KeyValues, Shape

SHAPE = Shape(layers=2, heads=4, key_value_heads=2, head_size=8, context_length=1000)
LONG = list(range(100, 100 + 3 * SHARED_TOKENS_MIN))


def memory_of(tokens: int) -> AnswerMemory:
    return AnswerMemory(SHAPE.token_bytes * tokens)


def fed(memory: KeyValues, tokens: list[int]) -> list[int]:
    """As if a decoder had been fed; each token leaves its own number."""
    for token in tokens[memory.length :]:
        memory.keys[:, :, memory.length] = float(token)
        memory.values[:, :, memory.length] = -float(token)
        memory.length += 1
    return tokens


def taken(answers: AnswerMemory, tokens: list[int], tokens_max: int = 100, key: str = "m@1") -> KeyValues:
    memory = answers.take(key, "a", SHAPE, tokens, tokens_max)
    assert memory is not None
    return memory


def test_the_bytes_of_a_token_are_what_is_allocated() -> None:
    assert KeyValues(SHAPE, 10).size_bytes == 10 * SHAPE.token_bytes


def test_what_does_not_fit_now_waits_and_what_never_fits_is_refused_with_the_numbers() -> None:
    answers = memory_of(150)
    first = taken(answers, [1])
    assert answers.take("m@1", "a", SHAPE, [2], 51) is None
    taken(answers, [2], 50)
    with pytest.raises(NoSpace, match=rf"151 tokens .* {151 * SHAPE.token_bytes} bytes .* at most 150 tokens"):
        answers.check(SHAPE, 151)
    answers.give_back("m@1", "a", fed(first, [1]), first)
    assert answers.take("m@1", "a", SHAPE, [3], 100) is not None


def test_a_prompt_that_begins_as_an_earlier_conversation_has_that_part_at_hand() -> None:
    answers = memory_of(1000)
    first = taken(answers, LONG)
    fed(first, [*LONG, 7, 8])
    answers.give_back("m@1", "a", LONG, first)
    assert answers.kept_bytes == len(LONG) * SHAPE.token_bytes, "the prompt alone"
    again = taken(answers, [*LONG, 9])
    assert again.length == len(LONG)
    for layer in range(SHAPE.layers):
        assert torch.equal(again.keys[layer, :, : len(LONG)], first.keys[layer, :, : len(LONG)])
        assert torch.equal(again.values[layer, :, : len(LONG)], first.values[layer, :, : len(LONG)])
    assert taken(answers, LONG).length == len(LONG) - 1, "the last token is fed, or there were no logits to go on from"
    assert taken(answers, LONG[:SHARED_TOKENS_MIN]).length == 0, "too little to be worth it"
    assert taken(answers, LONG, key="other@1").length == 0
    answers.forget("m@1")
    assert taken(answers, [*LONG, 9]).length == 0


def test_the_longest_beginning_is_taken_and_a_conversation_that_goes_on_replaces_its_beginning() -> None:
    answers = memory_of(1000)
    for tokens in (LONG, [*LONG, 1, 2], [*LONG, 3]):
        memory = taken(answers, tokens)
        answers.give_back("m@1", "a", fed(memory, tokens), memory)
    assert answers.kept_bytes == (2 * len(LONG) + 3) * SHAPE.token_bytes
    assert taken(answers, [*LONG, 1, 2, 5]).length == len(LONG) + 2


def test_what_is_kept_goes_first_the_longest_unused_first() -> None:
    answers = memory_of(200)
    conversations = [[start, *LONG] for start in (1, 2, 3)]
    for tokens in conversations:
        memory = taken(answers, tokens, len(tokens))
        answers.give_back("m@1", "a", fed(memory, tokens), memory)
    memory = taken(answers, conversations[0], len(conversations[0]))
    answers.give_back("m@1", "a", fed(memory, conversations[0]), memory)
    # Room for two of them beside this one.
    running = taken(answers, [4], 200 - 2 * len(conversations[0]))
    found = [answers._longest(("m@1", "a"), [*tokens, 0])[1] for tokens in conversations]
    assert found == [len(LONG) + 1, SHARED_TOKENS_MIN - 1, len(LONG) + 1]
    answers.give_back("m@1", "a", fed(running, [4]), running)


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 100)),
        max_size=30,
    )
)
def test_it_never_holds_more_than_it_may_and_never_other_tokens(steps: list[tuple[bool, list[int], int]]) -> None:
    answers = memory_of(150)
    running: list[tuple[list[int], KeyValues]] = []
    for ends, prompt, more in steps:
        if ends and running:
            tokens, memory = running.pop(0)
            answers.give_back("m@1", "a", fed(memory, tokens), memory)
        else:
            begun = answers.take("m@1", "a", SHAPE, prompt, min(150, len(prompt) + more))
            if begun is not None:
                assert begun.length < len(prompt)
                running.append((prompt, begun))
        assert answers.used_bytes == sum(memory.size_bytes for _, memory in running)
        assert answers.used_bytes + answers.kept_bytes <= answers.bytes_max
        for said, memory in running:
            held = memory.keys[1, 0, : memory.length, 0].tolist()
            assert held == [float(token) for token in said[: memory.length]]


def test_what_others_said_is_not_known() -> None:
    """How many tokens were, or how soon an answer comes, would tell it word by word."""
    answers = memory_of(1000)
    first = answers.take("m@1", "alice", SHAPE, LONG, len(LONG) + 1)
    assert first is not None
    answers.give_back("m@1", "alice", fed(first, LONG), first)
    for account, length in (("mallory", 0), ("alice", len(LONG) - 1)):
        again = answers.take("m@1", account, SHAPE, LONG, len(LONG) + 1)
        assert again is not None
        assert again.length == length
