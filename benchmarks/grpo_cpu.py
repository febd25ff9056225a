"""How fast posttrain learns from its own answers on CPU, beside TRL's GRPOTrainer.

    posttrain quickstart --folder quickstart-run
    python benchmarks/grpo_cpu.py --quickstart quickstart-run --rounds 3 --output-json grpo.json

Both begin with the quickstart's fine-tuned model of 0.85M parameters and its prompts, with the same number of answers to a prompt,
the same longest answer, temperature 1, the same rate, one update a step, and the reward of the right number after `####`. They run in
processes of their own, in turn, so that what the machine does meanwhile meets both; the ratio is that of the same round. The first two steps
are left out. Answer tokens are those that a model wrote. TRL computes all answers, posttrain leaves those without advantage out of
its forward passes (their gradient is zero); `--all-answers` gives it an entropy weight of 1e-9, so that none is left out.
Needs `pip install posttrain[bench]`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

BENCHMARKS = Path(__file__).resolve().parent
WARM_UP_STEPS = 2


def posttrain(setting: dict[str, Any]) -> list[str]:
    options = {
        "model.path": setting["model"], "data.train_files": setting["prompts"], "rollout.n": setting["answers"],
        "data.train_batch_size": setting["prompts_a_step"], "rollout.max_new_tokens": setting["max_new_tokens"],
        "rollout.batch_size": setting["prompts_a_step"] * setting["answers"], "optim.lr": setting["lr"],
        "trainer.total_training_steps": setting["steps"], "trainer.default_local_dir": setting["out"],
        "trainer.save_freq": -1, "trainer.sample_freq": -1, "trainer.seed": setting["seed"],
        **({"algorithm.entropy_coef": 1e-9} if setting["all_answers"] else {}),
    }  # fmt: skip
    return [sys.executable, "-m", "posttrain", "grpo", *(f"{key}={value}" for key, value in options.items())]


def trl(setting: dict[str, Any]) -> list[str]:
    file = Path(setting["out"]) / "setting.json"
    file.write_text(json.dumps(setting))
    return [sys.executable, "-m", "contestants.trl_grpo", str(file)]


def steps_of(name: str, out: Path) -> list[dict[str, float]]:
    """Seconds, seconds of answering and answer tokens of each step after the first two."""
    if name.startswith("trl"):
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    else:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        train, rollout = ([line for line in lines if line["phase"] == phase] for phase in ("train", "rollout"))
        steps = [
            {"step_seconds": t["step_seconds"], "rollout_seconds": r["rollout_seconds"],
             "num_tokens": r["rollout_tokens_per_second"] * r["rollout_seconds"]}
            for t, r in zip(train, rollout, strict=True)
        ]  # fmt: skip
    return steps[WARM_UP_STEPS:]


def compete(name: str, setting: dict[str, Any], num_threads: int) -> dict[str, float]:
    """One run from a fresh folder: medians over its steps."""
    out = Path(setting["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent / 'src'}", "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    command = trl(setting) if name.startswith("trl") else posttrain(setting)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    steps = steps_of(name, out)
    seconds = sum(step["step_seconds"] for step in steps)
    return {
        "seconds_a_step": median(step["step_seconds"] for step in steps),
        "rollout_seconds": median(step["rollout_seconds"] for step in steps),
        "answer_tokens_per_second": sum(step["num_tokens"] for step in steps) / seconds,
        "answer_tokens_a_step": sum(step["num_tokens"] for step in steps) / len(steps),
    }


def main(
    quickstart: Path = Path("quickstart-run"),
    rounds: int = 3,
    steps: int = 8,
    prompts_a_step: int = 64,
    answers: int = 8,
    max_new_tokens: int = 24,
    forwards: list[int] = typer.Option(
        [1, 4], help="Forward passes that TRL deals a step's answers to; each is a contestant."
    ),
    threads: int = 1,
    all_answers: bool = False,
    work: Path = Path("grpo-benchmark"),
    output_json: Path | None = None,
) -> None:
    setting = {
        "model": str(quickstart.resolve() / "sft" / "checkpoint-final"),
        "prompts": str(quickstart.resolve() / "problems" / "prompts.jsonl"), "steps": steps,
        "prompts_a_step": prompts_a_step, "answers": answers, "max_new_tokens": max_new_tokens, "lr": 1e-6, "seed": 0,
        "all_answers": all_answers,
    }  # fmt: skip
    names = ["posttrain", *(f"trl, {number} forward passes" for number in forwards)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name, parts in zip(names, [1, *forwards], strict=True):
            out = work.resolve() / name.replace(" ", "-").replace(",", "")
            found[name].append(compete(name, {**setting, "forwards": parts, "out": str(out)}, threads))
            print(f"round {round_ + 1} {name}: {found[name][-1]}", flush=True)
    table = Table(
        title=f"{prompts_a_step} prompts x {answers} answers, {threads} thread(s), medians of {rounds} rounds"
    )
    for heading in ("", "seconds a step", "of it answering", "answer tokens/s", "posttrain is"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, results in found.items():
        ratios = [
            theirs["seconds_a_step"] / ours["seconds_a_step"]
            for ours, theirs in zip(found["posttrain"], results, strict=True)
        ]
        spread = "" if name == "posttrain" else f"{median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        columns = ("seconds_a_step", "rollout_seconds", "answer_tokens_per_second")
        middle = [median(result[column] for result in results) for column in columns]
        table.add_row(name, f"{middle[0]:.2f}", f"{middle[1]:.2f}", f"{middle[2]:,.0f}", spread)
    Console().print(table)
    if output_json:
        told = {
            key: value for key, value in setting.items() if key not in ("model", "prompts")
        }  # paths of this machine
        output_json.write_text(json.dumps({"setting": told, "rounds": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
