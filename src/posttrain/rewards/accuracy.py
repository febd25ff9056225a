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


def pass_at_k(num_right: int, num_answers: int, k: int) -> float:
    """The chance that one of `k` answers is right, of a problem for which so many of `num_answers` were.

    Source: Chen et al. 2021, "Evaluating large language models trained on code", equation 1.
    """
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def accuracies(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    """Accuracy with its 95% interval over problems, each with the verdicts of all its answers, and pass@k for k = 2, 4, ... and all.

    Answers that could not be judged are left out, problems without any that could be too. With several answers a problem the
    interval is that of the mean over problems, since answers to one problem are not independent.
    """
    known = [[v is Verdict.RIGHT for v in group if v is not Verdict.UNKNOWN] for group in verdicts]
    judged = [group for group in known if group]
    most = min(map(len, judged), default=0)
    if most <= 1:
        flat = Accuracy(sum(map(sum, judged)), sum(map(len, judged)))
        return {"val_accuracy": flat.share, "val_accuracy_low": flat.low, "val_accuracy_high": flat.high}
    shares = [sum(group) / len(group) for group in judged]
    mean = sum(shares) / len(shares)
    spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / max(len(shares) - 1, 1) / len(shares))
    found = {
        "val_accuracy": mean,
        "val_accuracy_low": max(mean - Z_95 * spread, 0.0),
        "val_accuracy_high": min(mean + Z_95 * spread, 1.0),
    }
    for k in sorted({2**power for power in range(1, most.bit_length())} | {most}):
        chances = [pass_at_k(sum(group), len(group), k) for group in judged]
        found[f"val_pass_at_{k}"] = sum(chances) / len(chances)
    return found


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
        mean = sum(gains) / len(gains)
        error = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))
        return cls(mean, mean - Z_95 * error, mean + Z_95 * error)

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} points (95% interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
