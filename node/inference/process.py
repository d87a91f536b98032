"""The engine process, `python -m node.inference.process`: reads commands, works on answers in turns and sends chunks.

Owns the turns: one token (or one layer of a prompt) for each answer under way, round and round. Ends with the node:
when the socket closes, or when the kernel says that the thread that started it is gone. Knows no cache policy.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from contracts.errors import Busy, NotFound, Refused
from node.inference.frames import (
    HEADER,
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
    Unload,
    Unloaded,
    body_size,
    decode_command,
    encode,
    failed,
)
from node.inference.generation import answer
from node.inference.loading import MappedModel, measured, prepared
from node.inference.spec import Chunk, LoadStep

ANSWERS_MAX = 8
"""Answers that take turns; more wait for a place, so that each keeps some speed and key/value memory stays bounded."""

QUEUE_MAX = 256
"""Answers that wait for a place."""

NEWS_INTERVAL_S = 0.25
"""How often the node is told how far a load is."""

_PR_SET_PDEATHSIG = 1


@dataclass
class _Running:
    request: int
    key: str
    chunks: Iterator[Chunk | None]


@dataclass
class _Preparing:
    """A load that has work to do before the model can be mapped."""

    command: Load
    steps: Generator[LoadStep, None, None]
    told_at: float = 0.0


class EngineProcess:
    """The loop. Everything but reading the socket happens in one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._models: dict[str, MappedModel] = {}
        self._preparing: dict[str, _Preparing] = {}
        self._running: deque[_Running] = deque()
        self._waiting: deque[Generate] = deque()

    def run(self) -> None:
        """Work until the node is gone."""
        self._say(Hello(os.getpid(), torch.get_num_threads(), str(torch.__version__)))
        threading.Thread(target=self._read, name="commands", daemon=True).start()
        while True:
            while self._is_idle() or not self._commands.empty():
                self._act(self._commands.get())
            self._admit()
            self._turn()
            self._prepare()

    def _is_idle(self) -> bool:
        return not self._running and not self._waiting and not self._preparing

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
        try:
            self._connection.sendall(encode(reply))
        except ConnectionError:
            os._exit(0)

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
                case Generate(request, key):
                    if key not in self._models:
                        raise NotFound(f"{key} is not loaded any more; load it again")
                    if len(self._waiting) >= QUEUE_MAX:
                        raise Busy(f"{QUEUE_MAX} answers wait already; try again later")
                    self._waiting.append(command)
                case Cancel(request):
                    self._cancel(request)
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
        for running in [running for running in self._running if running.key == key]:
            self._end(running, NotFound(f"{key} was unloaded"))
        for command in [command for command in self._waiting if command.key == key]:
            self._waiting.remove(command)
            self._say(failed(command.request, NotFound(f"{key} was unloaded")))
        model = self._models.pop(key, None)
        return model.close() if model is not None else 0

    def _cancel(self, request: int) -> None:
        for running in [running for running in self._running if running.request == request]:
            self._end(running, None)
        self._waiting = deque(command for command in self._waiting if command.request != request)

    def _end(self, running: _Running, error: Refused | None) -> None:
        self._running.remove(running)
        running.chunks = iter(())
        if error is not None:
            self._say(failed(running.request, error))

    def _admit(self) -> None:
        while self._waiting and len(self._running) < ANSWERS_MAX:
            command = self._waiting.popleft()
            chunks = answer(self._models[command.key].runnable, command.prompt, command.parameters)
            self._running.append(_Running(command.request, command.key, chunks))

    def _turn(self) -> None:
        """One step of each answer under way."""
        for running in tuple(self._running):
            try:
                chunk = next(running.chunks)
            except Refused as error:
                self._end(running, error)
                continue
            except (MemoryError, RuntimeError) as error:
                # torch says RuntimeError when it cannot allocate; anything else it means is a bug, and crashes.
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                self._end(running, Busy("the machine is out of memory for this answer; try a shorter one or later"))
                continue
            if chunk is not None:
                self._say(Delta(running.request, chunk))
                if chunk.finish_reason is not None:
                    self._end(running, None)


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that started it, should the socket fail to say so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """`python -m node.inference.process FILE_DESCRIPTOR THREADS`."""
    die_with_parent()
    descriptor, threads = int(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C in a terminal reaches the whole group; the node ends this process in its own order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    EngineProcess(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main()
