"""The engine process, `python -m node.inference`: reads commands, works on answers together and sends chunks.

Owns the steps: one token of each answer under way goes through its model together with the others', and a new one joins
at the next step. Prompts are read in between, part by part, for as long as a step takes. Whose answer begins next, and
whose prompt is read next, is fair among accounts (`queueing`). Ends with the node: when the socket closes, or when the
kernel says that the thread that started it is gone. Knows no cache policy.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch

from contracts.errors import Busy, NotFound, Refused
from node.inference.decoder import ROWS_MAX
from node.inference.frames import (
    HEADER,
    Begun,
    Cancel,
    Command,
    Delta,
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
    decode_command,
    encode,
    failed,
)
from node.inference.generation import Answering
from node.inference.loading import MappedModel, measured, prepared
from node.inference.memory import AnswerMemory
from node.inference.queueing import FairQueue
from node.inference.spec import Chunk, LoadStep, joined_chunk

ANSWERS_MAX = 16
"""Answers under way; more wait for a place, so that each keeps some speed and key/value memory stays bounded."""

QUEUE_MAX = 256
"""Answers that wait for a place."""

NEWS_INTERVAL_S = 0.25
"""How often the node is told how far a load is."""

TOLD_INTERVAL_S = 0.02
"""Chunks of an answer that come faster go to the node together: it would need the cores that the next step is on."""

NO_MEMORY = "the machine is out of memory for this answer; try a shorter one or later"

_PR_SET_PDEATHSIG = 1


@dataclass(eq=False)
class _Request:
    number: int
    key: str
    account: str
    answering: Answering
    untold: list[Chunk] = field(default_factory=list)
    told_at: float = 0.0


@dataclass(frozen=True)
class _Reading:
    """Prompts that go through a model together."""

    key: str
    requests: Sequence[_Request]
    turns: Generator[None, None, torch.Tensor]


@dataclass
class _Preparing:
    """A load that has work to do before the model can be mapped."""

    command: Load
    steps: Generator[LoadStep, None, None]
    told_at: float = 0.0


class EngineProcess:
    """The loop. Everything but reading the socket happens in one thread."""

    def __init__(self, connection: socket.socket, answers_bytes: int) -> None:
        """`answers_bytes` bound the memory of all conversations."""
        self._memory = AnswerMemory(answers_bytes)
        self._connection = connection
        self._unsent = bytearray()
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._models: dict[str, MappedModel] = {}
        self._preparing: dict[str, _Preparing] = {}
        self._running: list[_Request] = []
        self._reading: _Reading | None = None
        self._resizing: int | None = None
        """Who waits until conversations take no more than they may."""
        self._step_s = 0.0
        """How long the last steps of all models took."""
        self._queue: FairQueue[_Request] = FairQueue()

    def run(self) -> None:
        """Work until the node is gone."""
        self._say(Hello(os.getpid(), torch.get_num_threads(), str(torch.__version__)))
        threading.Thread(target=self._read, name="commands", daemon=True).start()
        while True:
            while self._is_idle() or not self._commands.empty():
                self._send()
                self._act(self._commands.get())
            self._turn()

    def _turn(self) -> None:
        """Once round, for everything under way."""
        self._admit()
        self._send()  # whose turn has come counts as used from then on, even if the asker leaves during a long layer
        self._read_prompts()
        began = time.monotonic()
        for key in dict.fromkeys(running.key for running in self._running):
            self._step(key)
        self._step_s = time.monotonic() - began
        self._prepare()
        self._send()

    def _is_idle(self) -> bool:
        return not self._running and not self._queue and not self._preparing

    def _read(self) -> None:
        """Put commands in line; the end of the socket is the end of the node, and of this process at once."""
        while True:
            header = self._receive(HEADER.size)
            self._commands.put(decode_command(self._receive(body_size(header))))

    def _receive(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._connection.recv(size - len(parts))
            except ConnectionError:
                part = b""
            if not part:
                # Not sys.exit: torch may be in the middle of a product that nobody wants any more.
                os._exit(0)
            parts += part
        return bytes(parts)

    def _say(self, reply: Reply) -> None:
        self._unsent += encode(reply)

    def _send(self) -> None:
        """All that was said since the last time."""
        try:
            self._connection.sendall(self._unsent)
        except ConnectionError:
            os._exit(0)
        self._unsent.clear()

    def _act(self, command: Command) -> None:
        try:
            match command:
                case Measure(request, spec):
                    self._say(Measured(request, measured(spec)))
                case Load(_, spec, precision):
                    assert spec.key not in self._models, f"{spec.key} is loaded already"
                    assert spec.key not in self._preparing, f"{spec.key} is being loaded already"
                    self._preparing[spec.key] = _Preparing(command, prepared(spec, precision))
                case Unload(request, key):
                    self._say(Unloaded(request, self._unload(key)))
                case Generate(request, key, prompt, parameters, account, weight):
                    if key not in self._models:
                        raise NotFound(f"{key} is not loaded any more; load it again")
                    if len(self._queue) >= QUEUE_MAX:
                        raise Busy(f"{QUEUE_MAX} answers wait already; try again later")
                    answering = Answering(self._models[key].runnable, prompt, parameters)
                    self._memory.check(answering.shape, answering.tokens_max)
                    self._queue.put(account, weight, _Request(request, key, account, answering))
                case Cancel(request):
                    self._cancel(request)
                case Resize(request, answers_bytes):
                    self._memory.resize(answers_bytes)
                    self._resizing = request
                    self._say_resized()
        except Refused as error:
            self._say(failed(command.request, error))
        except MemoryError:
            self._say(failed(command.request, Busy("the machine is out of memory; unload a model or try again later")))

    def _prepare(self) -> None:
        """One step of each load under way; the model is there when there is nothing left to do."""
        for key, load in tuple(self._preparing.items()):
            request, spec = load.command.request, load.command.spec
            try:
                step = next(load.steps, None)
                if step is None:
                    del self._preparing[key]
                    model = self._models[key] = MappedModel(spec, load.command.precision)
                    self._say(Loaded(request, model.about))
                elif time.monotonic() - load.told_at >= NEWS_INTERVAL_S:
                    load.told_at = time.monotonic()
                    self._say(Loading(request, step))
            except Refused as error:
                self._preparing.pop(key, None)
                self._say(failed(request, error))
            except MemoryError:
                self._preparing.pop(key, None)
                self._say(failed(request, Busy("the machine is out of memory; unload a model or try again later")))

    def _unload(self, key: str) -> int:
        """Answers of the model end with it; of a load under way nothing is left."""
        if preparing := self._preparing.pop(key, None):
            preparing.steps.close()
        if self._reading is not None and self._reading.key == key:
            self._reading = None
        self._end_all(key)
        self._memory.forget(key)
        model = self._models.pop(key, None)
        return model.close() if model is not None else 0

    def _end_all(self, key: str) -> None:
        """On its own, because its variables would keep the model's memory."""
        for running in [running for running in self._running if running.key == key]:
            self._end(running, NotFound(f"{key} was unloaded"))
        for waiting in self._queue.remove(lambda waiting: waiting.key == key):
            self._say(failed(waiting.number, NotFound(f"{key} was unloaded")))

    def _cancel(self, request: int) -> None:
        for running in [running for running in self._running if running.number == request]:
            self._end(running, None)
        self._queue.remove(lambda waiting: waiting.number == request)

    def _end(self, running: _Request, error: Refused | None) -> None:
        self._running.remove(running)
        self._tell(running)
        if self._reading is not None and not any(other in self._running for other in self._reading.requests):
            self._reading = None
        self._queue.done(running.account)
        self._memory.give_back(running.key, running.account, running.answering.prompt, running.answering.memory)
        if all(other.key != running.key for other in self._running):
            self._models[running.key].runnable.decoder.rest()
        self._say_resized()
        if error is not None:
            self._say(failed(running.number, error))

    def _say_resized(self) -> None:
        if self._resizing is not None and self._memory.used_bytes <= self._memory.bytes_max:
            self._say(Resized(self._resizing))
            self._resizing = None

    def _admit(self) -> None:
        """Whoever is next has the next place, as soon as there is memory for it too."""
        while len(self._running) < ANSWERS_MAX and (first := self._queue.first()) is not None:
            answering = first.answering
            try:
                memory = self._memory.take(
                    first.key, first.account, answering.shape, answering.prompt, answering.tokens_max
                )
            except Refused as error:  # it came when there was more room
                self._refuse(first, error)
                continue
            except (MemoryError, RuntimeError) as error:
                _require_out_of_memory(error)
                self._refuse(first, Busy(NO_MEMORY))
                continue
            if memory is None:
                return
            answering.begin(memory)
            self._running.append(self._queue.take())
            # All of the prompt at once, so that it counts for who is next before it is read.
            self._queue.charge(first.account, len(answering.prompt) - memory.length)
            self._say(Begun(first.number, len(answering.prompt)))

    def _refuse(self, waiting: _Request, error: Refused) -> None:
        self._queue.remove(lambda other: other is waiting)
        self._say(failed(waiting.number, error))

    def _read_prompts(self) -> None:
        """Prompts layer by layer, for as long as a step takes: who is answered already waits for it."""
        began = time.monotonic()
        while self._reading is not None or self._begin_reading():
            assert self._reading is not None
            self._work(self._reading.requests, self._next_layer)
            if time.monotonic() - began > self._step_s:
                return

    def _begin_reading(self) -> bool:
        """As many prompts of one model as go through it together, beginning with the account that has had least."""
        requests: list[_Request] = []
        parts, room = [], ROWS_MAX
        for running in sorted(self._running, key=lambda running: self._queue.had(running.account)):
            if running.answering.is_reading and room and running.key == (requests or [running])[0].key:
                requests.append(running)
                parts.append(running.answering.next(room))
                room -= len(parts[-1].tokens)
        if requests:
            key = requests[0].key
            self._reading = _Reading(key, requests, self._models[key].runnable.decoder.feed(parts))
        return bool(requests)

    def _next_layer(self) -> torch.Tensor | None:
        """Of the prompts; the logits after the last."""
        assert self._reading is not None
        try:
            next(self._reading.turns)
        except StopIteration as end:
            self._reading = None
            logits: torch.Tensor = end.value
            return logits
        return None

    def _step(self, key: str) -> None:
        """One token of each answer of a model."""
        running = [one for one in self._running if one.key == key and not one.answering.is_reading]
        if running:
            decoder = self._models[key].runnable.decoder
            for one in running:
                self._queue.charge(one.account, 1)
            self._work(running, lambda: decoder.step([one.answering.next() for one in running]))

    def _work(self, requests: Sequence[_Request], work: Callable[[], torch.Tensor | None]) -> None:
        """Do what brings each of them logits, or nothing yet, and send what they come to."""
        try:
            with torch.inference_mode():
                logits = work()
                if logits is None:
                    return
                # Some may have ended while their prompt was read.
                under_way = [(one, row) for one, row in zip(requests, logits, strict=True) if one in self._running]
                taken = [(one, _taken(one, row)) for one, row in under_way]
        except (MemoryError, RuntimeError) as error:
            _require_out_of_memory(error)
            self._reading = None
            for one in [one for one in requests if one in self._running]:
                self._end(one, Busy(NO_MEMORY))
            return
        for one, chunk in taken:
            if isinstance(chunk, Refused):
                self._end(one, chunk)
            elif chunk is not None:
                one.untold.append(chunk)
                if chunk.finish_reason is not None:
                    self._end(one, None)
                elif time.monotonic() - one.told_at >= TOLD_INTERVAL_S:
                    self._tell(one)

    def _tell(self, one: _Request) -> None:
        """What an answer has come to since the last time."""
        if one.untold:
            # What was fed, and the token that was drawn last.
            self._say(Delta(one.number, joined_chunk(one.untold), one.answering.memory.length + 1))
            one.untold.clear()
            one.told_at = time.monotonic()


def _taken(request: _Request, logits: torch.Tensor) -> Chunk | Refused | None:
    """A refusal is this answer's alone."""
    try:
        return request.answering.take(logits)
    except Refused as error:
        return error


def _require_out_of_memory(error: MemoryError | RuntimeError) -> None:
    """torch says RuntimeError when it cannot allocate; anything else it means is a bug, and crashes."""
    if isinstance(error, RuntimeError) and "alloc" not in str(error):
        raise error


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that started it, should the socket fail to say so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """`python -m node.inference FILE_DESCRIPTOR THREADS ANSWERS_BYTES`."""
    die_with_parent()
    descriptor, threads, answers_bytes = map(int, sys.argv[1:4])
    # Ctrl-C in a terminal reaches the whole group; the node ends this process in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    EngineProcess(socket.socket(fileno=descriptor), answers_bytes).run()
