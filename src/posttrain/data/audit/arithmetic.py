"""Sums that do not hold: `<<a+b=c>>` with another result, and worked answers whose `####` is not what they worked out.

What is found could be wrong; what cannot be computed without doubt is passed over.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from posttrain.rewards.gsm8k import ANSWER_MARK, final_answer, judge_strict
from posttrain.rewards.verdict import Verdict

_CALCULATION = re.compile(r"<<([^<>\n]{1,200})>>")
_EXPRESSION = re.compile(r"[0-9.+\-*/() ]+")
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
_SHOWN_NUMBER = re.compile(r"(?:[0-9]{1,3}(?:[ ,][0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_ENDING = re.compile(r"#### *[-−+]?[$€£]?[-−]?[0-9.,]+ *[%.]?\s*\Z")
_LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")
_PERCENT = re.compile(r"([0-9]*\.?[0-9]+) *%")
_SIGNS = str.maketrans({"−": "-", "–": "-", "×": "*", "x": "*", "X": "*", "÷": "/", ",": "", "$": "", "€": "", "£": ""})
_OPERATIONS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_NOISE = 1e-9  # of floats, relative


def wrong_calculations(text: str) -> Iterator[str]:
    """Each `<<a+b=c>>` whose sides differ by more than rounding to the digits of c, with the right result."""
    if "<<" not in text:
        return
    for match in _CALCULATION.finditer(text):
        expected = _expected_instead(match[1])
        if expected is not None:
            yield f"<<{match[1]}>>, where {match[1].split('=')[0].strip()} is {expected:.10g}"


def disagreeing_answer(text: str) -> str | None:
    """The number after a final `####`, where it is neither the last result nor a conclusion of the last line before it."""
    final = _final_number(text)
    if final is None:
        return None
    work = text[: text.rfind(ANSWER_MARK)].rstrip()
    line = work[work.rfind("\n") + 1 :]
    concluded = _SHOWN_NUMBER.findall(line[line.find("=") + 1 :]) or _SHOWN_NUMBER.findall(work)[-1:]
    if result := _CALCULATION.match(work, work.rfind("<<")):
        concluded.insert(0, result[1].rpartition("=")[2])
    numbers = [_shown_value(number) for shown in concluded for number in _SHOWN_NUMBER.findall(shown)]
    # worked in dollars, answered in cents; a share answered in percent
    if not numbers or any(_is_close(abs(float(final)), scale * number) for number in numbers for scale in (1, 100)):
        return None
    return f"{ANSWER_MARK} {final}, and the work ends with {numbers[-1]:.10g}"


def disagreeing_truth(text: str, ground_truth: str | None) -> str | None:
    """The number after a final `####`, where it is not the row's ground truth."""
    final = _final_number(text)
    if final is None or judge_strict(text, ground_truth) is not Verdict.WRONG:
        return None
    return f"{ANSWER_MARK} {final}, and the ground truth is {ground_truth}"


def _final_number(text: str) -> str | None:
    """The number that alone follows the last mark; headings of Markdown have the same mark."""
    return final_answer(text) if ANSWER_MARK in text and _ENDING.search(text) else None


def _shown_value(number: str) -> float:
    return float(number.replace(",", "").replace(" ", ""))


@lru_cache(maxsize=65536)
def _expected_instead(calculation: str) -> float | None:
    """The value of the left side, where the right side is another number."""
    left, equals, right = calculation.rpartition("=")
    shown = right.translate(_SIGNS).strip()
    is_percent = shown.endswith("%")
    shown = shown.rstrip("% ")
    value = _value(left.split("=")[0])
    if not equals or value is None or not _NUMBER.fullmatch(shown):
        return None
    digit = 10.0 ** -len(shown.partition(".")[2])  # what the last shown digit counts
    candidates = (value, value * 100) if is_percent else (value,)
    if any(_is_rounded(candidate, float(shown), digit) for candidate in candidates):
        return None
    return value


def _is_rounded(value: float, shown: float, digit: float) -> bool:
    """Whether `shown` is `value` rounded to its last digit, or, with decimals, cut after it."""
    gap = abs(value - shown)
    is_cut = digit < 1 and abs(shown) <= abs(value) and gap < digit
    return is_cut or gap <= digit / 2 + _NOISE * max(1.0, abs(value))


def _is_close(a: float, b: float) -> bool:
    return abs(a - b) <= _NOISE * max(1.0, abs(a), abs(b))


def _value(expression: str) -> float | None:
    """The value of a sum of plain numbers; None for anything else."""
    plain = _PERCENT.sub(r"(\1/100)", expression.translate(_SIGNS)).strip()
    if not _EXPRESSION.fullmatch(plain) or "**" in plain:
        return None
    try:
        return _computed(ast.parse(_LEADING_ZEROS.sub("", plain), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError, ValueError):
        return None


def _computed(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_computed(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATIONS:
            return _OPERATIONS[type(sign)](_computed(left), _computed(right))
    raise ValueError(f"{type(node).__name__} is no arithmetic")
