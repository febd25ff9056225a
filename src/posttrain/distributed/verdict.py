"""What every process of a run that hangs was doing, and which of them holds up the others."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

COLLECTIVES = "/torch/distributed/"  # a main thread in there waits for other processes
WATCHERS = "watchdog"  # how the names of threads begin that only watch


@dataclass(frozen=True)
class Place:
    """What a process began last. `order` counts what it began before in this step, alike on every process."""

    step: int = 0  # the one being made, from 1; 0 before the first
    phase: str = "starting"
    part: str = ""
    order: int = 0

    def __str__(self) -> str:
        step = f"step {self.step}" if self.step else "before the first step"
        return ", ".join(filter(None, (step, self.phase, self.part)))


@dataclass(frozen=True)
class Report:
    """What a process says of itself when the run hangs."""

    place: Place
    quiet_seconds: float  # since its last sign of progress
    line: str  # that its main thread is in
    waits: bool  # for other processes, as far as its stack tells
    stacks: str


def own_report(place: Place, quiet_seconds: float) -> Report:
    """Of this process, from any of its threads."""
    frames, main = sys._current_frames(), threading.main_thread()
    frame = frames[main.ident or 0]
    others = [
        t for t in threading.enumerate() if t is not main and t.ident in frames and not t.name.startswith(WATCHERS)
    ]
    stacks = [_stack(main, frame), *(_stack(thread, frames[thread.ident or 0]) for thread in others)]
    line = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    return Report(place, quiet_seconds, line, COLLECTIVES in frame.f_code.co_filename, "\n".join(stacks))


def blamed(reports: Mapping[int, Report | None]) -> list[int]:
    """The ranks that the others wait for: those that do not answer, else those that are behind, else those that do not wait.

    Empty where they cannot be told apart.
    """
    told = {rank: report for rank, report in reports.items() if report is not None}
    if len(told) < len(reports):
        return [rank for rank in reports if rank not in told]
    progress = {rank: (report.place.step, report.place.order) for rank, report in told.items()}
    behind = [rank for rank in told if progress[rank] == min(progress.values())]
    if len(behind) < len(told) or len(told) == 1:
        return behind
    busy = [rank for rank, report in told.items() if not report.waits]
    return busy if len(busy) < len(told) else []


def verdict(reports: Mapping[int, Report | None], last_seen: Mapping[int, Place]) -> list[str]:
    """Sentences: who holds up the run and where, then where the others wait."""
    guilty, lines = blamed(reports), []
    for rank in guilty:
        report = reports[rank]
        if report is None:
            seen = f" It was last seen at {last_seen[rank]}." if rank in last_seen else ""
            lines.append(f"rank {rank} does not answer: its process is stopped or lost, or its machine is.{seen}")
        else:
            what = "is at" if len(reports) == 1 else "holds up the others: it is at"
            lines.append(f"rank {rank} {what} {report.place}, for {report.quiet_seconds:.0f} s, in {report.line}")
    if not guilty:
        lines.append(
            "No rank is behind the others: a device, or the connection between the processes, does not answer."
        )
    waiting: dict[str, list[int]] = {}
    for rank, report in reports.items():
        if report is not None and rank not in guilty:
            waiting.setdefault(f"{report.place}, in {report.line}", []).append(rank)
    lines += [f"{_named(ranks)} at {place}" for place, ranks in waiting.items()]
    return lines


def all_stacks(reports: Mapping[int, Report | None]) -> str:
    """Every thread of every process that answered."""
    parts = []
    for rank, report in reports.items():
        place = f"{report.place}, for {report.quiet_seconds:.0f} s" if report else "does not answer"
        parts.append(f"=== rank {rank}: {place}\n\n{report.stacks if report else ''}")
    return "\n".join(parts)


def _named(ranks: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> `ranks 0, 2-4 wait`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text} waits" if len(ranks) == 1 else f"ranks {text} wait"


def _stack(thread: threading.Thread, frame: FrameType) -> str:
    return f"thread {thread.name}\n{''.join(traceback.format_stack(frame))}"
