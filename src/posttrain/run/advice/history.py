"""The metrics of a run as series, and what can be said of one in spite of its noise."""

# n values of a series, w of them a window

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ENOUGH = 20  # values; fewer say nothing about a course


class History:
    """Each metric by `phase/name`, with the steps that it is of. It hears of metrics as trackers do."""

    def __init__(self) -> None:
        self._steps: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._values: dict[str, array[float]] = defaultdict(lambda: array("d"))
        self.last_step = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the metrics of a step; numbers that are not finite are left out."""
        self.last_step = max(self.last_step, step)
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._steps[name].append(step)
                self._values[name].append(value)

    def finish(self) -> None:
        """Nothing: trackers have it."""

    def read(self, path: Path) -> History:
        """Take up what metrics.jsonl holds."""
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line cut short by a kill
            step, phase = record.pop("step"), record.pop("phase")
            self.log({f"{phase}/{name}": value for name, value in record.items() if value is not None}, step)
        return self

    def of(self, name: str) -> Sequence[float]:
        """The values of a metric such as `train/loss`."""
        return self._values.get(name, array("d"))

    def steps(self, name: str) -> Sequence[int]:
        return self._steps.get(name, array("q"))

    def up_to(self, name: str, step: int) -> Sequence[float]:
        """The values of the steps up to this one."""
        return [value for at, value in zip(self.steps(name), self.of(name), strict=True) if at <= step]


@dataclass(frozen=True)
class Change:
    """How a series changed between two of its windows."""

    before: float
    after: float
    noise: float  # standard deviation of one value around the course
    num_before: int
    num_after: int

    @classmethod
    def of(cls, values: Sequence[float], first: int | None = None) -> Change:
        """From the first fifth, or the `first` values, to the last fifth."""
        num = max(len(values) // 5, min(5, len(values) // 2))
        first = first or num
        return cls(mean(values[:first]), mean(values[-num:]), noise(values), first, num)

    @property
    def error(self) -> float:
        """Standard error of the difference of both means."""
        return self.noise * math.sqrt(1 / self.num_before + 1 / self.num_after)

    @property
    def rise(self) -> float:
        return self.after - self.before

    def rose(self, share: float = 0.0) -> bool:
        """By more than noise explains, and by at least this share."""
        return self.rise > max(3 * self.error, share * abs(self.before))

    def fell(self, share: float = 0.0) -> bool:
        return -self.rise > max(3 * self.error, share * abs(self.before))


def worst_rise(values: Sequence[float], num: int) -> tuple[Change, int, int]:
    """The largest rise from the median of one window of `num` values, or from the very first value, which is the untouched model's,
    to that of a later window; and where both end. A bad batch or two do not move a median."""
    starts = range(0, len(values) - num + 1, max(1, num // 3))
    medians = [values[0], *(median(values[i : i + num]) for i in starts)]
    ends = [0, *(i + num - 1 for i in starts)]
    lowest, found = 0, (0, 0)
    for i, value in enumerate(medians):
        if value < medians[lowest]:
            lowest = i
        if value - medians[lowest] > medians[found[1]] - medians[found[0]]:
            found = (lowest, i)
    low, high = found
    return Change(medians[low], medians[high], noise(values), num if low else 1, num), ends[low], ends[high]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def noise(values: Sequence[float]) -> float:
    """Standard deviation of a value around the course, by the median difference of neighbours: neither a slope nor a jump
    counts in it. Of a normal distribution such a difference has the median 0.954 standard deviations."""
    return median([abs(b - a) for a, b in itertools.pairwise(values)]) / 0.954 if len(values) > 1 else 0.0
