"""A user's own function, with verl's signature, and what becomes of that which it returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

from posttrain.errors import InputError
from posttrain.python_file import LONGEST_QUOTE, import_file, where
from posttrain.rewards.verdict import Answered, Outcome, Reward, Verdict

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def check_file(path: str) -> None:
    """Raise InputError where there is no such Python file."""
    if not Path(path).is_file():
        raise InputError(
            f"reward.path={path}: there is no such file{'' if Path(path).is_absolute() else f' in {Path.cwd()}'}. Expected a Python file with a function "
            f"compute_score({', '.join(ARGUMENTS)}), or another name in reward.name."
        )


def load_function(path: str, name: str, right_at: float, kwargs: dict[str, Any] | None = None) -> Reward:
    """The function, with `kwargs` among its arguments, as a reward. Raises InputError where the file does not import or has no such function."""
    file = str(Path(path).resolve())
    module = import_file(file, "reward.path")
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(
            f"reward.name={name}: {path} has no such function; it has {', '.join(there) or 'none'}. "
            "Name it in reward.name, or choose a built-in reward."
        )
    _check_arguments(function, f"reward.name={name} of {path}", kwargs or {})
    return partial(_ask, partial(function, **(kwargs or {})), right_at, file)


def outcome_of(value: Any, right_at: float) -> Outcome:
    """A returned number, or a dict with `score`, as an outcome; anything else is could-not-tell."""
    details: dict[str, float] = {}
    accuracy: Any = None
    if isinstance(value, dict):
        if "score" not in value:
            return Outcome.unknown(
                f"it returned a dict without 'score', with {', '.join(map(str, value))[:60] or 'nothing'}"
            )
        numbers = {str(key): _number(extra) for key, extra in value.items() if key != "score"}
        details = {key: number for key, number in numbers.items() if number is not None}
        value, accuracy = value["score"], details.get("acc")
    score = _number(value)
    if score is None:
        return Outcome.unknown(f"it returned {_shown(value)}, expected a finite number or a dict with one as 'score'")
    is_right = score >= right_at if accuracy is None else accuracy >= 1
    return Outcome(score, Verdict.RIGHT if is_right else Verdict.WRONG, details=details)


def _ask(function: Callable[..., Any], right_at: float, file: str, answer: Answered) -> Outcome:
    try:
        value = function(
            data_source=answer.data_source,
            solution_str=answer.text,
            ground_truth=answer.ground_truth,
            extra_info=answer.extra_info,
        )
        return outcome_of(value, right_at)
    except BaseException as error:  # sys.exit() of a reward is no reason to end a run
        return Outcome.unknown(f"it raised {where(error, file)}")


def _check_arguments(function: Callable[..., Any], named: str, kwargs: dict[str, Any]) -> None:
    if twice := [name for name in ARGUMENTS if name in kwargs]:
        raise InputError(f"reward.kwargs sets {twice[0]}, which a function gets of each answer; take it out.")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"{named} is async; expected a plain function, which runs in a process of its own anyway.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function written in C, which has none
        return
    try:
        signature.bind(**dict.fromkeys((*ARGUMENTS, *kwargs)))
    except TypeError as error:
        of_kwargs = f", and {', '.join(kwargs)} of reward.kwargs" if kwargs else ""
        raise InputError(
            f"{named} takes {signature}: {error}. Expected ({', '.join(ARGUMENTS)}){of_kwargs}, which are given by name."
        ) from None


def _number(value: Any) -> float | None:
    """A finite number as float, of numpy and torch too; None for anything else."""
    if not isinstance(value, Number) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, Number):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):  # complex, or beyond floats
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    """As a person says it: nan, the text 'yes', a list."""
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return (
        f"{value} ({type(value).__name__})"[:LONGEST_QUOTE]
        if isinstance(value, Number)
        else f"a {type(value).__name__}"
    )
