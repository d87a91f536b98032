"""The engine process without a process: its loop a step at a time, its replies read from the other end."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from node.inference.frames import HEADER, Begun, Cancel, Delta, Generate, Load, Reply, body_size, decode_reply
from node.inference.process import EngineProcess
from node.inference.spec import ModelSpec, Parameters

from . import tiny

LONG = "The capital of France, the capital of Norway, and all the others. " * 4
ONE = Parameters(max_tokens=1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    root = tmp_path_factory.mktemp("process")
    return tiny.cut(tiny.save(root / "model", "llama", eos_token_id=None), root / "shards", 16384)


class Loop:
    """An engine process with the tiny model, driven by hand."""

    def __init__(self, spec: ModelSpec, connection: socket.socket, other_end: socket.socket) -> None:
        self.process = EngineProcess(connection, 1 << 30)
        self._other_end = other_end
        self._key = spec.key
        self.process._act(Load(0, spec))
        self.turn()
        self.said()

    def ask(self, number: int, prompt: str, account: str, weight: int = 1, parameters: Parameters = ONE) -> None:
        self.process._act(Generate(number, self._key, prompt, parameters, account, weight))

    def turn(self) -> None:
        """Once round."""
        self.process._turn()

    def said(self) -> list[Reply]:
        found = []
        while select.select([self._other_end], [], [], 0)[0]:
            header = self._other_end.recv(HEADER.size, socket.MSG_WAITALL)
            found.append(decode_reply(self._other_end.recv(body_size(header), socket.MSG_WAITALL)))
        return found


@pytest.fixture
def loop(spec: ModelSpec) -> Iterator[Loop]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Loop(spec, theirs, ours)


def test_a_short_prompt_is_read_before_the_long_ones_of_another_account(loop: Loop) -> None:
    for number in range(1, 6):
        loop.ask(number, LONG, "many")
    loop.ask(6, "hello", "once")
    loop.turn()
    replies = loop.said()
    assert {reply.request for reply in replies if isinstance(reply, Begun)} == {1, 2, 3, 4, 5, 6}
    loop.turn()
    replies += loop.said()
    while loop.process._running:
        loop.turn()
        replies += loop.said()
    assert [reply.request for reply in replies if isinstance(reply, Delta)] == [6, 1, 2, 3, 4, 5]


def test_places_go_to_accounts_by_weight(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.inference.process.ANSWERS_MAX", 1)
    for number in range(1, 13):
        loop.ask(number, "hello", "low", 1, Parameters(max_tokens=12))
        loop.ask(100 + number, "hello", "high", 3, Parameters(max_tokens=12))
    begun: list[int] = []
    while len(begun) < 12:
        loop.turn()
        begun += [reply.request for reply in loop.said() if isinstance(reply, Begun)]
    assert sum(number > 100 for number in begun) == 9
    assert [n for n in begun if n < 100] == [1, 2, 3]


def test_an_answer_counts_by_its_tokens(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.inference.process.ANSWERS_MAX", 1)
    for number in range(1, 9):
        loop.ask(number, "hello", "long", parameters=Parameters(max_tokens=60))
        loop.ask(100 + number, "hello", "short", parameters=Parameters(max_tokens=12))
    begun: list[int] = []
    while len(begun) < 6:
        loop.turn()
        begun += [reply.request for reply in loop.said() if isinstance(reply, Begun)]
    assert begun == [1, 101, 102, 103, 104, 105]


def test_what_is_told_of_tokens_is_what_the_usage_says(loop: Loop) -> None:
    loop.ask(1, LONG, "a", parameters=Parameters(max_tokens=20))
    replies: list[Reply] = []
    while not (replies and isinstance(replies[-1], Delta) and replies[-1].chunk.usage):
        loop.turn()
        replies += loop.said()
    begun, deltas = replies[0], [reply for reply in replies if isinstance(reply, Delta)]
    usage = deltas[-1].chunk.usage
    assert isinstance(begun, Begun)
    assert usage is not None
    assert begun.tokens == usage.prompt_tokens
    assert deltas[-1].tokens == usage.total_tokens
    assert [delta.tokens for delta in deltas] == sorted({delta.tokens for delta in deltas})


def test_a_prompt_that_nobody_waits_for_is_not_read_on(loop: Loop) -> None:
    loop.ask(1, LONG, "once")
    loop.turn()
    assert loop.process._reading is not None, "a layer a turn while nobody else is answered"
    loop.process._act(Cancel(1))
    assert loop.process._reading is None
    assert loop.process._is_idle()


def test_whose_turn_has_come_hears_so_before_the_prompt_is_read(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Reply] = []
    monkeypatch.setattr(loop.process, "_read_prompts", lambda: heard.extend(loop.said()))
    loop.ask(1, LONG, "once")
    loop.turn()
    assert [type(reply) for reply in heard] == [Begun]
