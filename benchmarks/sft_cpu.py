"""How fast posttrain fine-tunes on CPU, beside others on the same model and rows.

    python benchmarks/sft_cpu.py --data ../shared/data --output-json table.json --output-md table.md
    python benchmarks/sft_cpu.py --learning        # are the losses TRL's, step by step?

Contestants run in processes of their own, in turn (A B C A B C ...), so that what the machine does meanwhile meets all of
them; `posttrain is` compares runs of the same round and takes the median. Needs `pip install posttrain[bench]`.

Counted alike for all: real tokens, never padding, of whole steps from the third on, over the time from the end of the
second step to the end of the last. Trained tokens are the answers and their `<|im_end|>`. Time to the first step runs
from the start of the process, imports and tokenization included. Share of matmul: FLOPs that the step needs over those
that the machine does in products of the same shapes, where a step needs, for T tokens of which S are trained,

    6 * T * parameters of the blocks  +  6 * S * hidden * vocabulary  +  layers * 6 * hidden * sum of squared lengths

(2 forward and 4 backward; causal attention counts half of its square). `blocks alone` keeps the first term only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from contestants.setting import IGNORED, SHAPE, Setting, prepare, tokenize

BENCHMARKS = Path(__file__).resolve().parent
WARM_UP_STEPS = 2
TRL = ["one row at a time", "padded", "padded, grouped", "padding-free", "packed bfd", "packed wrapped", "as-it-comes"]
# blocks cut anywhere, documents that see each other: it learns another thing, so it is shown but is not the mode to beat
NOT_EQUAL_LEARNING = "trl packed wrapped"


def module(name: str, *arguments: str) -> Callable[[Setting], list[str]]:
    """The command of a contestant that reads the setting from a file."""

    def command(setting: Setting) -> list[str]:
        file = Path(setting.out) / "setting.json"
        file.write_text(json.dumps(asdict(setting)))
        return [sys.executable, "-m", f"contestants.{name}", str(file), *arguments]

    return command


def posttrain(setting: Setting) -> list[str]:
    options = {
        "model.path": setting.model,
        "data.train_files": setting.rows,
        "data.messages_key": "messages",
        "data.train_batch_size": setting.batch_rows,
        "data.shuffle": "false",
        "data.cache_dir": f"{setting.out}/cache",
        "optim.lr": setting.lr,
        "optim.lr_scheduler_type": "constant",
        "optim.lr_warmup_steps": 0,
        "optim.betas": list(setting.betas),
        "optim.eps": setting.eps,
        "optim.weight_decay": setting.weight_decay,
        "optim.clip_grad": setting.clip_grad,
        "trainer.total_epochs": setting.num_epochs,
        "trainer.default_local_dir": setting.out,
        "trainer.save_freq": -1,
    }
    return [sys.executable, "-m", "posttrain", "sft", *(f"{key}={value}" for key, value in options.items())]


def compiled(setting: Setting) -> list[str]:
    return [*posttrain(setting), "model.torch_compile=true"]


CONTESTANTS: dict[str, Callable[[Setting], list[str]]] = {
    "posttrain": posttrain,
    "posttrain compiled": compiled,
    "plain packed loop": module("plain"),
    **{f"trl {mode}": module("trl_modes", mode) for mode in TRL},
    "trl given-labels": module("trl_modes", "given-labels"),
}


@dataclass(frozen=True)
class Run:
    """One contestant, one round."""

    steps: list[dict[str, Any]]
    first_step_seconds: float
    peak_memory_gib: float

    @property
    def tokens_per_second(self) -> float:
        steady = self.steps[WARM_UP_STEPS:]
        return sum(step["num_tokens"] for step in steady) / sum(step["step_seconds"] for step in steady)


class ContestantError(Exception):
    pass


def execute(command: list[str], folder: Path, num_threads: int) -> tuple[float, float]:
    """Runs the command; gives the moment of its last training step in seconds from its start, and its peak memory."""
    environment = os.environ | {
        "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{BENCHMARKS.parent / 'src'}",
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log, metrics = folder / "log.txt", folder / "metrics.jsonl"
    size, last_line = 0, 0.0
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if metrics.exists() and metrics.stat().st_size > size:
                size, last_line = metrics.stat().st_size, time.perf_counter() - start
            if pid:
                break
            time.sleep(0.02)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ContestantError("\n".join(log.read_text().splitlines()[-3:]) or f"exit code {process.returncode}")
    return last_line, usage.ru_maxrss / 2**20


def compete(name: str, setting: Setting, num_threads: int) -> Run:
    """One run from a fresh folder, with every cache cold."""
    folder = Path(setting.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    last_line, memory = execute(CONTESTANTS[name](setting), folder, num_threads)
    lines = [json.loads(line) for line in setting.metrics.read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "train"]
    return Run(steps, last_line - sum(step["step_seconds"] for step in steps[1:]), memory)


def measure_matmul(setting: Setting, num_threads: int) -> float:
    """GFLOP/s of float32 products in the shapes of this model."""
    folder = Path(setting.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    execute(module("matmul")(setting), folder, num_threads)
    return json.loads((folder / "matmul.json").read_text())["gflops"]


@dataclass(frozen=True)
class Work:
    """What the rows hold, and the FLOPs that a token of them needs on average."""

    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    num_parameters: int
    gflops_per_token: float
    block_gflops_per_token: float

    @property
    def trained_share(self) -> float:
        return self.num_trained_tokens / self.num_tokens


def count_work(setting: Setting) -> Work:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    samples = [tokenize(tokenizer, row["messages"]) for row in setting.conversations()]
    parameters = dict(AutoModelForCausalLM.from_pretrained(setting.model).named_parameters())
    blocks = sum(p.numel() for name, p in parameters.items() if ".layers." in name and p.dim() > 1)
    num_tokens = sum(len(ids) for ids, _ in samples)
    num_trained = sum(label != IGNORED for _, labels in samples for label in labels)
    head = 6 * SHAPE["hidden_size"] * len(tokenizer) * num_trained / num_tokens
    squares = sum(len(ids) ** 2 for ids, _ in samples) / num_tokens
    attention = SHAPE["num_hidden_layers"] * 6 * SHAPE["hidden_size"] * squares
    return Work(
        len(samples), num_tokens, num_trained, sum(p.numel() for p in parameters.values()),
        (6 * blocks + head + attention) / 1e9, 6 * blocks / 1e9,
    )  # fmt: skip


def tabulate(runs: dict[str, list[Run]], matmul: list[float], work: Work) -> list[dict[str, Any]]:
    """One row a contestant, fastest first; medians over rounds, ratios of runs of the same round."""
    ours = runs.get("posttrain")
    rows = []
    for name, rounds in runs.items():
        rates = [run.tokens_per_second for run in rounds]
        shares = [rate * work.gflops_per_token / peak for rate, peak in zip(rates, matmul, strict=True)]
        ratios = [our.tokens_per_second / rate for our, rate in zip(ours, rates, strict=True)] if ours else []
        rows.append(
            {
                "contestant": name,
                "tokens_per_second": median(rates),
                "lowest_and_highest": [min(rates), max(rates)],
                "trained_tokens_per_second": median(rates) * work.trained_share,
                "posttrain_is": median(ratios) if ratios else None,
                "first_step_seconds": median(run.first_step_seconds for run in rounds),
                "peak_memory_gib": median(run.peak_memory_gib for run in rounds),
                "share_of_matmul": median(shares),
                "share_of_matmul_blocks_alone": median(shares) * work.block_gflops_per_token / work.gflops_per_token,
            }
        )
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


HEADINGS = [
    "contestant", "tokens/s", "(low - high)", "trained tokens/s", "posttrain is", "first step", "peak memory",
    "share of matmul", "blocks alone",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    low, high = row["lowest_and_highest"]
    ratio = row["posttrain_is"]
    return [
        row["contestant"],
        f"{row['tokens_per_second']:,.0f}",
        f"{low:,.0f} - {high:,.0f}",
        f"{row['trained_tokens_per_second']:,.0f}",
        f"{ratio:.2f} x" if ratio else "",
        f"{row['first_step_seconds']:.1f} s",
        f"{row['peak_memory_gib']:.2f} GiB",
        f"{row['share_of_matmul']:.0%}",
        f"{row['share_of_matmul_blocks_alone']:.0%}",
    ]


def verdict(rows: list[dict[str, Any]]) -> str:
    ratios = {row["contestant"]: row["posttrain_is"] for row in rows}
    if not ratios.get("posttrain"):
        return "posttrain did not run: no comparison"
    lines = []
    equals = {name: ratio for name, ratio in ratios.items() if name.startswith("trl") and name != NOT_EQUAL_LEARNING}
    if equals:
        best = min(equals, key=lambda name: equals[name])
        lines.append(f"posttrain is {equals[best]:.2f} x TRL's best mode that learns the same ({best})")
    if "plain packed loop" in ratios:
        lines.append(f"posttrain reaches {ratios['plain packed loop']:.0%} of the plain packed loop")
    return "; ".join(lines)


def show(headings: list[str], rows: list[list[str]], console: Console) -> None:
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compare_speed(settings: Callable[[str], Setting], names: list[str], repeats: int, threads: int, console: Console):
    """Report as text (Markdown) and as data."""
    work = count_work(settings("work"))
    runs: dict[str, list[Run]] = {name: [] for name in names}
    matmul: list[float] = []
    for number in range(1, repeats + 1):
        matmul.append(measure_matmul(settings("matmul"), threads))
        console.print(f"round {number}: matmul {matmul[-1]:.0f} GFLOP/s")
        for name in list(runs):
            try:
                runs[name].append(compete(name, settings(name), threads))
                console.print(f"round {number}: {name} {runs[name][-1].tokens_per_second:,.0f} tokens/s")
            except ContestantError as error:
                console.print(f"round {number}: {name} failed and is left out:\n{error}")
                del runs[name]
    rows = tabulate(runs, matmul, work)
    intro = (
        f"{work.num_rows} conversations, {work.num_tokens:,} tokens, {work.num_trained_tokens:,} of them trained; "
        f"{work.num_parameters / 1e6:.1f}M parameters, {work.gflops_per_token * 1e3:.1f} MFLOP a token; {threads} threads, "
        f"float32; matmul {median(matmul):.0f} GFLOP/s; {repeats} rounds."
    )
    body = [cells(row) for row in rows]
    console.print(intro)
    show(HEADINGS, body, console)
    console.print(verdict(rows))
    text = f"{intro}\n\n{markdown(HEADINGS, body)}\n\n{verdict(rows)}\n"
    return text, {"work": asdict(work), "matmul_gflops": matmul, "rows": rows, "threads": threads}


def compare_learning(settings: Callable[[str], Setting], names: list[str], threads: int, console: Console):
    """Losses beside those of TRL, unpacked, unshuffled, on the same labels; report as text (Markdown) and as data."""
    reference = "trl given-labels"
    losses: dict[str, list[float]] = {}
    for name in [reference, *names]:
        try:
            losses[name] = [step["loss"] for step in compete(name, settings(name), threads).steps]
        except ContestantError as error:
            console.print(f"{name} failed and is left out:\n{error}")
    if reference not in losses:
        raise typer.Exit(1)
    steps = range(len(losses[reference]))
    headings = ["step", *losses]
    body = [[str(step + 1), *(f"{column[step]:.6f}" for column in losses.values())] for step in steps]
    show(headings, body, console)
    lines = []
    for name, column in losses.items():
        if name != reference:
            gaps = [ours - theirs for ours, theirs in zip(column, losses[reference], strict=True)]
            largest = max(map(abs, gaps))
            lines.append(f"{name} - {reference}: largest difference {largest:.1e}, mean {mean(gaps):+.1e}")
    console.print("\n".join(lines))
    return markdown(headings, body) + "\n\n" + "\n".join(lines) + "\n", {"losses": losses}


def main(
    data: Path = typer.Option(
        BENCHMARKS.parents[1] / "shared" / "data",
        envvar="POSTTRAIN_TEST_DATA",
        help="Folder with gsm8k/, tokenizers/ and templates/.",
    ),
    learning: bool = typer.Option(False, help="Compare losses step by step instead of speed."),
    rows: int = typer.Option(192, help="Conversations, the first of GSM8K's train set."),
    vocabulary: str = typer.Option("small", help="small: 8,192 words, trained on GSM8K. full: Qwen2.5's 151,665."),
    batch_rows: int = typer.Option(32, help="Conversations of an optimizer step."),
    epochs: int | None = typer.Option(None, help="Passes over the rows: 1 if not given, with --learning 4."),
    repeats: int = typer.Option(3, help="Rounds; each runs every contestant once."),
    threads: int = typer.Option(2, help="Threads of each contestant."),
    only: list[str] = typer.Option([], help="Contestants to run; all if none is named."),
    folder: Path | None = typer.Option(None, help="Where the runs lie; a temporary folder if not given."),
    output_json: Path | None = typer.Option(None, help="Write the report as data."),
    output_md: Path | None = typer.Option(None, help="Write the report as a Markdown table."),
) -> None:
    """Speed or learning of posttrain, TRL and a plain loop on CPU, side by side."""
    console = Console(width=160)
    work_folder = Path(folder or tempfile.mkdtemp(prefix="sft-cpu-")).resolve()
    work_folder.mkdir(parents=True, exist_ok=True)
    model, rows_file = prepare(work_folder, data, rows, vocabulary)
    common = Setting(str(model), str(rows_file), "", batch_rows, epochs or (4 if learning else 1))

    def settings(name: str) -> Setting:
        return replace(common, out=str(work_folder / name.replace(",", "").replace(" ", "-")))

    if learning:
        text, report = compare_learning(settings, only or ["posttrain", "plain packed loop"], threads, console)
    else:
        names = only or [name for name in CONTESTANTS if name != "trl given-labels"]
        text, report = compare_speed(settings, names, repeats, threads, console)
    if output_json:
        output_json.write_text(json.dumps(report, indent=1) + "\n")
    if output_md:
        output_md.write_text(text)
    if folder is None:
        shutil.rmtree(work_folder)


if __name__ == "__main__":
    typer.run(main)
