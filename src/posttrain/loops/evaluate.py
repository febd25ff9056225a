"""Evaluation is the road of reinforcement learning without the update: prompts, answers, verdicts, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.schema import Config
from posttrain.data.formats import Columns, RowError, conversation_of
from posttrain.data.sources import find_sources, read_rows
from posttrain.distributed.device import choose_device
from posttrain.distributed.watchdog import watching
from posttrain.distributed.world import World, join_world
from posttrain.errors import InputError
from posttrain.loops.answering import Answer, answer_all, judge_all
from posttrain.loops.training_data import chat_maker
from posttrain.models.load import find_model, load_model
from posttrain.records import Conversation
from posttrain.rewards.accuracy import Accuracy
from posttrain.rollout.transformers import TransformersRollout
from posttrain.run.progress import Display


def evaluate(config: Config, files: Sequence[str], output: Path, limit: int | None = None) -> Accuracy:
    """Answer and judge the problems of `files`, write a line for each to `output`, and give the accuracy.

    Raises InputError where no row can be judged or the model cannot be loaded.
    """
    answers, shown = _answers(config, files, "--test_file", limit)
    accuracy = Accuracy.of([answer.verdict for answer in answers])
    if shown:
        _write_lines(output, [answer.as_record() for answer in answers])
    if accuracy.num_judged == 0:
        raise InputError(
            f"None of the {len(answers)} answers could be judged: no row has reward_model.ground_truth or a response that "
            f"ends in a number. The answers lie in {output}."
        )
    return accuracy


def generate(config: Config, files: Sequence[str], output: Path, num_samples: int) -> list[Answer]:
    """Answer the first prompts of `files` and write them to `output`, to look at."""
    answers, shown = _answers(config, files, "--prompts", num_samples)
    if shown:
        _write_lines(output, [answer.as_record() for answer in answers])
    return answers


def read_problems(
    files: Sequence[str], columns: Columns, option: str, split: str, hub_config: str | None, limit: int | None
) -> tuple[list[Conversation], dict[str, int]]:
    """Conversations to answer, and how many rows were left out for which reason."""
    conversations: list[Conversation] = []
    dropped: dict[str, int] = {}
    for row in read_rows(find_sources(list(files), option, split, hub_config)):
        if limit is not None and len(conversations) == limit:
            break
        try:
            conversations.append(conversation_of(row.values, columns))
        except RowError as error:
            dropped[error.kind] = dropped.get(error.kind, 0) + 1
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from None
    if not conversations:
        raise InputError(f"{option} {', '.join(files)}: no row can be used. {dropped or ''}".rstrip())
    return conversations, dropped


def _answers(config: Config, files: Sequence[str], option: str, limit: int | None) -> tuple[list[Answer], bool]:
    """Answers on every process; the last value is true on the one that writes."""
    data = config.data
    device = choose_device(config.trainer.device)
    with (
        watching(config.trainer.hang_timeout_seconds) as watchdog,
        join_world(device, device.compute_dtype("float32"), watchdog=watchdog) as world,
        Display(world.is_main, watchdog.alive) as display,
    ):
        columns = Columns.of(data)
        conversations, dropped = world.everyone(
            lambda: read_problems(files, columns, option, data.val_split, data.hub_config, limit)
        )
        for reason, count in dropped.items():
            display.say(f"left out {count:,} rows: {reason}")
        chat = world.everyone(chat_maker(config))
        rollout = TransformersRollout(_model(config, world), chat.tokenizer, config.rollout, seed=config.trainer.seed)
        watchdog.beat("answering", patient=True)
        display.begin_work("answering", -(-len(conversations) // world.size))
        completions = answer_all(rollout, chat, conversations, world, display.advance)
        display.end_work()
        return judge_all(conversations, completions, config.reward.name), world.is_main


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
