"""The rewards that can be named: how each is made, and where it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from posttrain.config.schema import BUILT_IN_REWARDS, RewardOptions
from posttrain.errors import InputError
from posttrain.rewards.built_in import (
    load_by_source,
    load_exact,
    load_flexible,
    load_format,
    load_length,
    load_math,
    load_strict,
)
from posttrain.rewards.own import check_file, load_function
from posttrain.rewards.verdict import Reward

NUMBER = r"[-−+]?[$€£]?[-−]?[0-9][0-9,]*+(?:\.[0-9]+)?[%.]?"


@dataclass(frozen=True)
class Part:
    """One reward of a weighted sum. `load` makes it, in the process that it runs in."""

    name: str
    weight: float
    load: Callable[[], Reward]
    judges: bool = True  # whether it says what is right, and not only how good
    needs_truth: bool = True
    in_worker: bool = False


def parts_of(options: RewardOptions) -> list[Part]:
    """The rewards of `reward.name` in their order. Raises InputError where `reward.path` is no file."""
    if set(options.names).difference(BUILT_IN_REWARDS):
        check_file(str(options.path))
    weights = options.weights or [1.0] * len(options.names)
    return [_part(name, weight, options) for name, weight in zip(options.names, weights, strict=True)]


def _part(name: str, weight: float, options: RewardOptions) -> Part:
    mark, right_at = options.answer_mark, options.right_at
    match name:
        case "gsm8k_strict":
            return Part(name, weight, partial(load_strict, mark))
        case "gsm8k_flexible":
            return Part(name, weight, load_flexible)
        case "exact_match":
            return Part(name, weight, load_exact)
        case "math":
            return Part(name, weight, load_math, in_worker=True)
        case "data_source":
            return Part(name, weight, partial(load_by_source, mark), in_worker=True)
        case "format":
            # a pattern of one's own may backtrack for ever
            own = options.format_pattern
            pattern = own or rf"(?:.*\n)?{re.escape(mark)}[ \t]*{NUMBER}\s*"
            load = partial(load_format, pattern, right_at)
            return Part(name, weight, load, judges=False, needs_truth=False, in_worker=own is not None)
        case "length":
            load = partial(load_length, options.length_target, right_at)
            return Part(name, weight, load, judges=False, needs_truth=False)
    if options.path is None:
        raise InputError(f"reward.name={name} is not built in, and reward.path names no file that could have it.")
    load = partial(load_function, options.path, name, right_at, options.kwargs)
    return Part(name, weight, load, needs_truth=False, in_worker=True)
