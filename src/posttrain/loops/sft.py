"""Supervised fine-tuning, as a loop to read in one go."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack

import numpy as np

from posttrain.config.schema import Config
from posttrain.distributed.world import World
from posttrain.engine.build import build_engine
from posttrain.engine.engine import Engine
from posttrain.loops.step_log import StepWork
from posttrain.loops.training_data import TrainingData, data_report, describe, open_training_data
from posttrain.loops.training_run import TrainingRun, joined
from posttrain.loops.validation import open_judge, validate
from posttrain.losses.sft import sft_loss
from posttrain.rewards.score import Scorer
from posttrain.run.progress import Display


def sft(config: Config, resolved_yaml: str, gradients_to: str | None = None) -> None:
    """Train as the options say. `gradients_to` writes the first step's gradients to that file and stops.

    Raises InputError before training where something is wrong, RunError where a run cannot go on.
    """
    with (
        joined(config) as (world, dtype, display),
        TrainingRun.open(config, resolved_yaml, world, display) as run,
        ExitStack() as opened,
    ):
        data = open_training_data(config, world, display)  # lengths and steps are known before a model is loaded
        run.plan(data, describe(data, config, world), data_report(data))
        judge = open_judge(data, config, world, opened)
        engine = build_engine(
            config.model, config.engine, config.optim, data.schedule.num_steps, world, dtype,
            packing=config.data.packing, seed=config.trainer.seed, images=data.images,
        )  # fmt: skip
        run.resume(engine)
        if gradients_to is not None:
            engine.forward_backward(data.micro_batches(run.step, world), sft_loss)
            write_gradients(engine, gradients_to, display)
            return
        train(run, engine, data, world, judge)
        run.finish(engine)


def train(run: TrainingRun, engine: Engine, data: TrainingData, world: World, judge: Scorer | None) -> None:
    """Steps until the schedule ends, or something asks to stop."""
    say = run.display.say
    if run.step == 0 and run.config.trainer.val_before_train:
        run.judge(engine, validate(engine, data, run.config, judge, say))
    run.begin()
    while run.step < data.schedule.num_steps and not run.stopping:
        world.watchdog.beat("reading rows", step=run.step + 1)
        started = time.perf_counter()
        micro_batches = data.micro_batches(run.step, world)
        waited = time.perf_counter() - started
        loss = engine.forward_backward(micro_batches, sft_loss)
        update = engine.optim_step()
        run.record(StepWork([(loss, update)], micro_batches, waited))
        if run.due(run.config.trainer.test_freq):
            run.judge(engine, validate(engine, data, run.config, judge, say))
        if run.due(run.config.trainer.save_freq):
            run.save(engine)


def evaluate_loss(config: Config) -> dict[str, float]:
    """The validation loss of a model, without training: what `--eval_only` prints."""
    with (
        joined(config) as (world, dtype, display),
        ExitStack() as opened,
    ):
        data = open_training_data(config, world, display)
        judge = open_judge(data, config, world, opened)
        engine = build_engine(
            config.model, config.engine, config.optim, 1, world, dtype,
            packing=config.data.packing, seed=config.trainer.seed, images=data.images,
        )  # fmt: skip

        def say(text: str) -> None:
            if world.is_main:
                print(text, file=sys.stderr)  # stdout may be the one JSON object

        return validate(engine, data, config, judge, say)


def write_gradients(engine: Engine, path: str, display: Display) -> None:
    """Write the whole gradients (float32, by parameter name) of what the engine gathered so far as safetensors."""
    from safetensors.torch import save_file

    gradients = {name: gradient.float().cpu().contiguous() for name, gradient in engine.named_gradients()}
    if engine.world.is_main:
        save_file(gradients, path)
        norm = math.sqrt(sum(float(np.square(g.double().norm().item())) for g in gradients.values()))
        display.say(f"{len(gradients)} gradients of step {engine.step}, norm {norm:.6g}, lie in {path}")
