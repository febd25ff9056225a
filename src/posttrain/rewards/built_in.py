"""The built-in rewards as makers: called in the process that judges, which may be a worker without torch or pydantic."""

from __future__ import annotations

import re
from functools import partial

from posttrain.rewards.gsm8k import ANSWER_MARK, judge_flexible, judge_strict
from posttrain.rewards.verdict import Answered, Outcome, Reward


def load_strict(mark: str = ANSWER_MARK) -> Reward:
    return partial(_number_after_mark, mark)


def load_flexible() -> Reward:
    return _last_number


def load_math() -> Reward:
    from posttrain.rewards.maths import judge_math

    return judge_math


def load_format(pattern: str, right_at: float) -> Reward:
    return partial(_form, re.compile(pattern, re.DOTALL), right_at)


def load_length(target: int, right_at: float) -> Reward:
    return partial(_length, target, right_at)


def _number_after_mark(mark: str, answer: Answered) -> Outcome:
    return Outcome.judged(judge_strict(answer.text, answer.ground_truth, mark), _no_number(answer.ground_truth))


def _last_number(answer: Answered) -> Outcome:
    return Outcome.judged(judge_flexible(answer.text, answer.ground_truth), _no_number(answer.ground_truth))


def _form(pattern: re.Pattern[str], right_at: float, answer: Answered) -> Outcome:
    return Outcome.measured(float(pattern.fullmatch(answer.text) is not None), right_at)


def _length(target: int, right_at: float, answer: Answered) -> Outcome:
    """1 up to `target` tokens, then in a straight line to 0 at twice as many."""
    return Outcome.measured(min(1.0, max(0.0, 2 - answer.num_tokens / target)), right_at)


def _no_number(truth: str | None) -> str:
    return "the row has no ground truth" if truth is None else f"the ground truth {truth[:60]!r} is no number"
