"""Prompts of a step -> answers -> rewards, on all processes together."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from posttrain.config.schema import Config
from posttrain.distributed.world import World
from posttrain.loops.answering import Answerer, answered
from posttrain.loops.experience import Experience, experience
from posttrain.loops.prompts import ANSWERS_A_GROUP, PromptData
from posttrain.records import Completion
from posttrain.rewards.score import Score, Scorer
from posttrain.rollout.rollout import Sampling
from posttrain.run.progress import Display


def answers_a_group(config: Config) -> int:
    return config.rollout.n or ANSWERS_A_GROUP


@dataclass(frozen=True)
class StepAnswers:
    """Answers and judges the prompts of a step. Every process must call it."""

    answerer: Answerer
    scorer: Scorer
    data: PromptData
    config: Config
    world: World

    def step(self, step: int) -> Experience:
        """The answers of a step: a function of the weights, the seed and the step. With algorithm.filter_groups up to
        algorithm.max_num_gen_batches batches of prompts are asked, until as many groups as wanted have a signal."""
        found = self._batch(self.data.rows(step), step)
        if self.config.algorithm.filter_groups and self.data.given is None:
            for extra in range(1, self.config.algorithm.max_num_gen_batches):
                more = self.data.rows(step, extra)
                if found.num_with_signal >= len(self.data.rows(step)) or not more:
                    break
                found = found.joined(self._batch(more, step))
        return found

    def say_what_is_wrong(self, found: Experience, step: int, display: Display) -> None:
        """What the rollout engines warn of, and the first answer of the step that nobody could judge."""
        for warning in found.warnings:
            display.say(warning)
        if found.num_unknown:
            display.say(f"step {step}: {found.about_unknown}")

    def _batch(self, rows: list[int], step: int) -> Experience:
        """The answers to the prompts with these numbers, dealt to the processes by whole groups, whose prompt is read once."""
        world, tools = self.world, self.answerer.tools
        world.watchdog.beat("answering", step=step + 1, patient=True)
        own, started = rows[world.rank :: world.size], time.perf_counter()
        answers = world.everyone(lambda: self._answers(own, step))
        answered_at = time.perf_counter()
        asked = [answered(self.data.train[row], completion) for row, completion in answers]
        scores = world.everyone(lambda: self.scorer.score(asked, self._alive))
        seconds = {"rollout": answered_at - started, "reward": time.perf_counter() - answered_at}
        counts = asdict(tools.take_counts()) if tools else {}
        warnings = self.answerer.rollout.warnings
        parts = world.gather((answers, scores, seconds, counts, list(warnings)))
        warnings.clear()
        judged: dict[int, list[tuple[Completion, Score]]] = {row: [] for row in rows}
        for theirs, their_scores, *_ in parts:
            for (row, completion), score in zip(theirs, their_scores, strict=True):
                judged[row].append((completion, score))
        return experience(
            [(row, self.data.train[row], *pair) for row, pairs in judged.items() for pair in pairs],
            self.config.algorithm,
            self.config.rollout.max_new_tokens,
            {name: max(part[2][name] for part in parts) for name in seconds},
            {name: sum(part[3][name] for part in parts) for name in counts},
            list(dict.fromkeys(warning for part in parts for warning in part[4])),
        )

    def _answers(self, rows: list[int], step: int) -> list[tuple[int, Completion]]:
        if self.data.given is not None:
            return [(row, completion) for row in rows for completion in self.data.given[row]]
        options, seed = self.config.rollout, self.config.trainer.seed
        sampling = Sampling(1.0 if options.temperature is None else options.temperature, options.top_p, options.top_k)
        asked = [(row, number) for row in rows for number in range(answers_a_group(self.config))]
        problems = [self.data.train[row] for row, _ in asked]
        requests = [
            problem.request((seed, step, *key), options.max_new_tokens)
            for problem, key in zip(problems, asked, strict=True)
        ]
        completions = self.answerer.answer(problems, requests, sampling, self._alive)
        return [(row, completion) for (row, _), completion in zip(asked, completions, strict=True)]

    def _alive(self, _: int) -> None:
        self.world.watchdog.alive()
