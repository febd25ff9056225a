"""`posttrain quickstart`: problems, a tiny model, its accuracy before, training, its accuracy after, a table.

Each stage is a model and its accuracy on the same held-out problems; a further method adds one more stage.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
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
from posttrain.loops.sft import sft
from posttrain.quickstart.problems import make_problems, write_problems
from posttrain.quickstart.tiny import write_tiny_model
from posttrain.rewards.accuracy import Accuracy
from posttrain.run.progress import duration

NUM_TRAIN, NUM_TEST = 16_000, 1_000
NUM_TOKENIZER_TEXTS = 4_000
NUM_SHOWN = 3


@dataclass(frozen=True)
class Stage:
    """A model on the way, with what it can do."""

    name: str
    model: Path
    answers: Path
    accuracy: Accuracy
    seconds: float  # that its training took

    def as_record(self) -> dict[str, Any]:
        """Its part of results.json."""
        a = self.accuracy
        return {
            "stage": self.name, "model": str(self.model), "answers": str(self.answers), "accuracy": a.share,
            "low": a.low, "high": a.high, "num_problems": a.num_problems, "num_correct": a.num_correct,
            "num_unknown": a.num_unknown, "train_seconds": round(self.seconds, 1),
        }  # fmt: skip


def quickstart(folder: Path, seed: int) -> None:
    """Run every stage in `folder`, print the table and write results.json."""
    if (folder / "results.json").exists() or (folder / "sft").exists():
        raise InputError(f"{folder} holds a quickstart already. Delete it, or give another one with --folder.")
    # products as small as this model's gain little from a second thread, and lose much where the cores are shared
    torch.set_num_threads(1)
    console, started = Console(highlight=False, soft_wrap=True), time.monotonic()
    console.print(f"[bold]1/4[/bold] writing {NUM_TRAIN:,} word problems to learn from and {NUM_TEST:,} held out")
    _write_data(folder, seed)
    console.print("[bold]2/4[/bold] building a tiny Qwen2 model with random weights, and its tokenizer")
    _write_model(folder, seed)
    console.print("[bold]3/4[/bold] its accuracy before training")
    stages = [_judged("before", folder / "model", folder, 0.0)]
    console.print(f"  {stages[0].accuracy}\n[bold]4/4[/bold] supervised fine-tuning")
    before = time.monotonic()
    options = sft_options(folder, seed)
    sft(options.config, options.as_yaml())
    stages.append(_judged("after SFT", folder / "sft", folder, time.monotonic() - before))
    _write_results(folder, stages, time.monotonic() - started)
    console.print(results_table(stages))
    _show_answers(console, stages[-1])
    _say_where(console, folder, time.monotonic() - started)


def sft_options(folder: Path, seed: int, *more: str) -> Resolved:
    """The options of the quickstart's fine-tuning: those of the recipe method=quickstart, and this folder's paths."""
    return compose([
        "method=quickstart",
        f"model.path={folder / 'model'}",
        f"data.train_files={folder / 'data' / 'train.parquet'}",
        f"data.cache_dir={folder / 'cache'}",
        f"trainer.default_local_dir={folder / 'sft'}",
        f"trainer.seed={seed}",
        f"trainer.device={HOST}",
        *more,
    ])  # fmt: skip


def results_table(stages: list[Stage]) -> Table:
    """A row a stage: accuracy on the held-out problems, its 95% interval, seconds of training."""
    table = Table(title=f"accuracy on {stages[0].accuracy.num_problems:,} held-out problems")
    for heading in ("model", "accuracy", "95% interval", "right", "training"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for stage in stages:
        a = stage.accuracy
        spent = duration(stage.seconds) if stage.seconds else "-"
        table.add_row(stage.name, f"{a.share:.1%}", f"{a.low:.1%} to {a.high:.1%}", f"{a.num_correct:,}", spent)
    return table


def _write_data(folder: Path, seed: int) -> None:
    write_problems(folder / "problems", NUM_TRAIN, NUM_TEST, seed)
    prepare_gsm8k(str(folder / "problems"), str(folder / "data"))


def _write_model(folder: Path, seed: int) -> None:
    texts = [text for p in make_problems(NUM_TOKENIZER_TEXTS, seed) for text in (p.question, p.answer)]
    write_tiny_model(folder / "model", texts, seed)


def _judged(name: str, model: Path, folder: Path, seconds: float) -> Stage:
    answers = folder / "answers" / f"{name.replace(' ', '-').lower()}.jsonl"
    options = compose(["method=quickstart", f"model.path={model}", f"trainer.device={HOST}"])
    accuracy = evaluate(options.config, [str(folder / "data" / "test.parquet")], answers)
    return Stage(name, model, answers, accuracy, seconds)


def _write_results(folder: Path, stages: list[Stage], seconds: float) -> None:
    results = {"stages": [stage.as_record() for stage in stages], "total_seconds": round(seconds, 1)}
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
        ("sft/checkpoint-final", "the model; transformers loads it as it is"),
        ("sft/metrics.jsonl", "loss and speed of every step"),
        ("answers/", "every answer before and after, with its verdict"),
        ("data/", "the problems, as train.parquet and test.parquet"),
    ):
        console.print(f"  {name:22s} {what}")
    console.print(f"next: posttrain generate --model {folder}/sft --prompts {folder}/data/test.parquet --num_samples 5")
