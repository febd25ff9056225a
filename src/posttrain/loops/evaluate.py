"""Evaluation is the road of reinforcement learning without the update: prompts, answers, verdicts, a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.schema import Config
from posttrain.data.formats import Columns
from posttrain.data.sources import find_sources, read_rows
from posttrain.distributed.device import choose_device
from posttrain.distributed.watchdog import watching
from posttrain.distributed.world import World, join_world
from posttrain.errors import InputError
from posttrain.loops.answering import (
    Answer,
    Answerer,
    answer_all,
    check_engine_sees,
    check_judged,
    judge_all,
    open_tools,
    read_problems,
    requests_for,
)
from posttrain.loops.rollout_engine import give, open_rollout
from posttrain.loops.training_data import chat_maker
from posttrain.models.load import find_model, load_model
from posttrain.rewards.accuracy import Accuracy
from posttrain.rewards.score import open_scorer
from posttrain.rollout.rollout import Sampling
from posttrain.run.progress import Display


def evaluate(config: Config, files: Sequence[str], output: Path, limit: int | None = None) -> Accuracy:
    """Answer and judge the problems of `files` (rollout.n times each), write a line for each answer to `output`, and give the accuracy.

    Raises InputError where no row can be judged or the model cannot be loaded.
    """
    answers, shown = _answers(config, files, "--test_file", limit, judged=True)
    if shown:
        _write_lines(output, [answer.as_record() for answer in answers])
    return Accuracy.of([answer.verdict for answer in answers], config.rollout.n or 1)


def generate(config: Config, files: Sequence[str], output: Path, num_samples: int) -> list[Answer]:
    """Answer the first prompts of `files` and write them to `output`, to look at."""
    answers, shown = _answers(config, files, "--prompts", num_samples)
    if shown:
        _write_lines(output, [answer.as_record() for answer in answers])
    return answers


def _answers(
    config: Config, files: Sequence[str], option: str, limit: int | None, judged: bool = False
) -> tuple[list[Answer], bool]:
    """Answers on every process; the last value is true on the one that writes."""
    _check_whole(config.model.lora_adapter_path)
    data = config.data
    device = choose_device(config.trainer.device)
    with (
        watching(config.trainer.hang_timeout_seconds) as watchdog,
        join_world(device, device.compute_dtype("float32"), watchdog=watchdog) as world,
        Display(world.is_main, watchdog.alive) as display,
        ExitStack() as opened,
    ):
        scorer = world.everyone(lambda: opened.enter_context(open_scorer(config.reward)))
        chat = world.everyone(chat_maker(config))
        check_engine_sees(config.rollout.name, chat)
        tools = opened.enter_context(open_tools(config.tools, chat, world))
        sources = world.everyone(lambda: find_sources(list(files), option, data.val_split, data.hub_config))
        problems, report = world.everyone(
            lambda: read_problems(read_rows(sources), Columns.of(data, answers_needed=False), chat, limit, tools=tools)
        )
        left_out = [
            f"left out {count:,}: {reason}, such as {report.places[reason][0]}"
            for reason, count in report.rows_dropped.items()
        ]
        if not problems:
            raise InputError("\n".join([f"{option} {', '.join(files)}: no row can be used.", *left_out]))
        for line in left_out:
            display.say(line)
        if judged:
            world.everyone(lambda: check_judged(problems, ", ".join(files), scorer, config.reward.names))
        options = config.rollout
        model = _model(config, world)
        logs = Path(config.trainer.default_local_dir) if config.rollout.name == "vllm" else Path()
        rollout = opened.enter_context(
            open_rollout(config, model, lambda: model, chat.tokenizer, [], world, logs, images=chat.images)
        )
        if options.name == "vllm":
            watchdog.beat("handing over weights", patient=True)
            give(iter(model.state_dict().items()), rollout.take, world)
        count = options.n or 1
        asked = [problem for problem in problems for _ in range(count)]
        requests = requests_for(problems, count, options.max_new_tokens, config.trainer.seed)
        sampling = Sampling(options.temperature or 0.0, options.top_p, options.top_k)
        watchdog.beat("answering", patient=True)
        display.begin_work("answering", -(-len(requests) // world.size))
        answerer = Answerer(rollout, tools, data.max_length)
        completions = answer_all(answerer, asked, requests, sampling, world, display.advance)
        for warning in rollout.warnings:
            display.say(warning)
        display.begin_work("judging", None)
        answers = judge_all(asked, completions, scorer, world, display.advance)
        display.end_work()
        if judged and world.is_main:
            for line in _about_rewards(answers):
                print(line, file=sys.stderr)  # stdout may be the one JSON object
        return answers, world.is_main


def _about_rewards(answers: list[Answer]) -> Iterator[str]:
    """The mean of each reward where there are several numbers, and the first of the answers that have none."""
    names = list(dict.fromkeys(name for answer in answers for name in answer.score.parts))
    known = {name: [part for a in answers if (part := a.score.parts.get(name)) is not None] for name in names}
    if len(names) > 1:
        yield "means: " + ", ".join(f"{name} {np.mean(parts):.4g}" for name, parts in known.items() if parts)
    problems = [answer.score.problem for answer in answers if answer.score.problem is not None]
    if problems:
        yield f"{len(problems):,} answers could not be told, such as: {problems[0]}"


def _check_whole(adapter: str | None) -> None:
    """Raise InputError where an adapter is to answer, without which the model would answer as it was before."""
    if adapter is None:
        return
    merged = Path(adapter).parent
    found = f"{merged}" if (merged / "config.json").exists() else "the checkpoint-final of a run of posttrain"
    raise InputError(
        f"model.lora_adapter_path={adapter}: answers are written by whole models, not by a model with an adapter beside it. Give the "
        f"one that has it merged, {found}, by --model."
    )


def _model(config: Config, world: World) -> Any:
    options = config.model
    model = world.everyone(
        lambda: load_model(
            find_model(options.path),
            dtype=world.device.compute_dtype(options.dtype),
            random_weights=options.random_weights,
            override_config=options.override_config,
            revision=options.revision,
            trust=options.trust_remote_code,
            seed=config.trainer.seed,
        )
    )
    return model.to(world.device.torch_device).eval()


def _write_lines(path: Path, records: list[dict[str, object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        aside.replace(path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error}.") from None
