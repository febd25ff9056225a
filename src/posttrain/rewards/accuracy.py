"""How often answers were right, and how sure one can be of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.rewards.verdict import Verdict

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Accuracy:
    """Right answers among those that could be judged; what could not be is counted apart.

    With several answers a problem `problem_error` is the standard error of the mean over the `num_judged_problems`, NaN of one, and
    `pass_at` the chance that one of k answers is right, for k = 2, 4, ... and all.
    """

    num_correct: int
    num_judged: int
    num_unknown: int = 0
    answers_a_problem: int = 1
    problem_error: float = 0.0
    pass_at: dict[int, float] = field(default_factory=dict)
    num_judged_problems: int | None = None  # None where each has one answer

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], answers_a_problem: int = 1) -> Accuracy:
        """Of all answers, those to one problem next to each other."""
        unknown = sum(verdict is Verdict.UNKNOWN for verdict in verdicts)
        correct, judged = sum(verdict is Verdict.RIGHT for verdict in verdicts), len(verdicts) - unknown
        if answers_a_problem == 1:
            return cls(correct, judged, unknown)
        starts = range(0, len(verdicts), answers_a_problem)
        known = [
            [v is Verdict.RIGHT for v in verdicts[i : i + answers_a_problem] if v is not Verdict.UNKNOWN]
            for i in starts
        ]
        groups = [group for group in known if group]
        most = min(map(len, groups), default=0)
        sizes = sorted({2**power for power in range(1, most.bit_length())} | {most} - {0, 1})
        pass_at = {k: sum(pass_at_k(sum(group), len(group), k) for group in groups) / len(groups) for k in sizes}
        error = _mean_error([sum(group) / len(group) for group in groups])
        return cls(correct, judged, unknown, answers_a_problem, error, pass_at, len(groups))

    @property
    def num_problems(self) -> int:
        return (self.num_judged + self.num_unknown) // self.answers_a_problem

    @property
    def share(self) -> float:
        return self.num_correct / self.num_judged if self.num_judged else math.nan

    @property
    def low(self) -> float:
        return self._interval()[0]

    @property
    def high(self) -> float:
        return self._interval()[1]

    def __str__(self) -> str:
        return f"{self.share:.1%} (95% interval {self.low:.1%} to {self.high:.1%}, {self.num_correct} of {self.num_judged})"

    def _interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval, which holds near 0 and 1 too. Source: Wilson 1927, JASA 22.

        With several answers a problem, which are not independent, that of the mean over problems; where problems do not differ, Wilson's
        of so many problems.
        """
        if not self.num_judged:
            return math.nan, math.nan
        p, z = self.share, Z_95
        if self.problem_error > 0:
            return max(p - z * self.problem_error, 0.0), min(p + z * self.problem_error, 1.0)
        n = self.num_judged_problems or self.num_judged
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low = 0.0 if self.num_correct == 0 else center - half  # exactly, which rounding would miss
        return low, 1.0 if self.num_correct == self.num_judged else center + half


def pass_at_k(num_right: int, num_answers: int, k: int) -> float:
    """The chance that one of `k` answers is right, of a problem for which so many of `num_answers` were.

    Source: Chen et al. 2021, "Evaluating large language models trained on code", equation 1.
    """
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def _mean_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Difference:
    """How much better the second of two models is on the same problems, with the 95% interval of the mean."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Sequence[Verdict], after: Sequence[Verdict]) -> Difference:
        """Paired by problem; what one of the two could not be judged on is left out."""
        pairs = [pair for pair in zip(before, after, strict=True) if Verdict.UNKNOWN not in pair]
        gains = [(b is Verdict.RIGHT) - (a is Verdict.RIGHT) for a, b in pairs]
        if len(gains) < 2:
            return cls(math.nan, math.nan, math.nan)
        mean, error = sum(gains) / len(gains), _mean_error(gains)
        return cls(mean, mean - Z_95 * error, mean + Z_95 * error)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} points (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
