"""What a person sees while a run goes on: one live line, and lines that stay."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """The console of the main process; silent on the others. On a terminal the last line is live.

    `alive` is told of each advance, on every process.
    """

    PLAIN_LINE_SECONDS = 10.0  # where nothing can be live, a line as often as this

    def __init__(self, shown: bool = True, alive: Callable[[], None] = lambda: None):
        self.alive = alive
        self.console = Console(quiet=not shown, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._plain_at = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end_work()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False)  # what rows and files say is no markup

    def begin_work(self, what: str, total: int | None, done: int = 0) -> None:
        """Start a live line that counts up to `total`."""
        self.end_work()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}" + ("/{task.total}" if total is not None else "")),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(what, total=total, completed=done, facts="")
        self._progress.start()
        self._plain_at = time.monotonic()

    def advance(self, count: int = 1, facts: str = "") -> None:
        """Move the live line on; where the console is no terminal, print a plain one now and then."""
        self.alive()
        if self._progress is None or self._task is None:
            return
        self._progress.update(self._task, advance=count, facts=facts)
        if not self.console.is_terminal and time.monotonic() - self._plain_at >= self.PLAIN_LINE_SECONDS:
            task = self._progress.tasks[0]
            self.say(f"{task.description} {task.completed:.0f}/{task.total or '?'}  {facts}")
            self._plain_at = time.monotonic()

    def end_work(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


def duration(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
