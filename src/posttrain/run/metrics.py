"""metrics.jsonl and the trackers, written one step late so that nothing waits for the device inside a step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RunError


class Metrics:
    """Appends records to metrics.jsonl and sends them to trackers under `phase/name`."""

    def __init__(self, path: Path | None, trackers: list[Any] | None = None):
        self._stream = open(path, "a", encoding="utf-8") if path else None
        self._trackers = trackers or []

    def write(self, step: int, phase: str, values: Mapping[str, float | int | None]) -> None:
        """One record; what is not finite is written as null, which JSON can hold."""
        if self._stream is None:
            return
        record = {"step": step, "phase": phase, **{name: _json_number(value) for name, value in values.items()}}
        try:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        except OSError as error:
            raise RunError(f"Cannot write {self._stream.name}: {error}. Checkpoints are untouched.") from None
        for tracker in self._trackers:
            tracker.log({f"{phase}/{name}": value for name, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        if self._stream is not None:
            self._stream.close()


def drop_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, which a resumed run will write again."""
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(line + "\n" for line in lines))
    aside.replace(path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a kill


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
