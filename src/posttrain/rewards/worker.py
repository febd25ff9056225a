"""The process in which rewards run that may hang or crash: it reads answers from one pipe and writes outcomes to another.

It imports neither torch nor the options. What a reward prints goes to stderr, which is not the pipe.
"""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from posttrain.errors import InputError
from posttrain.rewards.verdict import Outcome

READY = "ready"


def serve(reading: int, writing: int) -> None:
    """Load the rewards that come first, say `READY` or what is wrong, then answer until the other end is closed."""
    _die_first()
    questions: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_read, args=(Connection(reading, writable=False), questions), daemon=True).start()
    answers = Connection(writing, readable=False)
    try:
        rewards = [load() for load in questions.get()]
    except InputError as error:
        answers.send(str(error))
        return
    answers.send(READY)
    while True:
        number, answered = questions.get()
        try:
            outcome = rewards[number](answered)
        except Exception as error:  # of math-verify; a user's function answers for itself
            outcome = Outcome.unknown(f"it raised {type(error).__name__}: {error}"[:300])
        answers.send(outcome)


def _die_first() -> None:
    """Where memory runs out, Linux shall end this process and not the run."""
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        adjustment.write_text("1000")


def _read(connection: Connection, questions: SimpleQueue[Any]) -> None:
    """Read in a thread of its own, which sees the other end die while a reward hangs, and ends all that it started."""
    while True:
        try:
            questions.put(connection.recv())
        except (EOFError, OSError):
            os.killpg(0, signal.SIGKILL)
