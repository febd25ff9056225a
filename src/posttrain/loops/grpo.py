"""Reinforcement learning from groups of answers, as a loop to read in one go."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from posttrain.config.checks import check_grpo
from posttrain.config.schema import Config
from posttrain.data.images.loader import ImageLoader
from posttrain.engine.build import build_engine, build_reference
from posttrain.engine.engine import Engine
from posttrain.engine.export import assemble
from posttrain.errors import RunError
from posttrain.loops.answering import (
    LOOKED_AT,
    Answerer,
    check_engine_sees,
    check_judged,
    check_prompts_whole,
    open_tools,
)
from posttrain.loops.answers_shown import show_answers
from posttrain.loops.given import read_completions
from posttrain.loops.learner import Learner
from posttrain.loops.prompts import describe_prompts, open_prompts, prompt_report, updates_of
from posttrain.loops.rollout_engine import adapter_rank, hand_over, open_rollout
from posttrain.loops.sft import write_gradients
from posttrain.loops.step_answers import StepAnswers, answers_a_group
from posttrain.loops.training_data import chat_maker
from posttrain.loops.training_run import TrainingRun, joined
from posttrain.loops.validation import accuracy_of
from posttrain.rewards.score import open_scorer
from posttrain.run.progress import Display


def grpo(config: Config, resolved_yaml: str, gradients_to: str | None = None, completions: str | None = None) -> None:
    """Learn as the options say. `completions` names a file with answers to use instead of drawing any; `gradients_to` writes the
    gradients of the first update to that file and stops.

    Raises InputError before training where something is wrong, RunError where a run cannot go on.
    """
    check_grpo(config)
    check_prompts_whole(config.tools, config.data.truncation)
    with (
        joined(config) as (world, dtype, display),
        TrainingRun.open(config, resolved_yaml, world, display) as run,
        ExitStack() as opened,
    ):
        scorer = world.everyone(lambda: opened.enter_context(open_scorer(config.reward)))
        chat = world.everyone(chat_maker(config))
        check_engine_sees(config.rollout.name, chat)
        tools = opened.enter_context(open_tools(config.tools, chat, world))
        data = open_prompts(config, chat, tools, world, display)
        if completions is not None:
            given = world.everyone(lambda: read_completions(completions, data, answers_a_group(config)))
            data = data.answered_by(given)
        run.plan(data, describe_prompts(data, config, world), prompt_report(data))
        files = ", ".join(config.data.train_files)
        if said := world.everyone(lambda: check_judged(data.train[:LOOKED_AT], files, scorer, config.reward.names)):
            display.say(said)
        engine = build_engine(
            config.model, config.engine, config.optim, sum(updates_of(data.schedule, config)), world, dtype,
            packing=config.data.packing, seed=config.trainer.seed, temperature=config.rollout.temperature or 1.0,
            dropout=False, images=data.images,
        )  # fmt: skip
        reference = build_reference(engine, config.model, config.engine, dtype) if config.algorithm.kl_coef else None
        make_model = partial(assemble, engine, dtype, world.device.torch_device)
        with open_rollout(
            config,
            engine.policy.lm,
            make_model,
            chat.tokenizer,
            data.end_ids,
            world,
            run.folder.path,
            adapter_rank(engine),
            chat.images,
        ) as rollout:
            run.resume(engine)
            loader = ImageLoader(data.images) if data.images else None
            learner = Learner(config, engine, reference, loader)
            answers = StepAnswers(Answerer(rollout, tools, config.data.max_length), scorer, data, config, world)
            if gradients_to is not None:
                hand_over(engine, rollout)
                learner.gather_gradients(answers.step(run.step), run.step, len(data.rows(run.step)))
                write_gradients(engine, gradients_to, display)
                return
            train(run, learner, answers)
            run.finish(engine)


def train(run: TrainingRun, learner: Learner, answers: StepAnswers) -> None:
    """Steps until the schedule ends, or something asks to stop."""
    engine, data, trainer = learner.engine, answers.data, run.config.trainer
    rollout = answers.answerer.rollout
    began_at, num_updates, unjudged = run.step, 0, 0  # unjudged: steps in a row of which no answer could be judged
    if run.step == 0 and trainer.val_before_train:
        run.judge(engine, validate(engine, answers, run.display))
    run.begin()
    while run.step < data.schedule.num_steps and not run.stopping:
        hand_over(engine, rollout)
        found = answers.step(run.step)
        if engine.world.device.has_own_memory:
            engine.world.everyone(rollout.sleep)  # training has the device's memory now
        answers.say_what_is_wrong(found, run.step + 1, run.display)
        unjudged = unjudged + 1 if found.num_unknown == len(found) else 0
        if unjudged == (trainer.max_skipped_steps if num_updates else 1):
            raise RunError(f"step {run.step + 1}: {found.about_unknown}\nMend the reward; checkpoints are untouched.")
        work = learner.learn(found, run.step, len(data.rows(run.step)))
        num_updates += len(work.updates)
        run.record(work)
        if run.due(trainer.sample_freq):
            run.world.on_main(partial(show_answers, found, run.step, run.display, run.folder))
        if run.due(trainer.test_freq):
            run.judge(engine, validate(engine, answers, run.display))
        if run.due(trainer.save_freq):
            run.save(engine)
    if run.step > began_at and not num_updates:
        run.display.say(
            "no step had a group whose answers earned different rewards, so that the weights did not move. Look at the answers in "
            "samples/, and at reward.name, rollout.max_new_tokens and what the model can do."
        )


def validate(engine: Engine, answers: StepAnswers, display: Display) -> dict[str, float]:
    """Accuracy on the validation problems; empty without any."""
    data, config = answers.data, answers.config
    if not data.val:
        return {}
    hand_over(engine, answers.answerer.rollout)
    return accuracy_of(
        data.val, answers.answerer, answers.scorer, engine.world, config.rollout, config.trainer.seed, display.say
    )
