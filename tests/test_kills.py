"""Runs that are killed at any moment: started again, they end as if nothing had happened."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import forked
from conftest import Command, records
from forked import Group, Moment

pytestmark = pytest.mark.slow
STEPS = 12
RANDOM_MOMENTS = {1: 12, 2: 8}  # by number of processes
NUMBERS = ("loss", "grad_norm", "lr", "num_tokens", "num_trained_tokens")


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    forked.start_server()
    folder = tmp_path_factory.mktemp("kills")
    pq.write_table(pq.read_table(tiny / "test.parquet").slice(0, 4), folder / "val.parquet")
    return folder


def options(tiny: Path, run: Path) -> list[str]:
    """Twelve steps, validated and saved every third, one checkpoint kept; most validations are the best so far."""
    return Command(tiny, run.parent).sft_options(
        str(run), trainer__total_training_steps=STEPS, trainer__save_freq=3, trainer__test_freq=3,
        trainer__max_ckpt_to_keep=1, data__val_files=run.parent / "val.parquet", data__train_batch_size=2,
        model__random_weights="true",
        model__override_config="{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2}",
    )  # fmt: skip


def start(tiny: Path, run: Path, size: int = 1, die: Moment | None = None) -> Group:
    return forked.start(forked.sft, size, options(tiny, run), die, said=run.parent / "said")


@pytest.fixture(scope="module")
def undisturbed(tiny, place) -> dict[int, tuple[Path, float]]:
    """The run that nobody disturbs on one and on two processes, and the seconds that it took."""
    found = {}
    for size in (1, 1, 2):  # the first fills the cache of tokenized rows
        run = place / f"undisturbed-{size}"
        shutil.rmtree(run, ignore_errors=True)
        started = time.monotonic()
        group = start(tiny, run, size)
        group.ends([0] * size)
        found[size] = run, time.monotonic() - started
    return found


def same(run: Path, expected: Path) -> None:
    """Weights, metrics and what is kept are those of the undisturbed run, to the bit."""
    state = json.loads((run / "run.json").read_text())
    best = json.loads((expected / "run.json").read_text())["best_step"]
    assert (state["status"], state["step"], state["best_step"]) == ("finished", STEPS, best)
    for phase, numbers in (("train", NUMBERS), ("val", ("val_loss",))):
        found, wanted = ([[r[n] for n in ("step", *numbers)] for r in records(path, phase)] for path in (run, expected))
        assert found == wanted, phase
    for export in ("checkpoint-final", "checkpoint-best"):
        found, wanted = (load_file(path / export / "model.safetensors") for path in (run, expected))
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted), export
    assert names(run) == names(expected)  # nothing is left over
    said = [(path / f"checkpoint-{STEPS}" / "progress.json").read_text() for path in (run, expected)]
    assert said[0] == said[1]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def goes_on(tiny: Path, run: Path, size: int, expected: Path) -> None:
    """The same command again; it says where it goes on, from the newest checkpoint that was complete."""
    complete = [int(p.parent.name.split("-")[1]) for p in run.glob("checkpoint-*/progress.json")]
    group = start(tiny, run, size)
    group.ends([0] * size)
    resumed = re.findall(r"resumed from \S+: step (\d+)", group.output())
    assert resumed == [str(max(complete))] if complete else not resumed, group.output()
    same(run, expected)


MOMENTS = {
    "before the first shard is written": Moment("open", r"\.checkpoint-6\.tmp/state/__0_0"),
    "before the list of shards is written": Moment("open", r"\.checkpoint-6\.tmp/state/\.metadata\.tmp"),
    "before progress is written": Moment("open", r"\.checkpoint-6\.tmp/progress\.json"),
    "before a checkpoint gets its name": Moment("os.rename", r"\.checkpoint-6\.tmp"),
    "before the oldest checkpoint is dropped": Moment("os.rename", r"/checkpoint-3$"),
    "while the oldest checkpoint is dropped": Moment("os.remove", r"progress\.json|\.metadata|__0_0"),
    "while the best model is written": Moment("open", r"\.checkpoint-best\.tmp/.*tokenizer_config", 3),
    "between the two renames of the best model": Moment("os.rename", r"\.checkpoint-best\.tmp", 3),
    "before the final model gets its name": Moment("os.rename", r"\.checkpoint-final\.tmp"),
    "while metrics of later steps are dropped": Moment("os.rename", r"\.metrics\.jsonl\.tmp"),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_a_run_killed_at_a_delicate_moment_ends_as_if_it_had_not_been(name, tiny, place, undisturbed):
    run, moment = place / re.sub(r"\W", "-", name), MOMENTS[name]
    if "dropped" in name and "metrics" in name:  # happens where a run is resumed
        assert start(tiny, run, die=MOMENTS["before progress is written"]).wait() == [-9]
    group = start(tiny, run, die=moment)
    assert group.wait() == [-9], f"the moment never came:\n{group.output()}"
    goes_on(tiny, run, 1, undisturbed[1][0])


@pytest.mark.parametrize("moment", ["before progress is written", "before the first shard is written"])
def test_one_of_two_processes_killed_while_saving_ends_the_other(moment, tiny, place, undisturbed):
    run = place / f"one-of-two-{moment.replace(' ', '-')}"
    die = MOMENTS[moment]
    if "shard" in moment:
        die = Moment("open", r"\.checkpoint-6\.tmp/state/__1_0", rank=1)
    group = start(tiny, run, 2, die)
    codes = group.wait()
    assert sorted(codes) == [-9, 3], f"exit codes {codes}:\n{group.output()}"
    assert not (run / "checkpoint-6").exists()
    goes_on(tiny, run, 2, undisturbed[2][0])


@pytest.mark.parametrize("size", RANDOM_MOMENTS)
def test_a_run_killed_at_any_time_ends_as_if_it_had_not_been(size, tiny, place, undisturbed):
    expected, seconds = undisturbed[size]
    rng = random.Random(size)
    for number in range(RANDOM_MOMENTS[size]):
        run, moment = place / f"random-{size}-{number}", rng.uniform(0.1, 1.0) * seconds
        ranks = rng.choice([[0], [1], [0, 1]]) if size == 2 else [0]
        group = start(tiny, run, size)
        time.sleep(moment)
        group.kill(ranks)
        have_met = "train: " in group.output()
        if not have_met:  # one that waits for another to come is its launcher's to end
            group.kill(list(range(size)))
        codes = group.wait()
        print(f"{size} processes, killed {ranks} after {moment:.2f} s: {codes}, {records_so_far(run)} steps written")
        goes_on(tiny, run, size, expected)
        shutil.rmtree(run)


def records_so_far(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
