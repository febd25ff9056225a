"""GSM8K's answers: a worked solution whose last line reads `#### 18`.

Strict wants the right number after the mark, flexible takes the last number of the text, wherever it stands.
Numbers are compared as decimals, so 18.0 is 18 and no digit is lost; the time is linear in the text.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal

from posttrain.rewards.verdict import Verdict

ANSWER_MARK = "####"

# A minus or plus is a sign only where nothing stands before it to subtract from; `$-3` and `-$3` are both -3.
_NUMBER = re.compile(r"((?:(?<![\w)])[-−+])?(?:[$€£][-−]?)?)((?:(?<![\w.])\.)?[0-9](?:[0-9,.]*[0-9])?)")
_WELL_FORMED = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?")
# 16-3, 1/2, 10:30 and 1e3 begin with a number but are not that number.
_GOES_ON = re.compile(r"[ \t]*[-−+*/^:=×÷][ \t]*[$€£]?[.0-9]|[eE][-+]?[0-9]")


def judge_strict(text: str, ground_truth: str | None, mark: str = ANSWER_MARK) -> Verdict:
    """Right if the number that follows the last `mark` is the right one."""
    return _compare(_number_after_mark(text, mark), ground_truth)


def judge_flexible(text: str, ground_truth: str | None) -> Verdict:
    """Right if the last number of the text is the right one."""
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _compare(_value(last[0]) if last else None, ground_truth)


def final_answer(text: str, mark: str = ANSWER_MARK) -> str | None:
    """The number after the last `mark`, without currency or thousands commas: what can serve as ground truth."""
    number = _number_after_mark(text, mark)
    return None if number is None else f"{number:f}"


def _compare(number: Decimal | None, ground_truth: str | None) -> Verdict:
    truth = None if ground_truth is None else _whole_number(ground_truth)
    if truth is None:
        return Verdict.UNKNOWN
    return Verdict.RIGHT if number == truth else Verdict.WRONG


def _whole_number(text: str) -> Decimal | None:
    text = text.strip().rstrip(".%")
    return _value(_NUMBER.fullmatch(text))


def _number_after_mark(text: str, mark: str) -> Decimal | None:
    start = text.rfind(mark)
    if start < 0:
        return None
    tail = text[start + len(mark) :].lstrip(" \t")
    found = _NUMBER.match(tail)
    if found is None or _GOES_ON.match(tail, found.end()):
        return None
    return _value(found)


def _value(found: re.Match[str] | None) -> Decimal | None:
    if found is None or not _WELL_FORMED.fullmatch(found[2]):
        return None
    is_negative = "-" in found[1] or "−" in found[1]
    return Decimal(("-" if is_negative else "") + found[2].replace(",", ""))
