"""Grade-school word problems in GSM8K's form, small enough that a tiny model learns them in two minutes.

    {"question": "Tom has 3 apples and buys 4 more. How many apples does Tom have now?",
     "answer": "3+4=7\\n#### 7"}

A story is an opening, which gives the first number, and perhaps a turn, which changes it: one or two steps.
"""

from __future__ import annotations

import json
import operator
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from posttrain.errors import InputError

OPERANDS = range(2, 13)
FACTORS = range(2, 7)
RESULTS = range(2, 101)  # never 1, so that every noun is plural
SHARE_OF_TWO_STEPS = 0.6
SHARE_OF_BARE_ANSWERS = (
    0.6  # of those that are shown: the result alone, so that showing one's working is left to be found
)
MAX_DRAWS_PER_PROBLEM = 100

GIRLS = ("Anna", "Ella", "Emma", "Julia", "Lily", "Maria", "Mia", "Sara")
BOYS = ("Adam", "Ben", "David", "Jack", "Leo", "Max", "Sam", "Tom")
THINGS = (
    *("apples", "balls", "beads", "books", "buttons", "candles", "cards", "coins", "cookies", "dolls"),
    *("flowers", "lemons", "marbles", "pencils", "pens", "rings", "shells", "stamps", "stickers", "toys"),
)

HOW_MANY_NOW = "How many {things} does {name} have now?"
HOW_MANY_LEFT = "How many {things} does {name} have left?"
HOW_MANY_ALL = "How many {things} does {name} have in all?"
HOW_MANY_THIRD = "How many {things} does {third} have?"


@dataclass(frozen=True)
class Event:
    """What happens: a sentence, what it does to the number, and what can be asked after it."""

    text: str
    sign: str
    question: str


OPENINGS = (
    Event("{name} has {a} {things} and buys {b} more.", "+", HOW_MANY_NOW),
    Event("{name} finds {a} {things} on Monday and {b} more on Tuesday.", "+", HOW_MANY_ALL),
    Event("{other} has {a} {things}. {name} has {b} more than {other}.", "+", "How many {things} does {name} have?"),
    Event("{name} has {a} {things} and gives {b} of them to {other}.", "-", HOW_MANY_LEFT),
    Event("{other} has {a} {things}. {name} has {b} fewer than {other}.", "-", "How many {things} does {name} have?"),
    Event("{name} has {a} {things} in each of {b} boxes.", "*", HOW_MANY_ALL),
    Event("{other} has {a} {things}. {name} has {b} times as many.", "*", "How many {things} does {name} have?"),
    Event("{name} gets {a} {things} a day for {b} days.", "*", HOW_MANY_ALL),
)
TURNS = (
    Event("Then {name} buys {b} more.", "+", HOW_MANY_NOW),
    Event("{third} gives {name} {b} more.", "+", HOW_MANY_NOW),
    Event("{third} has {b} more than {name}.", "+", HOW_MANY_THIRD),
    Event("Then {name} loses {b}.", "-", HOW_MANY_LEFT),
    Event("Then {name} gives {b} to {third}.", "-", HOW_MANY_LEFT),
    Event("{third} has {b} times as many as {name}.", "*", HOW_MANY_THIRD),
    Event("Then {name} sells all {their} {things} for ${b} each.", "*", "How many dollars does {name} get?"),
    Event("Then {name} puts all {their} {things} equally into {b} bags.", "/", "How many {things} are in each bag?"),
)
RESULT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def write_problems(folder: Path, num_train: int, num_prompts: int, num_test: int, seed: int) -> None:
    """Write train.jsonl, to learn from by imitation, prompts.jsonl, to be answered, and test.jsonl, with no question twice in any.

    Of the answers in train.jsonl many give the result alone; all others show the working.
    """
    problems = make_problems(num_test + num_train + num_prompts, seed)
    rng = random.Random(seed)
    shown = [_bare(p) if rng.random() < SHARE_OF_BARE_ANSWERS else p for p in problems[num_test : num_test + num_train]]
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "test.jsonl", problems[:num_test])
    _write_lines(folder / "train.jsonl", shown)
    _write_lines(folder / "prompts.jsonl", problems[num_test + num_train :])


def _bare(problem: Problem) -> Problem:
    return Problem(problem.question, problem.answer.splitlines()[-1])


def make_problems(num_problems: int, seed: int) -> list[Problem]:
    """Problems with different questions, the same ones for the same seed; a longer list begins like a shorter one."""
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    num_draws = 0
    while len(problems) < num_problems:
        num_draws += 1
        if num_draws > num_problems * MAX_DRAWS_PER_PROBLEM:
            raise InputError(
                f"{num_problems} different problems were asked for; {len(problems)} were found. Take fewer."
            )
        problem = _tell(rng)
        problems.setdefault(problem.question, problem)
    return list(problems.values())


def _tell(rng: random.Random) -> Problem:
    words = _words(rng)
    kinds_of_event = (OPENINGS, TURNS) if rng.random() < SHARE_OF_TWO_STEPS else (OPENINGS,)
    sentences, steps, question, number = [], [], "", rng.choice(OPERANDS)
    for events in kinds_of_event:
        event, operand = _draw_event(rng, events, number)
        result = RESULT[event.sign](number, operand)
        sentences.append(event.text.format(a=number, b=operand, **words))
        steps.append(_step(f"{number}{event.sign}{operand}", result))
        question, number = event.question.format(**words), result
    return Problem(" ".join([*sentences, question]), "\n".join([*steps, f"#### {number}"]))


def _words(rng: random.Random) -> dict[str, str]:
    name, other, third = rng.sample(GIRLS + BOYS, 3)
    their = "her" if name in GIRLS else "his"
    return {"name": name, "other": other, "third": third, "their": their, "things": rng.choice(THINGS)}


def _draw_event(rng: random.Random, events: tuple[Event, ...], number: int) -> tuple[Event, int]:
    possible = [(event, operands) for event in events if (operands := _operands(number, event.sign))]
    event, operands = rng.choice(possible)
    return event, rng.choice(operands)


def _operands(number: int, sign: str) -> list[int]:
    operands = FACTORS if sign in "*/" else OPERANDS
    divides = [operand for operand in operands if sign != "/" or number % operand == 0]
    return [operand for operand in divides if RESULT[sign](number, operand) in RESULTS]


def _step(sum_: str, result: int) -> str:
    return f"{sum_}={result}"


def _write_lines(file: Path, problems: list[Problem]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for problem in problems:
            lines.write(json.dumps(asdict(problem)) + "\n")
