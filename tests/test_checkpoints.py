"""Checkpoints: written beside training, whole or not there, and fit for any number of processes."""

from __future__ import annotations

import json
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import forked
from conftest import Command, records
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World, join_world
from posttrain.engine.checkpoint import Checkpoints, Progress
from posttrain.engine.engine import Engine
from posttrain.errors import RunError
from posttrain.losses.sft import sft_loss
from posttrain.run.folder import clear_leftovers
from tiny import make_engine, packed, random_samples, tiny_lm

TOO_MUCH = 2000  # bytes of a file: less than any process writes of a checkpoint


@pytest.fixture(scope="module", autouse=True)
def server():
    forked.start_server()


def trained(world: World, seed: int = 0, steps: int = 2) -> Engine:
    engine = make_engine(tiny_lm(seed=seed), world)
    for _ in range(steps):
        engine.forward_backward(packed(random_samples(6), world), sft_loss)
        engine.optim_step()
    return engine


def progress(step: int) -> Progress:
    return Progress(step, best=None, best_step=None, stale_validations=0, data="", model="", updates=step)


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of the engine's state, gathered and copied."""
    return {
        f"{part}.{name}": (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for part, tensors in engine.state().items()
        for name, tensor in tensors.items()
    }


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def held(checkpoints: Checkpoints) -> threading.Event:
    """Nothing is written before this event is set."""
    gate = threading.Event()
    checkpoints._thread.submit(gate.wait)
    return gate


def in_each_process(rank: int, size: int, folder: Path) -> None:
    with join_world(choose_device("cpu")) as world:
        checkpoints, engine = Checkpoints(folder, 2, world), trained(world)
        what_is_written_is_the_state_of_the_call(checkpoints, engine, world)
        a_save_waits_for_the_one_before(checkpoints, engine)
        other_files_belong_to_the_checkpoint(checkpoints, engine, world)
        a_failure_on_one_process_is_one_error_on_all(checkpoints, engine, world)
        checkpoints.close()


def what_is_written_is_the_state_of_the_call(checkpoints: Checkpoints, engine: Engine, world: World) -> None:
    expected, gate = whole(engine), held(checkpoints)
    checkpoints.save(engine, progress(1))
    assert not checkpoints.saved()
    with torch.no_grad():
        for tensors in engine.state().values():
            for tensor in tensors.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(7.0)
    gate.set()
    checkpoints.wait()
    assert [path.name for path in checkpoints.saved()] == ["checkpoint-1"]
    other = trained(world, seed=1, steps=1)
    assert not equal(whole(other), expected)
    assert checkpoints.restore(other, checkpoints.folder / "checkpoint-1") == progress(1)
    assert equal(whole(other), expected)
    checkpoints.restore(engine, checkpoints.folder / "checkpoint-1")
    if world.is_main:
        torch.save(expected, checkpoints.folder / "expected.pt")


def a_save_waits_for_the_one_before(checkpoints: Checkpoints, engine: Engine) -> None:
    gate = held(checkpoints)
    checkpoints.save(engine, progress(2))
    assert len(checkpoints.saved()) == 1
    threading.Timer(0.2, gate.set).start()
    checkpoints.save(engine, progress(3))
    assert checkpoints.folder / "checkpoint-2" in checkpoints.saved()
    checkpoints.wait()
    assert [path.name for path in checkpoints.saved()] == ["checkpoint-2", "checkpoint-3"]  # the newest two
    assert not (checkpoints.folder / "checkpoint-1").exists()


def other_files_belong_to_the_checkpoint(checkpoints: Checkpoints, engine: Engine, world: World) -> None:
    checkpoints.save(engine, progress(4), lambda folder: (folder / f"from-{world.rank}").touch() or None)
    checkpoints.wait()
    found = {path.name for path in (checkpoints.folder / "checkpoint-4").glob("from-*")}
    assert found == {f"from-{rank}" for rank in range(world.size)}


def a_failure_on_one_process_is_one_error_on_all(checkpoints: Checkpoints, engine: Engine, world: World) -> None:
    expected = r"checkpoint-5 failed: .*GiB are free there.*checkpoint-4 is complete; the same command resumes from it"
    last, limits = world.rank == world.size - 1, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_disk(folder: Path) -> None:
        if last:
            raise OSError("No space left on device")

    with pytest.raises(RunError, match=expected):
        checkpoints.save(engine, progress(5), full_disk)
    if last:  # a limit on the size of a file stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_MUCH, limits[1]))
    checkpoints.save(engine, progress(5))
    with pytest.raises(RunError, match=expected):
        checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.everyone(lambda: None)
    if world.is_main:
        assert not list(checkpoints.folder.glob(".checkpoint-*"))
    checkpoints.save(engine, progress(5))
    checkpoints.wait()
    assert [path.name for path in checkpoints.saved()] == ["checkpoint-4", "checkpoint-5"]


def restored_equals(rank: int, size: int, folder: Path) -> None:
    """The state that another number of processes saved, to the bit, optimizer state included."""
    with join_world(choose_device("cpu")) as world:
        engine = trained(world, seed=1, steps=1)
        Checkpoints(folder, None, world).restore(engine, folder / "checkpoint-5")
        assert equal(whole(engine), torch.load(folder / "expected.pt"))


def run(function, size: int, *arguments, said: Path) -> None:
    group = forked.start(function, size, *arguments, said=said)
    group.ends([0] * size)


@pytest.mark.parametrize("size", [1, 2])
def test_checkpoints_are_written_beside_training_and_fit_other_numbers_of_processes(size, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run(in_each_process, size, folder, said=tmp_path / "said")
    for other in {1, 2, 4} - {size}:
        run(restored_equals, other, folder, said=tmp_path / "said")


def test_what_a_kill_leaves_is_put_right(tmp_path):
    def folder(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)

    for name in (".checkpoint-best.old", ".checkpoint-best.tmp", ".checkpoint-final.old", "checkpoint-final",
                 ".checkpoint-7.tmp", "checkpoint-6"):  # fmt: skip
        folder(name)
    clear_leftovers(tmp_path)
    left = {path.name: (path / "name").read_text() for path in tmp_path.iterdir()}
    assert left == {
        "checkpoint-best": ".checkpoint-best.old",
        "checkpoint-final": "checkpoint-final",
        "checkpoint-6": "checkpoint-6",
    }


def options(tiny: Path, run: Path, **more: object) -> list[str]:
    """Ten steps of an epoch of thirteen, saved every third."""
    given = {"trainer__total_training_steps": 10, "trainer__save_freq": 3, "trainer__max_ckpt_to_keep": "null"} | more
    return Command(tiny, run.parent).sft_options(str(run), **given)


def rows(folder: Path) -> dict[int, list[int]]:
    """The rows of each step, over all processes."""
    found: dict[int, list[int]] = {}
    for path in folder.glob("rows-*"):
        for line in path.read_text().splitlines():
            step, *taken = map(int, line.split())
            found[step] = sorted({*found.get(step, []), *taken})  # processes that share rows each note them
        path.unlink()
    return found


ROWS_SHARED = {"engine__ulysses_sequence_parallel_size": 2}
COPIES = {"engine__fsdp_size": 2}


def test_a_run_on_two_processes_goes_on_in_any_layout_in_the_middle_of_an_epoch(tiny, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    run(forked.sft, 2, options(tiny, undisturbed), None, tmp_path, said=tmp_path / "said")
    expected_rows, expected = rows(tmp_path), records(undisturbed)
    assert list(expected_rows) == list(range(10)) and len({r for taken in expected_rows.values() for r in taken}) == 160
    for number, (size, layout) in enumerate([(1, {}), (2, {}), (4, {}), (2, ROWS_SHARED), (4, ROWS_SHARED | COPIES)]):
        moved = tmp_path / f"moved-{number}"
        shutil.copytree(undisturbed, moved)
        for later in ("checkpoint-9", "checkpoint-10", "checkpoint-final"):
            shutil.rmtree(moved / later)
        run(forked.sft, size, options(tiny, moved, **layout), None, tmp_path, said=tmp_path / "said")
        assert "checkpoint-6: step 6 of 10" in (tmp_path / "said").read_text()
        assert rows(tmp_path) == {step: expected_rows[step] for step in range(6, 10)}
        found = records(moved)
        assert [r["step"] for r in found] == list(range(1, 11))
        losses, wanted = ([r["loss"] for r in lines] for lines in (found, expected))
        gaps = [abs(a - b) / b for a, b in zip(losses, wanted, strict=True)]
        same = size == 2 and not layout
        assert max(gaps) == 0.0 if same else max(gaps) < 1e-6, (size, layout, gaps)


def limited(rank: int, size: int, arguments: list[str]) -> None:
    """A run whose last process cannot write."""
    if rank == size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_MUCH, resource.RLIM_INFINITY))
    forked.command(rank, size, arguments)


def test_a_run_learns_within_a_few_steps_that_a_process_could_not_write(tiny, tmp_path):
    run = tmp_path / "run"
    arguments = options(tiny, run, trainer__total_training_steps=40, trainer__save_freq=20)
    said = forked.run(["sft", *arguments], tmp_path, size=2, code=3, begin=limited)
    assert re.search(r"checkpoint-20 failed: .*No checkpoint was complete yet", said), said
    assert not list(run.glob("*checkpoint-*"))
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert 20 <= records(run)[-1]["step"] < 40, "learnt only at the next save"


def test_a_run_killed_after_it_stopped_early_does_not_train_on(tiny, tmp_path):
    arguments = options(
        tiny, tmp_path / "run", data__val_files=tiny / "test.parquet", optim__lr=0.3, optim__lr_scheduler_type="constant",
        optim__lr_warmup_steps=0, trainer__total_training_steps=40, trainer__test_freq=1,
        trainer__early_stopping_patience=1,
    )  # fmt: skip
    die = forked.Moment("os.rename", r"\.checkpoint-final\.tmp")
    group = forked.start(forked.sft, 1, arguments, die, said=tmp_path / "said")
    group.ends([-9])
    before = records(tmp_path / "run")
    run(forked.sft, 1, arguments, said=tmp_path / "said")
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["step"]) == ("finished", before[-1]["step"]) and state["step"] < 40
    assert records(tmp_path / "run") == before


def test_what_saving_costs_is_written(tiny, tmp_path):
    run(forked.sft, 1, options(tiny, tmp_path / "run"), said=tmp_path / "said")
    waits = {r["step"]: r["save_wait_seconds"] for r in records(tmp_path / "run")}
    assert [step for step, seconds in waits.items() if seconds > 0] == [4, 7, 10]
