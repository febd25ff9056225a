"""Checkpoints to resume from: written aside and renamed, so that a half-written one is never loaded.

checkpoint-<step>/  state/ (torch.distributed.checkpoint, fits any number of processes)  progress.json
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from posttrain.engine.engine import Engine
from posttrain.errors import InputError, RunError

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


class Checkpoints:
    """Those of one run folder; the newest `keep` stay (None: all), whoever wrote them."""

    def __init__(self, folder: Path, keep: int | None):
        self.folder, self.keep = folder, keep

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [(int(m[1]), path) for path in self.folder.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found) if (path / "progress.json").exists()]

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write a checkpoint and drop the oldest ones. Every process must call this. Raises RunError; older ones stay."""
        place = self.folder / f"checkpoint-{progress.step}"
        aside = self.folder / f".{place.name}.tmp"
        world = engine.world
        world.on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        try:
            with _without_warnings():
                dcp.save(engine.state(), checkpoint_id=aside / "state", no_dist=world.mesh is None)
            failure = None
        except (CheckpointException, OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.folder).free / 2**30
            failure = RunError(
                f"Saving {place} failed: {_cause(error)} ({free:.1f} GiB are free there). {self._what_is_left()}"
            )
        world.everyone(lambda: _raise(failure))
        world.on_main(lambda: self._complete(aside, place, progress))
        return place

    def restore(self, engine: Engine, path: Path) -> Progress:
        """Fill the engine from a checkpoint. Every process must call this."""
        progress = read_progress(path)
        try:
            with _without_warnings():
                dcp.load(engine.state(), checkpoint_id=path / "state", no_dist=engine.world.mesh is None)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} cannot be loaded: {_cause(error)}. Delete this folder to resume from the one before it."
            ) from None
        engine.step = progress.step
        return progress

    def _complete(self, aside: Path, place: Path, progress: Progress) -> None:
        try:
            (aside / "progress.json").write_text(json.dumps(asdict(progress)))
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
        except OSError as error:
            raise RunError(f"Saving {place} failed: {error}. {self._what_is_left()}") from None
        for old in self.saved()[: -self.keep] if self.keep else []:
            shutil.rmtree(old, ignore_errors=True)

    def _what_is_left(self) -> str:
        saved = self.saved()
        return (
            f"{saved[-1]} is complete; the same command resumes from it."
            if saved
            else "No checkpoint was complete yet."
        )


def read_progress(path: Path) -> Progress:
    """What a checkpoint says of itself. Raises InputError where it is damaged."""
    try:
        return Progress(**json.loads((path / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}/progress.json cannot be read: {error}. Delete this folder to resume from an older one."
        ) from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence torch's remark that one process is not distributed, which is meant so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")
        yield


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on the first process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        wrapped: Any = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    return str(error).strip().split("\n")[0] or type(error).__name__


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
