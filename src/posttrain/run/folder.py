"""The run folder: what a run writes about itself, and what later commands read from it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.errors import InputError, RunError

_LIBRARIES = ("torch", "transformers", "datasets", "numpy", "tokenizers")


@dataclass
class RunState:
    """run.json: status is running, stopped, finished or failed."""

    status: str = "running"
    step: int = 0
    total_steps: int = 0
    best_step: int | None = None
    world_size: int = 1
    data_fingerprint: str = ""
    model_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class RunFolder:
    """Paths and small files of one run. Writes go to a temporary name first, so that no reader sees half a file."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def advice(self) -> Path:
        return self.path / "advice.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def create(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise InputError(f"trainer.default_local_dir={self.path} cannot be written: {error}.") from None

    def write(self, name: str, text: str) -> None:
        aside = self.path / f".{name}.tmp"
        try:
            aside.write_text(text)
            aside.replace(self.path / name)
        except OSError as error:
            raise RunError(
                f"Cannot write {self.path / name}: {error}. Free space and run the same command again."
            ) from None

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def write_state(self, state: RunState) -> None:
        self.write_json("run.json", asdict(state))

    def read_state(self) -> RunState | None:
        """What run.json says, or None where there is none."""
        try:
            return RunState(**json.loads((self.path / "run.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.path}/run.json cannot be read: {error}.") from None


def put_in_place(aside: Path, place: Path) -> None:
    """Let a folder that is whole take its place, or another's; after a kill in between `clear_leftovers` undoes it."""
    before = place.with_name(f".{place.name}.old")
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    aside.rename(place)
    shutil.rmtree(before, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder; what a kill leaves of it does not bear its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Undo what a killed run left half done: half-written folders go, and one that was to be replaced comes back."""
    for before in folder.glob(".checkpoint-*.old"):
        place = folder / before.name.removeprefix(".").removesuffix(".old")
        if not place.exists():
            before.rename(place)
        shutil.rmtree(before, ignore_errors=True)
    for aside in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(aside, ignore_errors=True)


def find_run(path: str) -> Path | None:
    """The run folder that a path lies in or is, or None for any other model."""
    for folder in (Path(path), Path(os.path.abspath(path)).parent):
        if (folder / "run.json").exists() and (folder / "config.yaml").exists():
            return folder
    return None


def library_versions() -> dict[str, str]:
    """Of posttrain, Python and what computes."""
    found = {"posttrain": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
