"""The prompts of a run that learns from its own answers: read once, their steps known before a model is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.schema import Config, DataOptions
from posttrain.data.batches import Schedule, choose
from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import Columns, RowError, prompt_of
from posttrain.data.images.names import reference_of
from posttrain.data.images.processor import ImageText
from posttrain.data.sources import find_sources, read_rows
from posttrain.data.tokenized import Report
from posttrain.distributed.world import World
from posttrain.errors import InputError
from posttrain.loops.answering import Problem, read_problems
from posttrain.loops.training_data import not_chosen, schedule_of, without_effect_here
from posttrain.records import Completion, Conversation
from posttrain.rollout.tools import Tools
from posttrain.run.progress import Display
from posttrain.wording import counted

ANSWERS_A_GROUP = 8  # where rollout.n is not given


@dataclass(frozen=True)
class PromptData:
    """Problems to learn from and to validate on, and which of them each step takes."""

    train: list[Problem]
    val: list[Problem]
    report: Report
    val_report: Report
    schedule: Schedule
    chat: ChatTokenizer
    rules: str  # fingerprint of what else decides on the answers of a step and what becomes of them
    given: dict[int, list[Completion]] | None = None  # answers to learn from instead, by the number of their prompt

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that changes the prompts of a step, or how they are answered and judged."""
        seen = hashlib.sha256()
        for problem in self.train:
            seen.update(problem.prompt_ids_T.tobytes())
            seen.update(repr(problem.ground_truth).encode())
            for image in problem.images:
                seen.update(reference_of(image.source).encode())
        plan = (self.schedule.batch_size, self.schedule.seed, self.schedule.shuffle, self.rules)
        return f"{seen.hexdigest()[:24]}-{'-'.join(map(str, plan))}"

    @property
    def images(self) -> ImageText | None:
        """How those of the prompts that are learnt from are prepared; None where no prompt has any."""
        return self.chat.images if any(problem.images for problem in self.train) else None

    @cached_property
    def end_ids(self) -> list[int]:
        """The token that the template puts behind an answer, which is the one to stop at."""
        asked = self.train[0].conversation
        answered = [*prompt_of(asked.messages), {"role": "assistant", "content": "1"}]
        conversation = Conversation(answered, asked.tools, asked.template_kwargs, images=asked.images)
        (found,) = self.chat.encode_many([conversation])
        if isinstance(found, RowError):  # then the model's own and the tokenizer's must do
            return []
        return self.chat.end_ids(found[-1].ids_T, found[-1].weights_T)

    def answered_by(self, given: dict[int, list[Completion]]) -> PromptData:
        """The same where every step takes these answers and no others."""
        schedule = replace(self.schedule, num_rows=len(given), batch_size=len(given), shuffle=False)
        seen = hashlib.sha256()
        for row, completions in given.items():
            for segment in (segment for completion in completions for segment in completion.segments):
                seen.update(repr(row).encode() + segment.ids_T.tobytes())
        rules = f"{self.rules}-{seen.hexdigest()[:12]}"
        return replace(self, schedule=schedule, given=given, rules=rules)

    def rows(self, step: int, extra: int = 0) -> list[int]:
        """The numbers of a step's problems; with `extra` further ones, a function of both numbers."""
        if self.given is not None:
            return list(self.given)
        rows = self.schedule.rows(step)
        if extra:
            stream = np.random.Generator(np.random.Philox(key=[self.schedule.seed, (1 << 32) + step]))
            others = stream.permutation(np.setdiff1d(np.arange(len(self.train)), rows))
            rows = others[(extra - 1) * self.schedule.batch_size : extra * self.schedule.batch_size]
        return rows.tolist()


def open_prompts(
    config: Config, chat: ChatTokenizer, tools: Tools | None, world: World, display: Display
) -> PromptData:
    """Prompts that offer the tools, and the schedule. Every process must call this. Raises InputError for what cannot be learnt
    from."""
    data = config.data
    longest = data.max_prompt_length or (data.max_length - 1 if tools else None)
    world.watchdog.beat("preparing prompts")

    def read(
        files: list[str], option: str, split: str, most: int | None, limit: int | None = None
    ) -> tuple[list[Problem], Report]:
        display.begin_work(f"reading {option}", None)
        try:
            sources = find_sources(files, option, split, data.hub_config)
            problems, report = read_problems(
                read_rows(sources), Columns.of(data, answers_needed=False), chat,
                limit if most is None else None, display.advance, tools,
            )  # fmt: skip
            kept, report = _within(problems, report, longest, data, option)
            chosen = [kept[i] for i in choose(len(kept), most, config.trainer.seed, data.shuffle)]
            report.rows_used, report.rows_not_chosen = len(chosen), len(kept) - len(chosen)
            return chosen[:limit], report
        finally:
            display.end_work()

    train, report = world.everyone(
        lambda: read(data.train_files, "data.train_files", data.train_split, data.train_max_samples)
    )
    val, val_report = (
        world.everyone(
            lambda: read(
                data.val_files,
                "data.val_files",
                data.val_split,
                data.val_max_samples,
                config.trainer.num_val_generations,
            )
        )
        if data.val_files
        else ([], Report())
    )
    _check_lengths(train, config)
    return PromptData(train, val, report, val_report, schedule_of(len(train), config), chat, _rules(config))


def prompt_report(data: PromptData) -> dict[str, Any]:
    """data_report.json: what became of every row."""

    def facts(problems: list[Problem], report: Report) -> dict[str, Any]:
        return {
            "rows_read": report.rows_read,
            "rows_used": len(problems),
            "rows_not_chosen": report.rows_not_chosen,
            "rows_dropped": report.rows_dropped,
            "examples": report.places,
            "num_tokens": sum(len(problem.prompt_ids_T) for problem in problems),
            "num_trained_tokens": 0,  # prompts are asked, answers are learnt from
        }

    val = {"val": facts(data.val, data.val_report)} if data.val else {}
    return {"train": facts(data.train, data.report), **val, **facts(data.train, data.report)}


def describe_prompts(data: PromptData, config: Config, world: World) -> list[str]:
    """The arithmetic of the run, as lines to print before it starts."""
    lines, schedule, algorithm = [], data.schedule, config.algorithm
    for name, problems, report in (("train", data.train, data.report), ("val", data.val, data.val_report)):
        if not problems:
            continue
        lengths = [len(problem.prompt_ids_T) for problem in problems]
        lines.append(
            f"{name}: {len(problems):,} of {report.rows_read:,} prompts, {np.median(lengths):.0f} tokens long (median), "
            f"longest {max(lengths)}"
        )
        lines += not_chosen(report, name, config)
        lines += [
            f"  left out {count:,}: {reason}, such as {report.places[reason][0]}"
            for reason, count in report.rows_dropped.items()
        ]
    updates = sum(updates_of(schedule, config))
    answers = (
        f"prompts x {config.rollout.n or ANSWERS_A_GROUP} answers of at most {config.rollout.max_new_tokens} tokens"
        if data.given is None
        else f"prompts with {sum(map(len, data.given.values())):,} given answers, the same in each"
    )
    lines.append(
        f"{counted(schedule.num_steps, 'step')} of {schedule.batch_size} {answers}, {counted(updates, 'update')} of the weights, "
        f"on {counted(world.size, 'process', 'processes')} ({world.device.type})"
    )
    if algorithm.kl_coef:
        which = (
            "the model without its adapters"
            if config.model.lora_rank or config.model.lora_adapter_path
            else "a copy of the model that the run begins with"
        )
        lines.append(f"the divergence from {which} counts {algorithm.kl_coef:g} in the {algorithm.kl_in}")
    return lines + without_effect_here(data.chat, config, world)


def updates_of(schedule: Schedule, config: Config) -> list[int]:
    """How often each step moves the weights."""
    mini, epochs = config.algorithm.ppo_mini_batch_size or schedule.batch_size, config.algorithm.ppo_epochs
    full = parts_of(schedule.batch_size, mini) * epochs
    left = schedule.num_rows - (schedule.steps_per_epoch - 1) * schedule.batch_size
    last = parts_of(left, mini) * epochs
    return [last if (step + 1) % schedule.steps_per_epoch == 0 else full for step in range(schedule.num_steps)]


def parts_of(num_prompts: int, mini_batch_size: int) -> int:
    """Updates that so many prompts are dealt to."""
    return -(-num_prompts // mini_batch_size)


def _rules(config: Config) -> str:
    """Changes with every option, and with the file of rewards, that decides what is learnt from a prompt."""
    rollout = config.rollout
    sampling = (rollout.n or ANSWERS_A_GROUP, rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    sections = [section.model_dump_json() for section in (config.algorithm, config.reward, config.tools)]
    rewards = Path(config.reward.path).read_bytes() if config.reward.path else b""
    return hashlib.sha256(repr((sampling, sections, rewards)).encode()).hexdigest()[:12]


def _check_lengths(problems: list[Problem], config: Config) -> None:
    """Raise InputError where a prompt with its answer does not fit into the micro-batch that someone asked for."""
    limit, new = config.data.max_tokens_per_gpu, config.rollout.max_new_tokens
    longest = max(len(problem.prompt_ids_T) for problem in problems)
    if limit is not None and longest + new > limit * config.engine.ulysses_sequence_parallel_size:
        raise InputError(
            f"data.max_tokens_per_gpu={limit} does not hold the longest prompt, of {longest} tokens, with an answer of {new}. Raise it, "
            "or lower rollout.max_new_tokens or data.max_prompt_length."
        )


def _within(
    problems: list[Problem], report: Report, longest: int | None, data: DataOptions, option: str
) -> tuple[list[Problem], Report]:
    """The problems whose prompts fit, cut or left out as data.truncation says. Raises InputError."""
    if report.rows_dropped and data.invalid_rows == "error":
        reason = next(iter(report.rows_dropped))
        raise InputError(f"{report.places[reason][0]}\nLeave such rows out with data.invalid_rows=drop.")
    limit = "data.max_prompt_length" if data.max_prompt_length else "data.max_length - 1"
    kept, how = [], data.truncation
    for problem in problems:
        length = len(problem.prompt_ids_T)
        if longest is None or length <= longest:
            kept.append(problem)
        elif how == "error":
            most = max(len(other.prompt_ids_T) for other in problems)
            raise InputError(
                f"{option}: the prompt of {problem.place} has {length} tokens, more than {limit} = {longest}; the "
                f"longest has {most}. Raise it, or choose data.truncation=drop, left or right."
            )
        elif how == "drop":
            report.drop(f"longer than {limit}", f"{problem.place}: {length} tokens")
        else:
            begin = length - longest if how == "left" else 0
            if shortened := problem.cut(begin, begin + longest):
                kept.append(shortened)
            else:
                report.drop(f"an image does not fit {limit}", _too_large(problem, limit, longest))
    if not kept:
        reasons = [f"{count:,}: {report.places[reason][0]}" for reason, count in report.rows_dropped.items()]
        raise InputError("\n".join([f"{option}: no row can be asked.", *reasons]))
    return kept, report


def _too_large(problem: Problem, limit: str, longest: int) -> str:
    most = max(image.end - image.begin for image in problem.images)
    return (
        f"{problem.place}: the prompt has {len(problem.prompt_ids_T)} tokens, more than {limit} = {longest}, and cutting it would cut "
        f"or drop an image (the largest has {most} tokens). Raise it, or let model.processor_kwargs make images smaller"
    )
