"""`posttrain quickstart`: problems, a tiny model, fine-tuning, reinforcement learning, its accuracy at each stage, a table.

Each stage is a model and its accuracy on the same held-out problems: with its likeliest answers, and with answers drawn.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from posttrain.config.compose import Resolved, compose
from posttrain.data.prepare import prepare_gsm8k
from posttrain.distributed.device import HOST
from posttrain.errors import InputError
from posttrain.loops.evaluate import evaluate
from posttrain.loops.grpo import grpo
from posttrain.loops.sft import sft
from posttrain.quickstart.problems import make_problems, write_problems
from posttrain.quickstart.tiny import write_tiny_model
from posttrain.rewards.accuracy import Accuracy, Difference
from posttrain.rewards.verdict import Verdict
from posttrain.run.progress import duration

NUM_TRAIN, NUM_PROMPTS, NUM_TEST = 16_000, 4_000, 1_000
NUM_TOKENIZER_TEXTS = 4_000
NUM_SHOWN = 3


@dataclass(frozen=True)
class Stage:
    """A model on the way, with what it can do."""

    name: str
    model: Path
    answers: Path  # the likeliest; those drawn lie beside them
    accuracy: Accuracy
    sampled: Accuracy
    seconds: float  # that its training took

    @property
    def drawn(self) -> Path:
        return self.answers.with_stem(f"{self.answers.stem}-drawn")

    def as_record(self) -> dict[str, Any]:
        """Its part of results.json."""
        a, sampled = self.accuracy, self.sampled
        return {
            "stage": self.name, "model": str(self.model), "answers": str(self.answers), "accuracy": a.share,
            "low": a.low, "high": a.high, "num_problems": a.num_problems, "num_correct": a.num_correct,
            "num_unknown": a.num_unknown, "sampled_accuracy": sampled.share, "sampled_low": sampled.low,
            "sampled_high": sampled.high, "train_seconds": round(self.seconds, 1),
        }  # fmt: skip


def quickstart(folder: Path, seed: int) -> None:
    """Run every stage in `folder`, print the table and write results.json."""
    if (folder / "results.json").exists() or (folder / "sft").exists():
        raise InputError(f"{folder} holds a quickstart already. Delete it, or give another one with --folder.")
    # products as small as this model's gain little from a second thread, and lose much where the cores are shared
    torch.set_num_threads(1)
    console, started = Console(highlight=False, soft_wrap=True), time.monotonic()
    console.print(f"[bold]1/5[/bold] writing {NUM_TRAIN:,} word problems with answers to learn from, {NUM_PROMPTS:,} without and "
                  f"{NUM_TEST:,} held out")  # fmt: skip
    _write_data(folder, seed)
    console.print("[bold]2/5[/bold] building a tiny Qwen2 model with random weights, and its tokenizer")
    _write_model(folder, seed)
    console.print("[bold]3/5[/bold] its accuracy before training")
    stages = [_judged("before", folder / "model", folder, 0.0)]
    console.print(
        f"  {stages[0].accuracy}\n[bold]4/5[/bold] supervised fine-tuning (SFT): it imitates the answers that it is shown"
    )
    before = time.monotonic()
    options = sft_options(folder, seed)
    sft(options.config, options.as_yaml())
    stages.append(_judged("after SFT", folder / "sft", folder, time.monotonic() - before))
    console.print(
        f"  {stages[1].accuracy}\n[bold]5/5[/bold] reinforcement learning (GRPO): it answers by itself, and learns from what is right"
    )
    before = time.monotonic()
    options = grpo_options(folder, seed)
    grpo(options.config, options.as_yaml())
    stages.append(_judged("after SFT + GRPO", folder / "grpo", folder, time.monotonic() - before))
    gains = _gains(*stages[1:])
    _write_results(folder, stages, gains, time.monotonic() - started)
    console.print(results_table(stages))
    for name, gain in gains.items():
        console.print(f"GRPO against SFT alone, on the same problems, {name} answers: {gain}")
    _show_answers(console, stages[-1])
    _say_where(console, folder, time.monotonic() - started)


def sft_options(folder: Path, seed: int, *more: str) -> Resolved:
    """The options of the quickstart's fine-tuning: those of the recipe method=quickstart, and this folder's paths."""
    rows = folder / "data" / "train.parquet"
    return _options(
        "sft", "quickstart", folder / "model", rows, folder, seed, f"data.cache_dir={folder / 'cache'}", *more
    )


def grpo_options(folder: Path, seed: int, *more: str) -> Resolved:
    """The options of the quickstart's reinforcement learning: those of method=quickstart-grpo, and this folder's paths."""
    return _options(
        "grpo", "quickstart-grpo", folder / "sft", folder / "problems" / "prompts.jsonl", folder, seed, *more
    )


def _options(command: str, method: str, model: Path, rows: Path, folder: Path, seed: int, *more: str) -> Resolved:
    return compose([
        f"method={method}",
        f"model.path={model}",
        f"data.train_files={rows}",
        f"trainer.default_local_dir={folder / command}",
        f"trainer.seed={seed}",
        f"trainer.device={HOST}",
        *more,
    ], command)  # fmt: skip


def results_table(stages: list[Stage]) -> Table:
    """A row a stage: accuracy on the held-out problems, its 95% interval, that of answers drawn, seconds of training."""
    table = Table(title=f"accuracy on {stages[0].accuracy.num_problems:,} held-out problems")
    for heading in ("model", "accuracy", "95% interval", "answers drawn", "training"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for stage in stages:
        a = stage.accuracy
        spent = duration(stage.seconds) if stage.seconds else "-"
        table.add_row(stage.name, f"{a.share:.1%}", f"{a.low:.1%} to {a.high:.1%}", f"{stage.sampled.share:.1%}", spent)
    return table


def _write_data(folder: Path, seed: int) -> None:
    write_problems(folder / "problems", NUM_TRAIN, NUM_PROMPTS, NUM_TEST, seed)
    prepare_gsm8k(str(folder / "problems"), str(folder / "data"))


def _write_model(folder: Path, seed: int) -> None:
    texts = [text for p in make_problems(NUM_TOKENIZER_TEXTS, seed) for text in (p.question, p.answer)]
    write_tiny_model(folder / "model", texts, seed)


def _judged(name: str, model: Path, folder: Path, seconds: float) -> Stage:
    stage = Stage(
        name, model, folder / "answers" / f"{name.replace(' ', '-').lower()}.jsonl", *2 * (Accuracy(0, 0),), seconds
    )
    options = ["method=quickstart", f"model.path={model}", f"trainer.device={HOST}"]
    files = [str(folder / "data" / "test.parquet")]
    likeliest = evaluate(compose(options).config, files, stage.answers)
    drawn = evaluate(compose([*options, "rollout.temperature=1"]).config, files, stage.drawn)
    return replace(stage, accuracy=likeliest, sampled=drawn)


def _gains(before: Stage, after: Stage) -> dict[str, Difference]:
    """What the second stage is better by, problem by problem."""
    pairs = {"likeliest": (before.answers, after.answers), "drawn": (before.drawn, after.drawn)}
    return {name: Difference.of(*map(_verdicts, files)) for name, files in pairs.items()}


def _verdicts(answers: Path) -> list[Verdict]:
    return [Verdict(json.loads(line)["verdict"]) for line in answers.read_text().splitlines()]


def _write_results(folder: Path, stages: list[Stage], gains: dict[str, Difference], seconds: float) -> None:
    results = {
        "stages": [stage.as_record() for stage in stages],
        "grpo_gains": {name: asdict(gain) for name, gain in gains.items()},
        "total_seconds": round(seconds, 1),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def _show_answers(console: Console, stage: Stage) -> None:
    lines = stage.answers.read_text().splitlines()[:NUM_SHOWN]
    for answer in map(json.loads, lines):
        console.print(f"\n[dim]{answer['prompt'][-1]['content']}[/dim]\n{answer['answer']}", end="")
        console.print(f"  [bold {'green' if answer['verdict'] == 'right' else 'red'}]{answer['verdict']}[/]")


def _say_where(console: Console, folder: Path, seconds: float) -> None:
    console.print(f"\nAll of it took {duration(seconds)} and lies in {folder}/:")
    for name, what in (
        ("results.json", "this table"),
        ("grpo/checkpoint-final", "the model; transformers loads it as it is"),
        ("grpo/metrics.jsonl", "rewards, lengths, entropy and speed of every step; sft/metrics.jsonl: the loss"),
        ("grpo/samples/", "what it answered on the way, with the rewards"),
        ("answers/", "every answer at each stage, with its verdict"),
        ("data/", "the problems, as train.parquet and test.parquet; problems/prompts.jsonl: those for GRPO"),
    ):
        console.print(f"  {name:22s} {what}")
    console.print(
        f"next: posttrain generate --model {folder}/grpo --prompts {folder}/data/test.parquet --num_samples 5"
    )
