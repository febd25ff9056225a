"""What a reward says about one answer."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Verdict(StrEnum):
    """UNKNOWN, "could not tell", is counted apart: it says nothing about the model, and is never right."""

    RIGHT = "right"
    WRONG = "wrong"
    UNKNOWN = "unknown"


Reward = Callable[[str, str | None], Verdict]  # (text of the answer, ground truth) -> verdict
