"""Mathematical answers, compared by math-verify: 1/2 is 0.5 is \\frac{1}{2}.

It can hang on hard expressions, so it runs in a worker process, whose time limit stands in for math-verify's own (which
is a signal that the main thread alone could take).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from posttrain.errors import InputError
from posttrain.rewards.verdict import Answered, Outcome, Verdict

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise InputError(
        f"reward.name=math needs math-verify ({error}): pip install 'posttrain[math]', or choose another reward."
    ) from None

BOXED = "\\boxed"
_BOXED_WORDS = re.compile(r"\\boxed\{((?=.*[A-Za-z]{3})[A-Za-z' ]+)\}")

# it warns once that its time limit is off
logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def judge_math(answer: Answered) -> Outcome:
    """Whether the last \\boxed{} of the answer, or else its last mathematical expression, equals the ground truth."""
    truth = answer.ground_truth
    gold = [] if truth is None else _expressions(last_boxed(truth) or f"{BOXED}{{{truth.strip().strip('$')}}}")
    if not gold:
        what = "the row has no ground truth" if truth is None else f"the ground truth {truth[:60]!r} cannot be read"
        return Outcome.unknown(what)
    found = _expressions(last_boxed(answer.text) or answer.text)
    is_right = bool(found) and verify(gold, found, timeout_seconds=None, raise_on_error=True)
    return Outcome.judged(Verdict.RIGHT if is_right else Verdict.WRONG, "")


def last_boxed(text: str) -> str | None:
    """The last `\\boxed{...}` with all that its braces hold; None where there is none or it is not closed."""
    start = text.rfind(BOXED + "{")
    depth = 0
    for position in range(start + len(BOXED), len(text) if start >= 0 else 0):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start : position + 1]
    return None


def _expressions(text: str) -> list[Any]:
    """What math-verify reads as mathematics; text that it cannot read is nothing."""
    if words := _BOXED_WORDS.fullmatch(text):  # else `east` is a product of letters, and equal to `seat`
        text = f"{BOXED}{{\\text{{{words[1]}}}}}"
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(text, configs, fallback_mode="no_fallback", parsing_timeout=None)
