"""One life of the engine process, from the node's side: started, spoken with, ended.

Owns the process, the socket to it and who waits for which reply. Knows no cache policy and no restarts.
"""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import trio

from contracts.errors import Busy, Refused
from node import subprocesses
from node.inference.frames import (
    HEADER,
    Begun,
    Cancel,
    Command,
    Delta,
    Failed,
    Generate,
    Hello,
    Load,
    Loaded,
    Loading,
    Measure,
    Measured,
    Reply,
    Resize,
    Resized,
    Unload,
    Unloaded,
    body_size,
    decode_reply,
    encode,
    error_of,
)
from node.inference.spec import Chunk, Completion, LoadStep, joined_chunk

START_TIMEOUT_S = 180.0
"""Importing torch and transformers takes seconds on a warm machine, more on a cold and busy one."""

STALL_TIMEOUT_S = 900.0
"""An answer of which nothing comes for this long is given up: a long queue or prompt stays below it."""

COMMANDS_MAX = 1024
"""Commands on their way to the process at once; it reads them as they come, so few ever wait."""

GRACE_S = 5.0
"""What a dying process gets to be gone; a crash that writes a core dump takes a moment."""

ENDED = "the engine process ended ({reason}) while it worked on this; it starts again, try once more"


@dataclass
class Counted:
    """Tokens of all answers so far, over every life of the process."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answer:
    """An answer as it comes. Chunks a slow reader has not taken yet are joined, so nothing waits for it."""

    def __init__(self, counted: Counted) -> None:
        self.tokens = 0
        """Of the prompt and the answer so far; none while it waits."""
        self._counted = counted
        self._chunks: list[Chunk] = []
        self._error: Refused | None = None
        self._over = False
        self._news = trio.Event()

    def feed(self, chunk: Chunk, tokens: int) -> None:
        """The next chunk from the process, and how many tokens that makes."""
        self.tokens = tokens
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            assert chunk.usage is not None
            self._counted.prompt_tokens += chunk.usage.prompt_tokens
            self._counted.completion_tokens += chunk.usage.completion_tokens
        self._news.set()

    def fail(self, error: Refused) -> None:
        """There will be no more; the error follows what came before it."""
        self._error = error
        self._news.set()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Chunk:
        """What came since the last call, joined; raises what went wrong."""
        if self._over:
            raise StopAsyncIteration
        with trio.move_on_after(STALL_TIMEOUT_S) as scope:
            await self._news.wait()
        if scope.cancelled_caught:
            self._over = True
            raise Busy(f"nothing of the answer came for {STALL_TIMEOUT_S:.0f} s; try again later")
        self._news = trio.Event()
        joined = joined_chunk(self._chunks)
        self._chunks.clear()
        self._over = joined.finish_reason is not None
        if self._error is not None and not self._over:
            if joined.text:
                self._news.set()
                return joined
            self._over = True
            raise self._error
        return joined

    async def collect(self) -> Completion:
        """The whole answer."""
        return Completion.of([chunk async for chunk in self])


@dataclass
class _Waiting:
    """Somebody waits for the one reply to a command, and may hear how far it is."""

    done: trio.Event
    on_step: Callable[[LoadStep], None]
    reply: Measured | Loaded | Unloaded | Resized | None = None
    error: Refused | None = None


class Child:
    """Call `start`, then `serve` until it returns, then `end`, in one task; the rest from anywhere meanwhile."""

    def __init__(self, threads: int, answers_bytes: int) -> None:
        self._threads = threads
        self._answers_bytes = answers_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: trio.SocketStream | None = None
        self._answers: dict[int, Answer] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._commands_in, self._commands_out = trio.open_memory_channel[bytes](COMMANDS_MAX)
        self._ended: str | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    @property
    def answers_waiting(self) -> int:
        """Answers that are asked for and not begun."""
        return sum(not answer.tokens for answer in self._answers.values())

    async def start(self) -> None:
        """Start the process and hear it say hello."""
        ours, theirs = socket.socketpair()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with theirs:
            # In this thread on purpose: the kernel ends the child when the thread that started it is gone, and
            # trio's own way starts it in a worker thread that leaves after ten idle seconds.
            settings = (theirs.fileno(), self._threads, self._answers_bytes)
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-P", "-m", "node.inference", *map(str, settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_environment(self._threads),
            )
        with trio.move_on_after(START_TIMEOUT_S) as scope:
            reply = await self._receive()
        if scope.cancelled_caught:
            raise Busy(f"the engine process did not start within {START_TIMEOUT_S:.0f} s; is the machine overloaded?")
        if reply is None:
            raise Busy(f"the engine process did not start ({await self.end()}); its error output is in the node's log")
        assert isinstance(reply, Hello), reply

    async def serve(self) -> None:
        """Carry commands and replies until the process ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all)
            while (reply := await self._receive()) is not None:
                self._dispatch(reply)
            nursery.cancel_scope.cancel()

    async def end(self) -> str:
        """Kill and bury the process; everyone who waits hears of it. Returns how it ended, for a person to read."""
        if self._ended is not None:
            return self._ended
        assert self._process is not None
        assert self._stream is not None
        with trio.CancelScope(shield=True):
            if self._closed:
                # An end of its own shows as end of file a moment before the process can be waited for.
                await trio.to_thread.run_sync(_wait, self._process, GRACE_S)
            self._process.kill()
            await trio.to_thread.run_sync(self._process.wait)
            await self._stream.aclose()
        self._ended = subprocesses.ending(self._process.returncode)
        error = ENDED.format(reason=self._ended)
        for answer in self._answers.values():
            answer.fail(Busy(error))
        for waiting in self._waiting.values():
            waiting.error = Busy(error)
            waiting.done.set()
        self._answers.clear()
        self._waiting.clear()
        return self._ended

    def kill(self) -> None:
        """It hangs: end it; `serve` returns by itself then."""
        if self._process is not None:
            self._process.kill()

    def post(self, command: Command) -> None:
        """Send without waiting."""
        try:
            self._commands_in.send_nowait(encode(command))
        except trio.WouldBlock:
            raise Busy(f"{COMMANDS_MAX} commands wait for the engine process; try again later") from None

    async def ask(
        self, command: Measure | Load | Unload | Resize, on_step: Callable[[LoadStep], None] = lambda step: None
    ) -> Measured | Loaded | Unloaded | Resized:
        """Send and wait for the one reply; `on_step` is told of every step on the way to it."""
        if self._ended is not None:
            raise Busy(ENDED.format(reason=self._ended))
        waiting = self._waiting[command.request] = _Waiting(trio.Event(), on_step)
        try:
            self.post(command)
            await waiting.done.wait()
        finally:
            self._waiting.pop(command.request, None)
        if waiting.error is not None:
            raise waiting.error
        assert waiting.reply is not None
        return waiting.reply

    def open_answer(self, command: Generate, counted: Counted) -> Answer:
        """Ask for an answer; `close_answer` must follow."""
        self.post(command)
        answer = self._answers[command.request] = Answer(counted)
        return answer

    def close_answer(self, number: int) -> None:
        """Nobody reads it any more; the process stops working on it at its next token."""
        if self._answers.pop(number, None) is not None and self._ended is None:
            self.post(Cancel(number))

    def _dispatch(self, reply: Reply) -> None:
        match reply:
            case Begun(request, tokens):
                if answer := self._answers.get(request):
                    answer.tokens = tokens
            case Delta():
                self._feed(reply)
            case Loading(request, step):
                if waiting := self._waiting.get(request):
                    waiting.on_step(step)
            case Measured() | Loaded() | Unloaded() | Resized():
                if waiting := self._waiting.get(reply.request):
                    waiting.reply = reply
                    waiting.done.set()
            case Failed():
                if waiting := self._waiting.get(reply.request):
                    waiting.error = error_of(reply)
                    waiting.done.set()
                elif answer := self._answers.pop(reply.request, None):
                    answer.fail(error_of(reply))
            case Hello():
                raise AssertionError("a second hello")

    def _feed(self, delta: Delta) -> None:
        answer = self._answers.get(delta.request)
        if answer is not None:
            answer.feed(delta.chunk, delta.tokens)
            if delta.chunk.finish_reason is not None:
                del self._answers[delta.request]

    async def _send_all(self) -> None:
        assert self._stream is not None
        async for frame in self._commands_out:
            try:
                await self._stream.send_all(frame)
            except trio.BrokenResourceError:
                # The process is gone; the reader sees the end of file and tells everyone.
                await trio.sleep_forever()

    async def _receive(self) -> Reply | None:
        """The next reply, or None when the process is gone."""
        header = await self._receive_exactly(HEADER.size)
        if header is None:
            return None
        body = await self._receive_exactly(body_size(header))
        return None if body is None else decode_reply(body)

    async def _receive_exactly(self, size: int) -> bytes | None:
        assert self._stream is not None
        parts = bytearray()
        while len(parts) < size:
            try:
                part = await self._stream.receive_some(size - len(parts))
            except trio.BrokenResourceError:
                part = b""
            if not part:
                self._closed = True
                return None
            parts += part
        return bytes(parts)


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout_s)


def _environment(threads: int) -> dict[str, str]:
    """What the process sees: no way out to a hub."""
    environment = subprocesses.environment()
    environment["OMP_NUM_THREADS"] = str(threads)
    environment["HF_HUB_OFFLINE"] = "1"
    environment["TRANSFORMERS_OFFLINE"] = "1"
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment
