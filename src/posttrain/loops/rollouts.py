"""Prompts of a step -> answers -> rewards, on all processes together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from posttrain.config.schema import Config
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.engine.export import assemble
from posttrain.loops.answering import Answerer, Problem, answered
from posttrain.loops.experience import Experience, experience
from posttrain.loops.prompts import ANSWERS_A_GROUP, PromptData
from posttrain.records import Completion
from posttrain.rewards.score import Scorer
from posttrain.rollout.rollout import Request, Rollout, Sampling
from posttrain.rollout.transformers import TransformersRollout
from posttrain.run.progress import Display


@contextmanager
def open_rollout(engine: Engine, data: PromptData, config: Config) -> Iterator[Rollout]:
    """The engine that answers, with the weights that the run begins with. Every process must call this."""
    world = engine.world
    dtype = world.device.compute_dtype(config.model.dtype)
    model = assemble(engine, dtype, world.device.torch_device)
    rollout = TransformersRollout(model, data.chat.tokenizer, config.rollout.batch_size, data.end_ids)
    try:
        yield rollout
    finally:
        rollout.close()


def answers_a_group(config: Config) -> int:
    return config.rollout.n or ANSWERS_A_GROUP


@dataclass(frozen=True)
class Answering:
    """Answers and judges the prompts of a step. Every process must call it."""

    answerer: Answerer
    scorer: Scorer
    data: PromptData
    config: Config
    world: World
    given: dict[int, list[Completion]] | None = None  # completions to use instead, by the number of their prompt

    def step(self, step: int) -> Experience:
        """The answers of a step: a function of the weights, the seed and the step. With algorithm.filter_groups up to
        algorithm.max_num_gen_batches batches of prompts are asked, until as many groups as wanted have a signal."""
        algorithm = self.config.algorithm
        found = self._batch(self.data.problems(step), step)
        if not algorithm.filter_groups:
            return found
        wanted = len(self.data.schedule.rows(step))
        for extra in range(1, algorithm.max_num_gen_batches):
            if found.num_with_signal >= wanted:
                break
            more = self.data.problems(step, extra)
            found = found.joined(self._batch(more, step)) if more else found
        return found

    def say_what_is_wrong(self, found: Experience, step: int, display: Display) -> None:
        """What the rollout engine warns of, and the first answer of the step that nobody could judge."""
        warnings = self.answerer.rollout.warnings
        while warnings:
            display.say(warnings.pop(0))
        unknown = [score.problem for score in found.scores if score.reward is None]
        if unknown:
            display.say(
                f"step {step}: {len(unknown)} of {len(found)} answers could not be judged, such as: {unknown[0]}"
            )

    def _batch(self, problems: Sequence[tuple[int, Problem]], step: int) -> Experience:
        config, world = self.config, self.world
        world.watchdog.beat("answering", patient=True)
        own = problems[world.rank :: world.size]  # whole groups, whose prompt is read once
        asked = [pair for pair in own for _ in range(answers_a_group(config))]
        if self.given is not None:
            asked = [(number, problem) for number, problem in own for _ in self.given.get(number, [])]
        started = time.perf_counter()
        completions = world.everyone(lambda: self._completions(own, asked, step))
        answered_at = time.perf_counter()
        scores = world.everyone(
            lambda: self.scorer.score(
                [answered(p, c) for (_, p), c in zip(asked, completions, strict=True)],
                lambda done: world.watchdog.alive(),
            )
        )
        seconds = {"rollout": answered_at - started, "reward": time.perf_counter() - answered_at}
        tools = self.answerer.tools
        counts = asdict(tools.take_counts()) if tools else {}
        parts = world.gather((asked, completions, scores, seconds, counts))
        order = {number: place for place, (number, _) in enumerate(problems)}
        triples = sorted(
            (triple for part in parts for triple in zip(*part[:3], strict=True)), key=lambda triple: order[triple[0][0]]
        )
        return experience(
            [pair for pair, _, _ in triples],
            [completion for _, completion, _ in triples],
            [score for _, _, score in triples],
            config.algorithm,
            config.rollout.max_new_tokens,
            {name: max(part[3][name] for part in parts) for name in seconds},
            {name: sum(part[4][name] for part in parts) for name in counts},
        )

    def _completions(
        self, own: Sequence[tuple[int, Problem]], asked: Sequence[tuple[int, Problem]], step: int
    ) -> list[Completion]:
        if self.given is not None:
            return [completion for number, _ in own for completion in self.given.get(number, [])]
        options, seed = self.config.rollout, self.config.trainer.seed
        sampling = Sampling(1.0 if options.temperature is None else options.temperature, options.top_p, options.top_k)
        count = answers_a_group(self.config)
        requests = [
            Request(problem.prompt_ids_T, (seed, step, number, index % count), options.max_new_tokens)
            for index, (number, problem) in enumerate(asked)
        ]
        problems = [problem for _, problem in asked]
        return self.answerer.answer(problems, requests, sampling, lambda done: self.world.watchdog.alive())
