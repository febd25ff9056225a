"""Checkpoints to resume from: written aside while training goes on, renamed when whole, so that half of one is never loaded.

checkpoint-<step>/  state/ (torch.distributed.checkpoint, fits any number of processes)  progress.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from posttrain.distributed.world import COLLECTIVE_TIMEOUT, World
from posttrain.engine.engine import Engine
from posttrain.errors import InputError, RunError
from posttrain.run.folder import discard, put_in_place

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what it must go on with: other data or another model would be another run."""

    step: int
    best: float | None
    best_step: int | None
    stale_validations: int  # since the best one, for early stopping
    data: str  # fingerprint of rows, tokenizer, template and the order of batches
    model: str  # fingerprint of the architecture
    updates: int  # optimizer steps, of which a step of reinforcement learning may take several


class Checkpoints:
    """Those of one run folder; the newest `keep` stay (None: all), whoever wrote them. At most one is being written.

    `save`, `wait` and `restore` must be called by every process. What writes is a thread with a process group of its own:
    its messages would otherwise mix with those of training, in another order on each process. On the main process it calls
    `completed` when a checkpoint is whole.
    """

    def __init__(self, folder: Path, keep: int | None, world: World, completed: Callable[[], None] = lambda: None):
        self.folder, self.keep, self.world, self.completed = folder, keep, world, completed
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=world.device.enter_thread
        )
        self._group: dist.ProcessGroup | None = None
        self._writing: Future[None] | None = None
        # torch remarks that one process is not distributed, which is meant so; the thread needs the filter to stay
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return saved_in(self.folder)

    def save(self, engine: Engine, progress: Progress, also: Callable[[Path], None] | None = None) -> None:
        """Copy the state as it is now and begin to write it; `wait` tells what came of it, and the next save waits too.

        `also` may write more into the folder that it is given, at once; every process calls it. Raises RunError.
        """
        self.wait()
        place = self.folder / f"checkpoint-{progress.step}"
        if self._group is None and self.world.size > 1:
            self._group = dist.new_group(backend=self.world.device.host_backend, timeout=COLLECTIVE_TIMEOUT)
        self.world.on_main(lambda: self._begin(place))
        # all have copied before any begins to write, so that none waits for one that could not
        state = self.world.everyone(lambda: self._copy(engine, place, also))
        self._writing = self._thread.submit(self._write, state, place, progress)

    def wait(self) -> None:
        """Until the checkpoint being written is complete. Raises RunError on all if that failed on one; older ones stay."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.world.everyone(writing.result)

    @property
    def failed(self) -> bool:
        """Whether this process knows that writing has failed, which `wait` will raise."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def close(self) -> None:
        """Let what is being written come to its end, while the other processes are still there."""
        self._thread.shutdown()

    def restore(self, engine: Engine, path: Path) -> Progress:
        """Fill the engine from a checkpoint."""
        progress = read_progress(path)
        try:
            dcp.load(engine.state(), checkpoint_id=path / "state", no_dist=engine.world.mesh is None)
        except (torch.OutOfMemoryError, dist.DistError):  # of this process or another, not of the files
            raise
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            cause = _cause(error)
            what_next = (
                "It was written with another optim.optimizer; use the same, or another trainer.default_local_dir."
                if "Missing key in checkpoint" in cause
                else "Delete this folder to resume from the one before it."
            )
            raise InputError(f"{path} cannot be loaded: {cause}. {what_next}") from None
        engine.step = progress.updates
        return progress

    def _begin(self, place: Path) -> None:
        with self._failures(place):
            shutil.rmtree(_aside(place), ignore_errors=True)
            _aside(place).mkdir()

    def _copy(self, engine: Engine, place: Path, also: Callable[[Path], None] | None) -> dict[str, Any]:
        with self._failures(place):
            if also is not None:
                also(_aside(place))
            return copied(engine.state())

    def _write(self, state: dict[str, Any], place: Path, progress: Progress) -> None:
        """In the thread: each process its shards; then the main one, which learns when all have, completes the folder."""
        aside = _aside(place)
        with self._failures(place):
            try:
                dcp.save(
                    state,
                    checkpoint_id=aside / "state",
                    process_group=self._group,
                    no_dist=self._group is None,
                )
                if self.world.is_main:
                    self._complete(aside, place, progress)
            finally:
                if self.world.is_main:
                    shutil.rmtree(aside, ignore_errors=True)  # gone where all went well

    def _complete(self, aside: Path, place: Path, progress: Progress) -> None:
        with (aside / "progress.json").open("w") as stream:
            json.dump(asdict(progress), stream)
            stream.flush()
            os.fsync(stream.fileno())
        put_in_place(aside, place)
        for old in self.saved()[: -self.keep] if self.keep else []:
            discard(old)
        self.completed()

    @contextmanager
    def _failures(self, place: Path) -> Iterator[None]:
        """Whatever fails inside becomes a RunError, which is what processes tell each other."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
            there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
            free = shutil.disk_usage(there).free / 2**30
            raise RunError(
                f"Saving {place} failed: {_cause(error)} ({free:.1f} GiB are free there). {self._what_is_left()}"
            ) from None

    def _what_is_left(self) -> str:
        saved = self.saved()
        return (
            f"{saved[-1]} is complete; the same command resumes from it."
            if saved
            else "No checkpoint was complete yet."
        )


def saved_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / "progress.json").exists()]


def check_is_checkpoint(path: Path, option: str) -> None:
    """Raise InputError for a folder that is none to resume from."""
    if (path / "progress.json").is_file():
        return
    inside = saved_in(path)
    hint = (
        f"; it holds {inside[-1].name}, which is one"
        if inside
        else ""
        if path.exists()
        else "; there is no such folder"
    )
    raise InputError(
        f"{option}={path} is not a checkpoint to resume from{hint}. Expected a checkpoint-<step> folder of posttrain, with "
        "progress.json in it. A finished model is gone on from by model.path."
    )


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors on the CPU, in memory of their own: what training does to the originals does not reach them."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    )
    copy = stager.stage(state)
    stager.close()  # it would keep the copy for the next one
    assert isinstance(copy, dict)  # not a future: staging was not asked to be asynchronous
    return copy


def read_progress(path: Path) -> Progress:
    """What a checkpoint says of itself. Raises InputError where it is damaged."""
    try:
        found = json.loads((path / "progress.json").read_text())
        return Progress(**{"updates": found["step"], **found})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path}/progress.json cannot be read: {error}. Delete this folder to resume from an older one."
        ) from None


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.tmp")


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped: Any = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return str(error).strip().split("\n")[0] or type(error).__name__
