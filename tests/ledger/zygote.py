"""A process with everything imported and no thread, which forks a child for each job.

Tests that kill, damage and starve a ledger a few hundred times pay for the imports once.

It never opens a LevelDB itself: a fork would leave the child without LevelDB's background thread.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Tell = Callable[[object], None]
"""What a job says to the test, a JSON value at a time; it has arrived when this returns, even if the job is killed."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit status (negative: the signal), what it told, and what it wrote to stderr."""

    status: int
    told: list[Any]
    stderr: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def result(self) -> Any:
        """The only thing told by a job that ended well."""
        assert self.status == 0, self.stderr
        (value,) = self.told
        return value


class Zygote:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, job: Callable[..., None], *arguments: object, kill_after: int = 0, kill_delay_s: float = 0.0
    ) -> Ended:
        """Run `job(tell, *arguments)` in a child of its own. With `kill_after` it is killed `kill_delay_s` after it
        told so much."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [job.__module__, job.__qualname__, list(arguments), kill_after, kill_delay_s]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the zygote has died"
        return Ended(*json.loads(answer))


@contextmanager
def zygote(environment: Mapping[str, str] | None = None) -> Iterator[Zygote]:
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Zygote(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


# In the zygote


def _fork(job: Callable[..., None], arguments: list[Any], kill_after: int, kill_delay_s: float) -> Ended:
    said, says = os.pipe()
    wrong, writes_wrong = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writes_wrong, 2)
        _work(job, arguments, says)
    os.close(says)
    os.close(writes_wrong)
    told: list[Any] = []
    with os.fdopen(said) as lines, os.fdopen(wrong) as errors:
        for line in lines:
            if line.endswith("\n"):
                told.append(json.loads(line))
            if len(told) == kill_after and not kill_delay_s:
                os.kill(child, signal.SIGKILL)
            elif len(told) == kill_after:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, kill_delay_s)
        stderr = errors.read()
    signal.setitimer(signal.ITIMER_REAL, 0)
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), told, stderr[-4000:])


def _work(job: Callable[..., None], arguments: list[Any], says: int) -> None:
    status = 1
    try:
        job(lambda value: os.write(says, f"{json.dumps(value)}\n".encode()), *arguments)
        status = 0
    except BaseException:  # noqa: BLE001 - the child must not go on as a second zygote, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    for module in ("tests.ledger.damage", "tests.ledger.starved"):
        importlib.import_module(module)
    for line in sys.stdin:
        module, name, *how = json.loads(line)
        ended = _fork(getattr(importlib.import_module(module), name), *how)
        print(json.dumps([ended.status, ended.told, ended.stderr]), flush=True)


if __name__ == "__main__":
    _serve()
