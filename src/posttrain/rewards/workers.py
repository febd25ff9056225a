"""Processes that judge answers side by side, each of which can be killed: a hanging or crashing reward costs its answer alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from posttrain.errors import InputError, RunError
from posttrain.rewards.verdict import Answered, Outcome, Reward
from posttrain.rewards.worker import READY

Load = Callable[[], Reward]
Task = tuple[int, Answered]  # which of the rewards, and about what

START_SECONDS = 300.0  # a file of one's own may import torch from a slow disk
LOOK_SECONDS = 0.5  # a process can die and leave its pipe to a child


class Workers:
    """Up to `count` processes, started as they are needed; the first at once, to know that the rewards load.

    Raises InputError where they do not.
    """

    def __init__(self, loads: Sequence[Load], count: int, timeout_seconds: float):
        self._loads, self._count, self._timeout = loads, count, timeout_seconds
        self._processes: list[_Process] = [_Process(loads)]
        try:
            if problem := self._processes[0].start_problem():
                raise InputError(problem)
        except BaseException:
            self.close()
            raise

    def map(self, tasks: Sequence[Task], advance: Callable[[int], None]) -> list[Outcome]:
        """The outcome of each task, in order; `advance` hears of each that is done."""
        outcomes: dict[int, Outcome] = {}
        waiting = deque(enumerate(tasks))
        try:
            while len(outcomes) < len(tasks):
                self._hand_out(waiting)
                for process in self._heard_from():
                    number, outcome = self._take(process)
                    if outcome is not None:
                        outcomes[number] = outcome
                        advance(1)
        finally:
            for process in [process for process in self._processes if process.task is not None]:
                self._drop(process)  # its answer would come to the next call
        return [outcomes[number] for number in range(len(tasks))]

    def close(self) -> None:
        for process in list(self._processes):
            self._drop(process)

    def _hand_out(self, waiting: deque[tuple[int, Task]]) -> None:
        starting = sum(not process.is_ready for process in self._processes)
        idle = [process for process in self._processes if process.is_ready and process.task is None]
        for _ in range(min(self._count - len(self._processes), len(waiting) - len(idle) - starting)):
            self._processes.append(_Process(self._loads))
        for process in idle[: len(waiting)]:
            process.ask(*waiting.popleft(), self._timeout)

    def _heard_from(self) -> list[_Process]:
        """Processes that have answered, or died, or had their time; empty after a while without."""
        watched = [process for process in self._processes if process.task is not None or not process.is_ready]
        now = time.monotonic()
        patience = min([LOOK_SECONDS, *(max(0.0, process.deadline - now) for process in watched)])
        answered = wait([process.answers for process in watched], patience)
        now = time.monotonic()
        return [p for p in watched if p.answers in answered or p.deadline <= now or p.popen.poll() is not None]

    def _take(self, process: _Process) -> tuple[int, Outcome | None]:
        """The outcome of its task, if it had one. A process that died or hung is gone afterwards."""
        if not process.is_ready:
            if problem := process.start_problem():
                self._drop(process)
                raise RunError(f"Another process for rewards does not start: {problem}")
            return -1, None
        number, process.task = process.task or 0, None
        with suppress(EOFError, OSError):
            if process.answers.poll():
                return number, process.answers.recv()
        hung = process.popen.poll() is None and process.deadline <= time.monotonic()
        self._drop(process)
        problem = f"time limit of {self._timeout:g} s" if hung else process.ending()
        return number, Outcome.unknown(problem)

    def _drop(self, process: _Process) -> None:
        self._processes.remove(process)
        process.end()


class _Process:
    """One worker: `task` is the number of what it works on, `deadline` when it must have said something."""

    def __init__(self, loads: Sequence[Load]):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # not by multiprocessing, which would import the program's main file again
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from posttrain.rewards.worker import serve; serve({theirs_in}, {theirs_out})"
        )
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints would spoil --json
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,  # so that what it starts is ended with it, and Ctrl-C is ours to handle
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.questions, self.answers = Connection(ours_out, readable=False), Connection(ours_in, writable=False)
        self.is_ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._send(loads)

    def start_problem(self) -> str | None:
        """What keeps it from working; waits until it is known."""
        try:
            if not self.answers.poll(max(0.0, self.deadline - time.monotonic())):
                return f"loading the rewards took more than {START_SECONDS:g} s."
            said = self.answers.recv()
        except (EOFError, OSError):
            return f"while the rewards were loaded, {self.ending()}."
        self.is_ready = said == READY
        return None if self.is_ready else said

    def ask(self, number: int, task: Task, timeout_seconds: float) -> None:
        self.task, self.deadline = number, time.monotonic() + timeout_seconds
        self._send(task)

    def ending(self) -> str:
        """How it died, after its pipe closed."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(1.0)
        self.end()
        code = self.popen.returncode
        return (
            f"its process was ended by {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with exit code {code}"
        )

    def end(self) -> None:
        """Kill it with all that it started, and wait for it."""
        with suppress(ProcessLookupError, PermissionError):  # it is gone; macOS says the latter
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.questions.close()
        self.answers.close()

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it died, which is found when it is heard from
            self.questions.send(message)
