"""Answers -> scores: the weighted sum of the rewards that the options name, and the verdict of the one that judges."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from posttrain.config.schema import RewardOptions
from posttrain.rewards.named import Part, parts_of
from posttrain.rewards.verdict import Answered, Outcome, Reward, Verdict
from posttrain.rewards.workers import Workers

__all__ = ["Answered", "Score", "Scorer", "Verdict", "open_scorer"]


@dataclass(frozen=True)
class Score:
    """What all rewards together say about one answer.

    `reward` is the weighted sum; it is None where a part with a weight could not tell, and `problem` says which and why.
    `parts` holds each reward's own number by its name, unweighted, and further numbers of a user's function as name/key.
    """

    verdict: Verdict
    reward: float | None
    parts: dict[str, float | None]
    problem: str | None = None


class Scorer:
    """The rewards of `reward.name`, ready to be asked. Not for several threads."""

    def __init__(self, parts: list[Part], workers: Workers | None):
        self._parts, self._workers = parts, workers
        self._here: dict[int, Reward] = {n: part.load() for n, part in enumerate(parts) if not part.in_worker}
        self._away = [number for number, part in enumerate(parts) if part.in_worker]
        self._judge = next((number for number, part in enumerate(parts) if part.judges), 0)

    @property
    def needs_truth(self) -> bool:
        """Whether no answer can be judged without a ground truth."""
        return self._parts[self._judge].needs_truth

    def score(self, answers: Sequence[Answered], advance: Callable[[int], None] = lambda done: None) -> list[Score]:
        """A score for each answer, in order. `advance` is told of each that a worker is done with.

        Raises RunError where no worker can be started any more.
        """
        away = self._asked_away(answers, advance)
        return [
            self._score(
                [
                    away[part, number] if part in self._away else self._here[part](answer)
                    for part in range(len(self._parts))
                ]
            )
            for number, answer in enumerate(answers)
        ]

    def _asked_away(
        self, answers: Sequence[Answered], advance: Callable[[int], None]
    ) -> dict[tuple[int, int], Outcome]:
        """Outcomes of the rewards that run in workers, by reward and answer."""
        if self._workers is None:
            return {}
        keys = [(part, number) for number in range(len(answers)) for part in self._away]
        tasks = [(self._away.index(part), answers[number]) for part, number in keys]
        return dict(zip(keys, self._workers.map(tasks, advance), strict=True))

    def _score(self, outcomes: list[Outcome]) -> Score:
        parts: dict[str, float | None] = {}
        problems = []
        for part, outcome in zip(self._parts, outcomes, strict=True):
            parts[part.name] = outcome.value
            parts |= {f"{part.name}/{key}": number for key, number in outcome.details.items()}
            if outcome.value is None:
                problems.append(f"{part.name}: {outcome.problem}")
        counted = [
            (part.weight, outcome.value) for part, outcome in zip(self._parts, outcomes, strict=True) if part.weight
        ]
        known = [weight * value for weight, value in counted if value is not None]
        reward = math.fsum(known) if len(known) == len(counted) else None
        return Score(outcomes[self._judge].verdict, reward, parts, "; ".join(problems) or None)


@contextmanager
def open_scorer(options: RewardOptions, num_processes: int | None = None) -> Iterator[Scorer]:
    """The rewards, loaded, with at most `num_processes` workers; None leaves it to `reward.num_workers`.

    Raises InputError where a reward cannot be loaded: no such file or function, a file that does not import, math-verify not
    installed. Rewards that need no worker start none.
    """
    parts = parts_of(options)
    loads = [part.load for part in parts if part.in_worker]
    if not loads:
        yield Scorer(parts, None)
        return
    workers = Workers(loads, num_processes or options.num_workers or _cores_for_this_process(), options.timeout_seconds)
    try:
        yield Scorer(parts, workers)
    finally:
        workers.close()


def _cores_for_this_process() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
