"""A run that hangs or loses a process ends, and says which process, where and what it did; a slow one is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import free_port, records
from posttrain.config.compose import compose
from posttrain.data import workers
from posttrain.distributed.device import choose_device
from posttrain.distributed.verdict import Place, Report, blamed, verdict
from posttrain.distributed.world import World
from posttrain.loops.slowest import STEPS_SEEN, Slowest
from posttrain.loops.training_data import open_training_data
from posttrain.run.progress import Display

FAULTS = Path(__file__).with_name("faults.py")


def report(step: int, order: int, waits: bool = True) -> Report:
    return Report(Place(step, "reading rows", "", order), 60.0, "line (file.py:1)", waits, "stack")


@pytest.mark.parametrize(
    ("reports", "guilty"),
    [
        ([report(3, 0), None, report(3, 2)], [1]),  # does not answer
        ([report(3, 2), report(3, 0, waits=False), report(3, 2)], [1]),  # is behind in the step
        ([report(4, 0), report(3, 9, waits=False), report(3, 9)], [1, 2]),  # are a step behind
        ([report(3, 2), report(3, 2, waits=False), report(3, 2)], [1]),  # at the same place, but not waiting
        ([report(3, 2), report(3, 2)], []),  # all wait
        ([report(3, 2, waits=False), report(3, 2, waits=False)], []),  # nobody can tell
        ([report(3, 2)], [0]),  # alone
    ],
)
def test_blame_falls_on_the_rank_that_the_others_wait_for(reports, guilty):
    assert blamed(dict(enumerate(reports))) == guilty


def test_ranks_that_wait_at_the_same_place_share_a_line():
    told = {rank: report(5, 2) for rank in range(8)} | {3: None}
    first, second = verdict(told, {3: Place(5, "optimizer")})
    assert first.startswith("rank 3 does not answer") and "last seen at step 5, optimizer" in first
    assert second.startswith("ranks 0-2, 4-7 wait at step 5, reading rows")


def test_a_rank_that_stays_slow_is_said_once(capsys):
    slowest = Slowest(Display())
    for _ in range(3 * STEPS_SEEN):
        assert slowest.of([0.1, 0.5, 0.2], 1.0) == {"slowest_rank": 1, "slowest_rank_lag_seconds": pytest.approx(0.3)}
    said = capsys.readouterr().out
    assert said.count("rank 1 holds up the others") == 1
    assert "in 30 of the last 30 steps it spent about 0.3 s more" in said and "a step takes 1 s" in said
    assert slowest.of([0.1], 1.0) == {}


@pytest.mark.parametrize(("every", "is_said"), [(10, True), (7, False)])
def test_one_step_in_ten_may_be_an_exception(every, is_said, capsys):
    slowest = Slowest(Display())
    exceptions = [([0.5, 0.4], 1.0), ([0.1, 0.4], 9.0)]  # another rank is the slowest; the whole step stalls
    for step in range(3 * STEPS_SEEN):
        slowest.of(*exceptions[step // every % 2] if step % every == 0 else ([0.1, 0.4], 1.0))
    said = capsys.readouterr().out
    assert ("in 27 of the last 30 steps it spent about 0.3 s more" in said) == is_said == bool(said)


def test_ranks_that_are_slow_in_turn_or_by_little_are_not_said(capsys):
    in_turn, by_little = Slowest(Display()), Slowest(Display())
    for step in range(3 * STEPS_SEEN):
        in_turn.of([0.5, 0.1] if step % 4 else [0.1, 0.5], 1.0)
        by_little.of([0.5, 0.41], 1.0)
    assert capsys.readouterr().out == ""


class Ranks:
    """Processes with a fault, started as a cluster's scheduler does: without a launcher that would end them all."""

    def __init__(self, posttrain, fault: str, count: int, **options: object):
        arguments = [sys.executable, str(FAULTS), fault, "sft", *posttrain.sft_options("run", **options)]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        self.processes = [
            subprocess.Popen(
                arguments, cwd=posttrain.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=posttrain.environment | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        self.run = posttrain.folder / "run"

    def ends(self, rank: int, code: int) -> str:
        """What a rank said, once it has ended as it should."""
        process = self.processes[rank]
        out, err = process.communicate(timeout=240)
        assert process.returncode == code and "Traceback" not in err, f"exit code {process.returncode}\n{out}\n{err}"
        return out + err

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_step_its_phase_and_every_stack(posttrain):
    with Ranks(posttrain, "sleeps", 2, trainer__hang_timeout_seconds=3) as ranks:
        said, silent = ranks.ends(0, 3), ranks.ends(1, 3)
    assert "rank 1 holds up the others: it is at step 3, reading rows, for " in said and "in faulty (faults.py:" in said
    assert "rank 0 waits at step 3, forward and backward" in said and "hangs" not in silent
    stacks = (ranks.run / "hang.txt").read_text()
    assert said.splitlines()[-4:] == stacks.splitlines()[:4]
    of_0, of_1 = stacks.split("=== rank ")[1:]
    assert "forward_backward" in of_0 and "time.sleep(1000)  # the line that must be named" in of_1
    state = json.loads((ranks.run / "run.json").read_text())
    assert (state["status"], state["step"]) == ("failed", 2)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_by_another(posttrain):
    with Ranks(posttrain, "stops", 2, trainer__hang_timeout_seconds=3) as ranks:
        said = ranks.ends(0, 3)
    assert "rank 1 does not answer" in said and "last seen at step 3, reading rows" in said
    assert "rank 0 waits at step 3, forward and backward" in said
    assert "=== rank 1: does not answer" in (ranks.run / "hang.txt").read_text()


@pytest.mark.slow
def test_rank_0_is_named_when_it_is_stopped_though_it_keeps_what_the_ranks_tell_each_other(posttrain):
    posttrain.environment["FAULTY_RANK"] = "0"
    with Ranks(posttrain, "stops", 2, trainer__hang_timeout_seconds=3) as ranks:
        said = ranks.ends(1, 3)
    assert "rank 0, which keeps what the ranks tell each other, does not answer" in said
    assert json.loads((ranks.run / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_one_process_alone_is_watched_too_and_a_pause_is_no_hang(posttrain):
    with Ranks(posttrain, "is_paused_then_sleeps", 1, trainer__hang_timeout_seconds=3) as ranks:
        said = ranks.ends(0, 3)
    assert "rank 0 is at step 3, reading rows, for " in said
    assert "time.sleep(1000)" in (ranks.run / "hang.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_fails_alone_says_why(posttrain):
    with Ranks(posttrain, "breaks", 2) as ranks:
        assert "rank 1: ValueError: a shard is broken" in ranks.ends(1, 3)
        assert "rank 0 lost contact with another process at step 3, forward and backward" in ranks.ends(0, 3)


@pytest.mark.slow
def test_a_rank_0_that_crashes_shows_its_stacks_and_another_says_that_it_is_gone(posttrain):
    posttrain.environment["FAULTY_RANK"] = "0"
    with Ranks(posttrain, "crashes", 2) as ranks:
        said = ranks.ends(0, -signal.SIGSEGV)
        assert "Fatal Python error: Segmentation fault" in said and "in faulty" in said
        assert "rank 1 lost contact with another process at step 3" in ranks.ends(1, 3)


def test_preparing_rows_shows_its_progress_chunk_by_chunk(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ROWS_A_CHUNK", 50)
    options = [f"data.train_files={tiny / 'train.parquet'}", f"model.path={tiny / 'model'}"]
    world, signs = World(choose_device("cpu")), []
    config = compose([*options, f"data.cache_dir={tmp_path}"]).config
    open_training_data(config, world, Display(False, lambda: signs.append(world.watchdog.place.phase)))
    assert signs == ["preparing rows"] * 4


@pytest.mark.slow
def test_long_work_that_shows_progress_is_no_hang_and_a_slow_rank_is_measured(posttrain):
    options = {"trainer__hang_timeout_seconds": 4, "trainer__total_training_steps": 40}
    with Ranks(posttrain, "is_slow", 2, **options) as ranks:
        said, _ = ranks.ends(0, 0), ranks.ends(1, 0)
    steps = records(ranks.run)
    assert steps[2]["slowest_rank"] == 0 and 8 < steps[2]["slowest_rank_lag_seconds"] < steps[2]["step_seconds"]
    assert sum(step["slowest_rank"] for step in steps) > 35  # any machine stalls now and then
    lags = sorted(step["slowest_rank_lag_seconds"] for step in steps)
    assert 0.2 < lags[20] < 0.6
    assert all(step["slowest_rank_lag_seconds"] < step["step_seconds"] for step in steps)
    assert said.count("rank 1 holds up the others") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(posttrain):
    options = posttrain.sft_options("run", trainer__n_gpus_per_node=2, trainer__total_training_steps=2000)
    launcher = subprocess.Popen(
        posttrain.arguments("sft", *options), cwd=posttrain.folder, env=posttrain.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, until = posttrain.folder / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    (victim,) = [child for child in children(launcher.pid) if rank_of(child) == 1]
    os.kill(victim, signal.SIGKILL)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 3 and "Traceback" not in said, said
    assert "Worker 1 on " in said and "was killed by SIGKILL" in said
    assert "rank 0 lost contact with another process at step" in said
    assert json.loads((posttrain.folder / "run" / "run.json").read_text())["status"] == "failed"


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def rank_of(process: int) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return int(dict(variable.partition("=")[::2] for variable in variables).get("RANK", -1))
