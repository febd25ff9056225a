"""Finds a run that hangs, names the process that holds it up, and ends it: a blocked collective cannot be interrupted.

The main thread says what it begins; a thread beside it sees whether any process of the run still makes progress. The
processes tell each other so through a connection of their own to the run's TCPStore, whose keys are

    alarms   goes up when a process saw the run hang     last/<rank>    the place where a process was last
    beats    signs of life of all processes together     report/<rank>  what a process says of itself then
    speaker  who adds 1 first, speaks for all            said           there when it has spoken

All but the first stand under the number of alarms there were before: a launcher may keep the store when it starts workers again.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

from posttrain.distributed.verdict import WATCHERS, Place, Report, all_stacks, own_report, verdict
from posttrain.errors import InputError, LostContact, RunError
from posttrain.run.folder import RunFolder

FAILED = 3  # exit code of a run that failed
# Starting, the first step, saving and answering may be silent for so many timeouts: nobody can tell how far they are.
PATIENCE = 6
# A silence is too long only if it is so many times the longest one that a step of this run has shown.
TIMES_THE_LONGEST = 3
LONGEST_INTERVAL_SECONDS = 5.0
ANSWER_SECONDS = 5.0  # a process that has not answered the alarm by then does not answer
LEAVE_SECONDS = 1.0
POLL_SECONDS = 0.05


class Watchdog:
    """Knows what this process is doing. While it watches, it stops a run in which no process makes progress."""

    def __init__(self, timeout_seconds: float = 0.0, rank: int = 0, size: int = 1):
        self.timeout_seconds, self.rank, self.size = timeout_seconds, rank, size
        self.place = Place()
        self.folder: RunFolder | None = None  # of the run, where its last words are written
        self._patient = False
        self._num_steps = self._num_beats = self._num_beats_of_all = 0
        self._longest_silence = 0.0  # within a step
        self._interval = min(LONGEST_INTERVAL_SECONDS, timeout_seconds / 10)
        self._closing = threading.Event()
        self._alarm = False
        self._threads: list[threading.Thread] = []
        self._store: PrefixStore | None = None
        self._heard_at = 0.0  # when the store last answered

    def beat(self, phase: str | None = None, *, step: int | None = None, part: str = "", patient: bool = False) -> None:
        """Say what begins now: a phase (None: another part of the same one), in a new step where one is given.

        Every process must say the same things in the same order. `patient`: nobody can tell how far it is.
        """
        before = self.place
        self._num_steps += step is not None
        self._patient = patient if phase else self._patient
        at, order = (before.step, before.order + 1) if step is None else (step, 0)
        self.place = Place(at, phase or before.phase, part, order)
        self._num_beats += 1

    def alive(self) -> None:
        """Say that what began goes on."""
        self._num_beats += 1

    def start(self) -> None:
        self._threads = [threading.Thread(target=self._watch, name=WATCHERS, daemon=True)]
        if self.size > 1:
            self._threads.append(threading.Thread(target=self._exchange, name=f"{WATCHERS} exchange", daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * LONGEST_INTERVAL_SECONDS)

    def _watch(self) -> None:
        """Count the seconds without progress of any process; those in which this process did not run do not count."""
        silence, own_silence, seen, in_a_step, then = 0.0, 0.0, (0, 0), False, time.monotonic()
        while not self._closing.wait(self._interval):
            now = time.monotonic()
            passed, then = min(now - then, 2 * self._interval), now
            progress = (self._num_beats, self._num_beats_of_all)
            own_silence = own_silence + passed if progress[0] == seen[0] else 0.0
            if progress == seen:
                silence += passed
            else:
                if in_a_step:
                    self._longest_silence = max(self._longest_silence, silence)
                silence, seen = 0.0, progress
            in_a_step = self._num_steps > 0 and not self._patient
            if self._alarm or silence >= self._limit():
                self._end_the_run(own_silence)

    def _limit(self) -> float:
        usual = self.timeout_seconds * (PATIENCE if self._patient or self._num_steps < 2 else 1)
        return max(usual, TIMES_THE_LONGEST * self._longest_silence)

    def _exchange(self) -> None:
        """Tell the others of this process's beats and hear of theirs; ends where the store is gone."""
        told = 0
        try:
            store = self._store = self._connect()
            while not self._closing.wait(self._interval):
                count = self._num_beats
                self._num_beats_of_all, told = store.add("beats", count - told), count
                store.set(f"last/{self.rank}", json.dumps(asdict(self.place)))
                self._alarm = self._alarms.add("alarms", 0) > self._alarms_before
                self._heard_at = time.monotonic()
        except RuntimeError:  # its keeper has ended: as it should at the end of a run, else _watch finds out
            return

    def _connect(self) -> PrefixStore:
        """A connection of this thread alone; the one of the process group may be busy for as long as a collective."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=PATIENCE * self.timeout_seconds)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        self._alarms = PrefixStore("watchdog", store)
        self._alarms_before = self._alarms.add("alarms", 0)
        return PrefixStore(f"watchdog/{self._alarms_before}", store)

    def _end_the_run(self, own_silence: float) -> None:
        # whatever blocks from here on, such as a dead disk under the run folder, this process ends
        last_resort = threading.Timer(6 * self._answer_seconds, os._exit, [FAILED])
        last_resort.name, last_resort.daemon = f"{WATCHERS} last resort", True
        last_resort.start()
        try:
            self._speak_or_listen(own_report(self.place, own_silence))
            if self.rank == 0:
                time.sleep(LEAVE_SECONDS)  # it may keep the store, from which the others hear that they can go
        finally:
            sys.stdout.flush()
            os._exit(FAILED)

    @property
    def _answer_seconds(self) -> float:
        return ANSWER_SECONDS + 2 * self._interval  # all see the alarm within one interval

    def _speak_or_listen(self, own: Report) -> None:
        """One process speaks for all, the main one if it can; the others stay until it has."""
        if self.size == 1:
            self._speak({0: own}, {})
            return
        store = self._store
        if store is None or not self._hears_the_store():
            by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            keeper = "the launcher" if by_launcher else "rank 0"
            lost = f"{keeper}, which keeps what the ranks tell each other, does not answer: it is stopped or lost, or its machine is."
            self._speak({self.rank: own}, {}, lost)
            return
        store.set(f"report/{self.rank}", json.dumps(asdict(own)))
        self._alarms.add("alarms", 1)
        if self.rank and self._appears(["said"], 2 * self._answer_seconds):
            return
        if store.add("speaker", 1) > 1:
            self._appears(["said"], self._answer_seconds)
            return
        ranks = range(self.size)
        self._appears([f"report/{rank}" for rank in ranks], self._answer_seconds)
        reports = {rank: self._report(rank) for rank in ranks}
        places = {rank: self._last_place(rank) for rank in ranks if reports[rank] is None}
        self._speak(reports, {rank: place for rank, place in places.items() if place})
        store.set("said", "")

    def _hears_the_store(self) -> bool:
        """Whether the other thread, which asks the store all the time, gets one more answer."""
        asked = time.monotonic()
        while self._heard_at < asked and time.monotonic() - asked < self._answer_seconds:
            time.sleep(POLL_SECONDS)
        return self._heard_at >= asked

    def _appears(self, keys: Sequence[str], seconds: float) -> bool:
        assert self._store is not None
        until = time.monotonic() + seconds
        while not (there := self._store.check(list(keys))) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return there

    def _read(self, key: str) -> dict | None:
        assert self._store is not None
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _report(self, rank: int) -> Report | None:
        found = self._read(f"report/{rank}")
        return Report(**{**found, "place": Place(**found["place"])}) if found else None

    def _last_place(self, rank: int) -> Place | None:
        found = self._read(f"last/{rank}")
        return Place(**found) if found else None

    def _speak(self, reports: dict[int, Report | None], last_seen: dict[int, Place], *first: str) -> None:
        """Say who holds up the run, and write it with all stacks into the run folder."""
        silence = min(report.quiet_seconds for report in reports.values() if report)
        lines = [
            f"The run hangs: no process has made progress for {silence:.0f} s.",
            *first,
            *verdict(reports, last_seen),
        ]
        file = self.folder.path / "hang.txt" if self.folder else None
        hint = (
            f"The stacks of all processes: {file}."
            if file
            else f"The stacks of all processes:\n\n{all_stacks(reports)}\n"
        )
        lines.append(
            f"{hint} The same command resumes from the newest checkpoint. If nothing hung, raise "
            f"trainer.hang_timeout_seconds={self.timeout_seconds:g}, or switch this off with 0."
        )
        print("\n".join(lines), file=sys.stderr, flush=True)
        if self.folder is not None:
            step = min(report.place.step for report in reports.values() if report)
            _write(self.folder, step, "\n".join([*lines, "", all_stacks(reports)]))


@contextmanager
def watching(timeout_seconds: float) -> Iterator[Watchdog]:
    """A watchdog that watches while inside; with a timeout of 0 it only knows what this process is doing.

    Raises LostContact.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    watchdog = Watchdog(timeout_seconds, rank, size)
    if timeout_seconds:
        watchdog.start()
    try:
        yield watchdog
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        cause = str(error).splitlines()[0]
        raise LostContact(f"rank {rank} lost contact with another process at {watchdog.place}: {cause}") from None
    finally:
        watchdog.close()


def _lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo has no type of error of its own."""
    return isinstance(error, DistError) or "gloo/transport" in str(error)


def _write(folder: RunFolder, step: int, text: str) -> None:
    try:
        folder.write("hang.txt", text + "\n")
        state = folder.read_state()
        if state is not None:
            state.status, state.step = "failed", max(state.step, step - 1)
            folder.write_state(state)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr, flush=True)
