"""What a reward is asked about one answer, and what it can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """UNKNOWN, "could not tell", is counted apart: it says nothing about the model, and is never right."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Answered:
    """An answer and what is known about its problem.

    >>> Answered(text="3+4=7\\n#### 7", ground_truth="7", data_source="gsm8k", extra_info={}, num_tokens=9, stopped=True)
    """

    text: str
    ground_truth: str | None
    data_source: str | None
    extra_info: dict[str, Any]
    num_tokens: int
    stopped: bool  # False: cut at the length limit


@dataclass(frozen=True)
class Outcome:
    """What one reward says. Either `value` is a finite number, or `problem` says why there is none."""

    value: float | None
    verdict: Verdict
    problem: str | None = None
    details: dict[str, float] = field(default_factory=dict)  # further numbers of a user's function

    @classmethod
    def judged(cls, verdict: Verdict, problem: str) -> Outcome:
        """1 for right, 0 for wrong; `problem` is why it is unknown where it is."""
        if verdict is Verdict.UNKNOWN:
            return cls.unknown(problem)
        return cls(float(verdict is Verdict.RIGHT), verdict)

    @classmethod
    def measured(cls, value: float, right_at: float) -> Outcome:
        """Of a reward that only gives a number."""
        return cls(value, Verdict.RIGHT if value >= right_at else Verdict.WRONG)

    @classmethod
    def unknown(cls, problem: str) -> Outcome:
        return cls(None, Verdict.UNKNOWN, problem)


Reward = Callable[[Answered], Outcome]
