"""Validation during a run: the loss over every row and, where asked for, the accuracy of generated answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np

from posttrain.config.schema import Config, RolloutOptions
from posttrain.data.formats import Columns
from posttrain.data.sources import read_rows
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.engine.export import assemble
from posttrain.errors import InputError
from posttrain.loops.answering import (
    LOOKED_AT,
    Answerer,
    Problem,
    answer_all,
    check_judged,
    judge_all,
    read_problems,
    requests_for,
)
from posttrain.loops.training_data import TrainingData
from posttrain.rewards.accuracy import Accuracy
from posttrain.rewards.score import Score, Scorer, open_scorer
from posttrain.rewards.verdict import Verdict
from posttrain.rollout.rollout import Sampling
from posttrain.rollout.transformers import TransformersRollout

Say = Callable[[str], None]


def open_judge(data: TrainingData, config: Config, world: World, opened: ExitStack) -> Scorer | None:
    """The rewards that validation judges answers by, closed by `opened`; None where none are generated. Every process must call
    this. Raises InputError where they cannot be loaded, or can judge none of the first problems."""
    if data.val is None or not config.trainer.num_val_generations:
        return None
    scorer = world.everyone(lambda: opened.enter_context(open_scorer(config.reward)))
    count, files = min(config.trainer.num_val_generations, LOOKED_AT), ", ".join(config.data.val_files)
    world.everyone(lambda: check_judged(_problems(data, config, count), files, scorer, config.reward.names))
    return scorer


def validate(engine: Engine, data: TrainingData, config: Config, judge: Scorer | None, say: Say) -> dict[str, float]:
    """`val_loss`, and with a judge also what `accuracy_of` finds. Every process calls this.

    Empty without validation rows.
    """
    if data.val is None:
        return {}
    engine.world.watchdog.beat("validation")
    found = {"val_loss": _loss(engine, data)}
    if judge is not None:
        found |= _accuracy(engine, data, config, judge, say)
    return found


def accuracy_of(
    problems: list[Problem],
    answerer: Answerer,
    scorer: Scorer,
    world: World,
    options: RolloutOptions,
    seed: int,
    say: Say,
) -> dict[str, float]:
    """`val_accuracy` with its interval, `val_unknown` and, where any is known, `val_reward`; with several answers a problem also
    pass@k. What could not be judged is said. Every process calls this."""
    world.watchdog.beat("answering", patient=True)
    requests = requests_for(problems, options.val_n, options.max_new_tokens, seed)
    sampling = Sampling(
        options.val_temperature,
        options.top_p if options.val_top_p is None else options.val_top_p,
        options.top_k if options.val_top_k is None else options.val_top_k,
    )

    def alive(_: int) -> None:
        world.watchdog.alive()

    asked = [problem for problem in problems for _ in range(options.val_n)]
    completions = answer_all(answerer, asked, requests, sampling, world, alive)
    scores = [answer.score for answer in judge_all(asked, completions, scorer, world, alive)]
    accuracy = Accuracy.of([score.verdict for score in scores], options.val_n)
    rewards = [score.reward for score in scores if score.reward is not None]
    return {
        "val_accuracy": accuracy.share,
        "val_accuracy_low": accuracy.low,
        "val_accuracy_high": accuracy.high,
        **{f"val_pass_at_{k}": chance for k, chance in accuracy.pass_at.items()},
        **({"val_reward": float(np.mean(rewards))} if rewards else {}),
        "val_unknown": _say_unknown(scores, say),
    }


def _say_unknown(scores: list[Score], say: Say) -> int:
    """How many answers have no verdict or no reward; the first of them is said."""
    unknown = [score for score in scores if score.verdict is Verdict.UNKNOWN or score.reward is None]
    if len(unknown) == len(scores):
        say(f"validation: none of the {len(scores):,} answers could be judged; the first: {unknown[0].problem}")
    elif unknown:
        say(
            f"validation: {len(unknown):,} of {len(scores):,} answers could not be judged, such as: {unknown[0].problem}"
        )
    return len(unknown)


def _loss(engine: Engine, data: TrainingData) -> float:
    """Mean negative log-likelihood over all trained tokens of all validation rows."""
    sums = np.zeros(2)
    for micro_batches in data.validation_passes(engine.world):
        for micro_batch, logprobs_T in zip(micro_batches, engine.forward(micro_batches), strict=True):
            weights_T = micro_batch.weights_T.astype(np.float64)
            sums += [-(logprobs_T * weights_T).sum(), weights_T.sum()]
    total = engine.world.total(sums.tolist())
    return float(total[0] / total[1])


def _accuracy(engine: Engine, data: TrainingData, config: Config, judge: Scorer, say: Say) -> dict[str, float]:
    world = engine.world
    problems = world.on_main(lambda: _problems(data, config, config.trainer.num_val_generations))
    dtype = world.device.compute_dtype(config.model.dtype)
    model = assemble(engine, dtype, world.device.torch_device)
    chat = data.chat
    rollout = TransformersRollout(model, chat.tokenizer, config.rollout.batch_size, data.end_ids, chat.images)
    return accuracy_of(problems, Answerer(rollout), judge, world, config.rollout, config.trainer.seed, say)


def _problems(data: TrainingData, config: Config, count: int) -> list[Problem]:
    """The first problems of the validation rows in use. Raises InputError where none can be asked."""
    columns = Columns.of(config.data, answers_needed=False)
    rows = read_rows(data.val_sources)
    if data.val is not None and data.val.report.rows_not_chosen:
        chosen = set(data.val.rows_N.tolist())
        rows = (row for number, row in enumerate(rows) if number in chosen)
    problems, report = read_problems(rows, columns, data.chat, count)
    if not problems:
        reasons = [f"{found:,}: {report.places[reason][0]}" for reason, found in report.rows_dropped.items()]
        said = "data.val_files: no row can be answered, as trainer.num_val_generations asks for."
        raise InputError("\n".join([said, *reasons]))
    return problems
