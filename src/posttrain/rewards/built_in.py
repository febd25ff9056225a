"""The built-in rewards as makers: called in the process that judges, which may be a worker without torch or pydantic."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from posttrain.errors import InputError
from posttrain.rewards.gsm8k import ANSWER_MARK, judge_flexible, judge_strict
from posttrain.rewards.verdict import Answered, Outcome, Reward, Verdict

# data_source of a row -> (reward, what a wrong answer earns), as verl judges it, and as `data prepare` writes it
SOURCES = {
    "openai/gsm8k": ("gsm8k_strict", 0.0),
    "gsm8k_sft": ("gsm8k_strict", 0.0),
    "gsm8k_multiturn_sft": ("gsm8k_strict", 0.0),
    "lighteval/MATH": ("math", 0.0),
    "DigitalLearningGmbH/MATH-lighteval": ("math", 0.0),
    "HuggingFaceH4/MATH-500": ("math", 0.0),
    "hiyouga/geometry3k": ("math", 0.0),
    "shapes": ("exact_match", 0.0),
    "math": ("math", -1.0),
    "math_dapo": ("math", -1.0),
    "math_dapo_reasoning": ("math", -1.0),
    "aime": ("math", -1.0),  # and all that begins so
    "numina_aops_forum": ("math", 0.0),
    "numina_synthetic_math": ("math", 0.0),
    "numina_amc_aime": ("math", 0.0),
    "numina_synthetic_amc": ("math", 0.0),
    "numina_cn_k12": ("math", 0.0),
    "numina_olympiads": ("math", 0.0),
}


def load_strict(mark: str = ANSWER_MARK) -> Reward:
    return partial(_number_after_mark, mark)


def load_flexible() -> Reward:
    return _last_number


def load_math() -> Reward:
    from posttrain.rewards.maths import judge_math

    return judge_math


def load_exact() -> Reward:
    return _same_text


def load_by_source(mark: str = ANSWER_MARK) -> Reward:
    """What `SOURCES` names for the row's data_source. Rows of GSM8K alone do without math-verify."""
    return partial(_by_source, partial(_number_after_mark, mark))


def load_format(pattern: str, right_at: float) -> Reward:
    return partial(_form, re.compile(pattern, re.DOTALL), right_at)


def load_length(target: int, right_at: float) -> Reward:
    return partial(_length, target, right_at)


def _number_after_mark(mark: str, answer: Answered) -> Outcome:
    return Outcome.judged(judge_strict(answer.text, answer.ground_truth, mark), _no_number(answer.ground_truth))


def _by_source(strict: Reward, answer: Answered) -> Outcome:
    source = answer.data_source
    known = "aime" if source and source.startswith("aime") else source
    if known not in SOURCES:
        said = "the row has no data_source" if source is None else f"no reward is known for data_source {source[:60]!r}"
        return Outcome.unknown(f"{said}: name one in reward.name, or a function of your own by reward.path")
    reward, of_wrong = SOURCES[known]
    try:
        judge = {"gsm8k_strict": strict, "exact_match": _same_text}.get(reward) or load_math()
        outcome = judge(answer)
    except InputError as error:
        return Outcome.unknown(str(error))
    return replace(outcome, value=of_wrong) if outcome.verdict is Verdict.WRONG else outcome


def _last_number(answer: Answered) -> Outcome:
    return Outcome.judged(judge_flexible(answer.text, answer.ground_truth), _no_number(answer.ground_truth))


def _same_text(answer: Answered) -> Outcome:
    if answer.ground_truth is None:
        return Outcome.unknown("the row has no ground truth")
    is_right = _plain(answer.text) == _plain(answer.ground_truth)
    return Outcome.judged(Verdict.RIGHT if is_right else Verdict.WRONG, "")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _form(pattern: re.Pattern[str], right_at: float, answer: Answered) -> Outcome:
    return Outcome.measured(float(pattern.fullmatch(answer.text) is not None), right_at)


def _length(target: int, right_at: float, answer: Answered) -> Outcome:
    """1 up to `target` tokens, then in a straight line to 0 at twice as many."""
    return Outcome.measured(min(1.0, max(0.0, 2 - answer.num_tokens / target)), right_at)


def _no_number(truth: str | None) -> str:
    return "the row has no ground truth" if truth is None else f"the ground truth {truth[:60]!r} is no number"
