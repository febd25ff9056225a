"""How often answers were right, and how sure one can be of that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.rewards.verdict import Verdict

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Accuracy:
    """Right answers among those that could be judged; what could not be is counted apart."""

    num_correct: int
    num_judged: int
    num_unknown: int = 0

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> Accuracy:
        unknown = sum(verdict is Verdict.UNKNOWN for verdict in verdicts)
        return cls(sum(verdict is Verdict.RIGHT for verdict in verdicts), len(verdicts) - unknown, unknown)

    @property
    def num_problems(self) -> int:
        return self.num_judged + self.num_unknown

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
        """Wilson's 95% score interval, which holds near 0 and 1 too. Source: Wilson 1927, JASA 22."""
        if not self.num_judged:
            return math.nan, math.nan
        n, p, z = self.num_judged, self.share, Z_95
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low = 0.0 if self.num_correct == 0 else center - half  # exactly, which rounding would miss
        return low, 1.0 if self.num_correct == n else center + half
