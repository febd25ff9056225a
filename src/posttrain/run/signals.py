"""SIGTERM and Ctrl-C ask a run to save and stop; a second one stops it at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_REQUEST_SECONDS = 3.0  # Slurm signals the launcher, which passes it on, and every worker besides


class StopRequest:
    """Which signal asked this process to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ONE_REQUEST_SECONDS:
            raise KeyboardInterrupt


@contextmanager
def catching_signals() -> Iterator[StopRequest]:
    """While inside, SIGTERM and Ctrl-C only set the request. Outside the main thread signals are left alone."""
    request = StopRequest()
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, request.receive)
    except ValueError:  # not the main thread
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
