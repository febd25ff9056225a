"""The folder that an audit or a cleaning writes: files bear their names only when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import InputError, RunError

REPORT, FINDINGS, LEFT_OUT = "report.json", "findings.jsonl", "left_out.jsonl"


@contextmanager
def output_folder(path: Path) -> Iterator[OutputFolder]:
    """A folder whose new files take their places together at the end; after an error none does."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {path} cannot be made: {error}. Name another folder.") from None
    folder = OutputFolder(path)
    try:
        yield folder
        for name, unfinished in folder.unfinished.items():
            unfinished.replace(path / name)
    except OSError as error:
        raise RunError(f"--output {path} cannot be written: {error}. Make room, or name another folder.") from None
    finally:
        for unfinished in folder.unfinished.values():
            unfinished.unlink(missing_ok=True)


class OutputFolder:
    def __init__(self, path: Path):
        self.path = path
        self.unfinished: dict[str, Path] = {}

    def new_file(self, name: str) -> Path:
        """Where to write the file of that name until the folder is complete."""
        place = self.path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished[name] = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        return self.unfinished[name]

    def write_json(self, name: str, value: Any) -> None:
        self.new_file(name).write_text(json.dumps(value, indent=2) + "\n")
