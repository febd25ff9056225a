"""What a policy did with the prompts of a step: its answers, what they earned, and what was better than expected."""

# N answers, prompt by prompt; T tokens

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.config.schema import AlgorithmOptions
from posttrain.loops.answering import Problem
from posttrain.losses.advantage import groups, has_signal
from posttrain.losses.aggregation import token_weights
from posttrain.records import Completion, ImageSource, Sample
from posttrain.rewards.score import Score
from posttrain.rewards.verdict import Verdict


@dataclass(frozen=True)
class Experience:
    """The answers to some prompts, the same on every process. `rewards_N` are NaN where nobody could tell.

    `seconds` are those of the slowest process, by part: rollout, reward.
    """

    problems: list[Problem]
    prompts_N: np.ndarray  # int64, number of each answer's problem among all
    completions: list[Completion]
    scores: list[Score]
    rewards_N: np.ndarray  # float64, with what lengths and divergence take off
    seconds: dict[str, float] = field(default_factory=dict)
    tool_counts: dict[str, int] = field(default_factory=dict)  # see ToolCounts; none without tools
    warnings: list[str] = field(default_factory=list)  # of the engines that answered
    compared: str = "reward"  # by what a group has a signal: reward, score (without over-long shaping) or right

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def signal_N(self) -> np.ndarray:
        """Whether (bool, N) anything can be learnt from the answer's group."""
        return has_signal(self._compared_N, self.prompts_N)

    @property
    def num_with_signal(self) -> int:
        """Groups of which something can be learnt."""
        return len(np.unique(self.prompts_N[self.signal_N]))

    @property
    def num_unknown(self) -> int:
        """Answers that nobody could judge."""
        return sum(score.reward is None for score in self.scores)

    @property
    def about_unknown(self) -> str:
        """How many they are, and why the first."""
        problem = next((score.problem for score in self.scores if score.reward is None), None)
        return f"{self.num_unknown} of {len(self)} answers could not be judged, such as: {problem}"

    def taken(self, chosen_N: np.ndarray) -> Experience:
        """The answers with these numbers or this mask."""
        numbers = np.flatnonzero(chosen_N) if chosen_N.dtype == bool else chosen_N
        return replace(
            self,
            problems=[self.problems[i] for i in numbers],
            prompts_N=self.prompts_N[numbers],
            completions=[self.completions[i] for i in numbers],
            scores=[self.scores[i] for i in numbers],
            rewards_N=self.rewards_N[numbers],
        )

    def first_groups(self, count: int) -> Experience:
        """The answers to the first so many prompts."""
        kept = groups(self.prompts_N)[:count]
        return self.taken(np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64))

    def joined(self, other: Experience) -> Experience:
        return Experience(
            [*self.problems, *other.problems],
            np.concatenate([self.prompts_N, other.prompts_N]),
            [*self.completions, *other.completions],
            [*self.scores, *other.scores],
            np.concatenate([self.rewards_N, other.rewards_N]),
            {name: self.seconds[name] + other.seconds[name] for name in self.seconds},
            {name: self.tool_counts[name] + other.tool_counts[name] for name in self.tool_counts},
            [*self.warnings, *other.warnings],
            self.compared,
        )

    @property
    def _compared_N(self) -> np.ndarray:
        match self.compared:
            case "score":
                return _scores(self.scores)
            case "right":
                known = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0}
                return np.array([known.get(score.verdict, math.nan) for score in self.scores])
            case _:
                return self.rewards_N

    def metrics(self) -> dict[str, float | None]:
        """What a person wants to know of them; means over answers, shares of groups."""
        known_N = self.rewards_N[~np.isnan(self.rewards_N)]
        lengths_N = np.array([completion.num_trained for completion in self.completions])
        verdicts = [score.verdict for score in self.scores]
        judged = sum(verdict is not Verdict.UNKNOWN for verdict in verdicts)
        right = sum(verdict is Verdict.RIGHT for verdict in verdicts)
        seconds = self.seconds.get("rollout", 0.0)
        num_groups = len(np.unique(self.prompts_N))
        parts = {name for score in self.scores for name in score.parts}
        return {
            "reward_mean": _mean(known_N),
            "reward_std": float(known_N.std()) if len(known_N) else None,
            "right_share": right / judged if judged else None,
            "rewards_unknown": self.num_unknown,
            "no_signal_share": 1 - self.num_with_signal / num_groups if num_groups else None,
            "answer_tokens_mean": _mean(lengths_N),
            "answer_tokens_max": int(lengths_N.max(initial=0)),
            "truncated_share": _mean(np.array([not completion.stopped for completion in self.completions])),
            "rollout_seconds": seconds,
            "reward_seconds": self.seconds.get("reward", 0.0),
            "rollout_tokens_per_second": lengths_N.sum() / seconds if seconds > 1e-3 else None,  # else they were given
            **{f"tool_{name}": count for name, count in self.tool_counts.items()},
            **{f"reward_{name}": _mean_of_part(self.scores, name) for name in sorted(parts) if len(parts) > 1},
        }


def experience(
    answers: Sequence[tuple[int, Problem, Completion, Score]],
    algorithm: AlgorithmOptions,
    max_new_tokens: int,
    seconds: dict[str, float],
    tool_counts: dict[str, int] | None = None,
    warnings: list[str] | None = None,
) -> Experience:
    """Answers, each with the number of its problem, the problem and its score; over-long shaping comes off their rewards."""
    prompts_N = np.array([number for number, *_ in answers], dtype=np.int64)
    completions, scores = [completion for _, _, completion, _ in answers], [score for *_, score in answers]
    rewards_N = _scores(scores)
    if algorithm.overlong_buffer_tokens:
        lengths_N = np.array([completion.num_trained for completion in completions])
        rewards_N -= overlong_penalty(
            lengths_N, max_new_tokens, algorithm.overlong_buffer_tokens, algorithm.overlong_penalty
        )
    problems = [problem for _, problem, _, _ in answers]
    compared = algorithm.filter_metric if algorithm.filter_groups else "reward"
    return Experience(
        problems, prompts_N, completions, scores, rewards_N, seconds, tool_counts or {}, warnings or [], compared
    )


def overlong_penalty(lengths_N: np.ndarray, max_new_tokens: int, buffer: int, penalty: float) -> np.ndarray:
    """What lengths (in tokens) take off the reward: nothing up to `max_new_tokens - buffer`, then a line up to `penalty`.

    Source: Yu et al. 2025, DAPO, arXiv 2503.14476, equation 13.
    """
    beyond_N = np.clip(lengths_N - (max_new_tokens - buffer), 0, buffer)
    return penalty * beyond_N / buffer


@dataclass(frozen=True)
class Update:
    """What one update of the weights learns from: answers by number, the weight of each one's tokens, and what the sum of their
    losses is divided by."""

    numbers: list[int]
    weights: np.ndarray  # float64
    total_weight: float


def plan_updates(
    found: Experience, usable_N: np.ndarray, parts: int, mode: str, constant_length: int, order: np.ndarray
) -> list[Update]:
    """The answers that are usable (bool, N) in `parts` updates: whole groups, in the order of `order`, a permutation of them."""
    members = groups(found.prompts_N)
    updates = []
    for part in np.array_split(order, parts):
        numbers = [i for group in sorted(part) for i in members[group].tolist() if usable_N[i]]
        lengths = np.array([found.completions[i].num_trained for i in numbers], dtype=np.int64)
        updates.append(Update(numbers, *token_weights(lengths, mode, constant_length)))
    return updates


def samples_of(row: int, completion: Completion, images: tuple[ImageSource, ...] = ()) -> list[Sample]:
    """What can be learnt from one answer to a prompt with these images: a sample for each of its pieces, trained where the model
    wrote."""
    samples = []
    for piece in completion.pieces:
        prompt_T = np.zeros(len(piece.prompt_ids_T), dtype=np.float32)
        own = [np.full(len(s.ids_T), s.trained, dtype=np.float32) for s in piece.segments]
        weights_T = np.concatenate([prompt_T, *own])
        ids_T = np.concatenate([piece.prompt_ids_T, *(s.ids_T for s in piece.segments)]).astype(np.int32)
        signals = {}
        if all(s.logprobs_T is not None for s in piece.segments if s.trained):
            drawn = [np.zeros(len(s.ids_T)) if s.logprobs_T is None else s.logprobs_T for s in piece.segments]
            signals["rollout_logprobs"] = np.concatenate([prompt_T, *drawn]).astype(np.float32)
        if weights_T[1:].any():
            samples.append(Sample(row, ids_T, weights_T, signals, len(piece.prompt_ids_T), images))
    return samples


def _scores(scores: Sequence[Score]) -> np.ndarray:
    """The reward of each (float64, N), NaN where nobody could tell."""
    return np.array([math.nan if score.reward is None else score.reward for score in scores], dtype=np.float64)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean_of_part(scores: Sequence[Score], name: str) -> float | None:
    found = [value for score in scores if (value := score.parts.get(name)) is not None]
    return sum(found) / len(found) if found else None
