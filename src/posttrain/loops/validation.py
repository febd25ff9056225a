"""Validation during a run: the loss over every row and, where asked for, the accuracy of generated answers."""

from __future__ import annotations

import numpy as np

from posttrain.config.schema import Config, RolloutOptions
from posttrain.data.formats import Columns
from posttrain.data.sources import read_rows
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.engine.export import assemble
from posttrain.loops.answering import Answerer, Problem, answer_all, judge_all, read_problems, requests_for
from posttrain.loops.training_data import TrainingData
from posttrain.rewards.accuracy import Accuracy
from posttrain.rewards.score import Scorer, open_scorer
from posttrain.rollout.rollout import Sampling
from posttrain.rollout.transformers import TransformersRollout


def validate(engine: Engine, data: TrainingData, config: Config) -> dict[str, float]:
    """`val_loss`, and with trainer.num_val_generations also `val_accuracy` with its interval. Every process calls this.

    Empty without validation rows.
    """
    if data.val is None:
        return {}
    engine.world.watchdog.beat("validation")
    found = {"val_loss": _loss(engine, data)}
    if config.trainer.num_val_generations:
        found |= _accuracy(engine, data, config)
    return found


def accuracy_of(
    problems: list[Problem], answerer: Answerer, scorer: Scorer, world: World, options: RolloutOptions, seed: int
) -> dict[str, float]:
    """`val_accuracy` with its interval, with several answers a problem also pass@k. Every process calls this."""
    world.watchdog.beat("answering", patient=True)
    requests = requests_for(problems, options.val_n, options.max_new_tokens, seed)
    sampling = Sampling(options.val_temperature, options.top_p, options.top_k)

    def alive(_: int) -> None:
        world.watchdog.alive()

    asked = [problem for problem in problems for _ in range(options.val_n)]
    completions = answer_all(answerer, asked, requests, sampling, world, alive)
    verdicts = [answer.verdict for answer in judge_all(asked, completions, scorer, world, alive)]
    accuracy = Accuracy.of(verdicts, options.val_n)
    return {
        "val_accuracy": accuracy.share,
        "val_accuracy_low": accuracy.low,
        "val_accuracy_high": accuracy.high,
        **{f"val_pass_at_{k}": chance for k, chance in accuracy.pass_at.items()},
    }


def _loss(engine: Engine, data: TrainingData) -> float:
    """Mean negative log-likelihood over all trained tokens of all validation rows."""
    sums = np.zeros(2)
    for micro_batches in data.validation_passes(engine.world):
        for micro_batch, logprobs_T in zip(micro_batches, engine.forward(micro_batches), strict=True):
            weights_T = micro_batch.weights_T.astype(np.float64)
            sums += [-(logprobs_T * weights_T).sum(), weights_T.sum()]
    total = engine.world.total(sums.tolist())
    return float(total[0] / total[1])


def _accuracy(engine: Engine, data: TrainingData, config: Config) -> dict[str, float]:
    world = engine.world
    count = config.trainer.num_val_generations
    problems, _ = world.on_main(
        lambda: read_problems(
            read_rows(data.val_sources), Columns.of(config.data, answers_needed=False), data.chat, count
        )
    )
    dtype = world.device.compute_dtype(config.model.dtype)
    model = assemble(engine, dtype, world.device.torch_device)
    rollout = TransformersRollout(model, data.chat.tokenizer, config.rollout.batch_size, data.end_ids)
    with open_scorer(config.reward) as scorer:
        return accuracy_of(problems, Answerer(rollout), scorer, world, config.rollout, config.trainer.seed)
