"""What a command becomes in each environment; runs over two nodes; workers that are lost and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import Command, free_port, records
from posttrain.cli.begin import resolve
from posttrain.config.compose import compose
from posttrain.config.schema import TrainerOptions
from posttrain.errors import InputError
from posttrain.launch.plan import Workers, first_of_nodelist, plan_launch
from test_runs import wait_for


def slurm(tasks: int, nodes: int, rank: int = 0, local: int = 0, **more: str) -> dict[str, str]:
    """The environment of a task that srun started."""
    return {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2", "SLURM_NTASKS": str(tasks), "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NODELIST": "gpu[07-08]" if nodes > 1 else "gpu07", **more,
    }  # fmt: skip


BATCH_SCRIPT = {"SLURM_JOB_ID": "1234", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16",
                "SLURM_JOB_NODELIST": "gpu[07-08]"}  # fmt: skip
PORT = 20_000 + (16 * 1234 + 2) % 12_000
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def task(rank: int, local: int, tasks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(tasks), "MASTER_ADDR": "gpu07",
            "MASTER_PORT": str(PORT)}  # fmt: skip


MET = {"nnodes": 2, "rdzv_endpoint": "gpu07:29500"}
PLANS = {
    "one process": ({}, {}, {}),
    "one machine": ({"n_gpus_per_node": 8}, {}, Workers(8)),
    "one process that is started again": ({"max_restarts": 2}, {}, Workers(1, 2)),
    "several machines": ({**MET, "n_gpus_per_node": 8}, {}, Workers(8, 0, 2, "gpu07:29500", "posttrain")),
    "under torchrun": ({**MET, "n_gpus_per_node": 8, "max_restarts": 1}, TORCHRUN, {}),
    "one of torchrun's one": ({"n_gpus_per_node": 8}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {}),
    "one process in each of Kubeflow's pods": (
        {}, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "PET_NPROC_PER_NODE": "1"}, {},
    ),
    "under torchrun under Slurm": ({}, slurm(2, 2, 1) | TORCHRUN, {}),
    "one Slurm task a machine": (
        {"nnodes": 2, "n_gpus_per_node": 8, "max_restarts": 1}, slurm(2, 2, 1),
        Workers(8, 1, 2, f"gpu07:{PORT}", "slurm-1234.2"),
    ),
    "an endpoint goes before Slurm's": (
        {**MET, "n_gpus_per_node": 8}, slurm(2, 2), Workers(8, 0, 2, "gpu07:29500", "posttrain"),
    ),
    "one Slurm task a device": ({}, slurm(16, 2, 9, 1), task(9, 1, 16)),
    "one Slurm task a device, said too": ({"nnodes": 2, "n_gpus_per_node": 8}, slurm(16, 2, 9, 1), task(9, 1, 16)),
    "one Slurm task a device of one machine": ({"n_gpus_per_node": 8}, slurm(8, 1, 3, 3), task(3, 3, 8)),
    "one device on each machine": ({}, slurm(2, 2, 1), task(1, 0, 2)),
    "tasks that see one device each": ({}, slurm(8, 1, 3, 3, CUDA_VISIBLE_DEVICES="5"), task(3, 0, 8)),
    "tasks that see all devices": ({}, slurm(2, 1, 1, 1, CUDA_VISIBLE_DEVICES="5,6"), task(1, 1, 2)),
    "a batch script": ({}, BATCH_SCRIPT, {}),
    "a batch script that starts several": ({"n_gpus_per_node": 8}, BATCH_SCRIPT, Workers(8)),
    "a shell in a step of one task": ({}, slurm(1, 1), {}),
    "a shell in a step of one task that starts several": ({"n_gpus_per_node": 8}, slurm(1, 1), Workers(8)),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_what_a_command_becomes(case):
    options, environment, expected = PLANS[case]
    assert plan_launch(TrainerOptions(**options), environment) == expected


def test_a_person_in_a_shell_that_srun_opened_is_no_task():
    assert plan_launch(TrainerOptions(), slurm(8, 2), at_terminal=True) == {}
    assert plan_launch(TrainerOptions(n_gpus_per_node=4), slurm(8, 2), at_terminal=True) == Workers(4)


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ({"nnodes": 2}, {}, "needs trainer.rdzv_endpoint=HOST:PORT"),
        ({"nnodes": 2}, BATCH_SCRIPT, "srun --nodes=2 --ntasks-per-node=1"),
        ({"nnodes": 2}, slurm(1, 1), "srun --nodes=2 --ntasks-per-node=1"),
        ({"n_gpus_per_node": 8}, slurm(2, 2), "2 tasks on 2 nodes"),
        ({"nnodes": 4, "n_gpus_per_node": 8}, slurm(2, 2), "4 nodes with 8 processes"),
        ({"nnodes": 2, "n_gpus_per_node": 4}, slurm(16, 2), "16 tasks on 2 nodes"),
        ({}, {"WORLD_SIZE": "4", "RANK": "1"}, "not MASTER_ADDR, MASTER_PORT"),
        (
            {},
            {"WORLD_SIZE": "16", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "PET_NPROC_PER_NODE": "8"},
            "torchrun -m",
        ),
        ({}, TORCHRUN | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({}, TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
    ],
)
def test_contradictions_are_told(options, environment, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        plan_launch(TrainerOptions(**options), environment)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("gpu7", "gpu7"), ("a,b", "a"), ("gpu[007-010,12],login1", "gpu007"), ("gpu[3,5]", "gpu3"),
        ("rack[1-2]-node[08-09],x", "rack1-node08"), ("n[1-3].site.org,m", "n1.site.org"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_nodelist(nodelist, first):
    assert first_of_nodelist(nodelist) == first


def test_a_run_of_several_machines_is_evaluated_on_this_one(tmp_path):
    options = ["trainer.nnodes=2", "trainer.rdzv_endpoint=a:1", "trainer.max_restarts=3", "trainer.seed=7"]
    (tmp_path / "config.yaml").write_text(compose(options).as_yaml())
    (tmp_path / "run.json").write_text("{}")
    trainer = resolve(None, {}, str(tmp_path)).config.trainer
    assert (trainer.nnodes, trainer.rdzv_endpoint, trainer.max_restarts, trainer.seed) == (1, None, 0, 7)
    assert resolve(["trainer.max_restarts=1"], {}, str(tmp_path)).config.trainer.max_restarts == 1


# real processes


class Node:
    """One command of a run, as on one of its machines."""

    def __init__(self, posttrain: Command, *command: str):
        environment = posttrain.environment | {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": ""}
        self.process = subprocess.Popen(
            command, cwd=posttrain.folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def workers(self) -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def end(self, code: int | None = 0) -> tuple[str, str]:
        out, err = self.process.communicate(timeout=200)
        said = f"exit code {self.process.returncode}\n{out}\n{err}"
        assert code is None or self.process.returncode == code, said
        assert code is None or "Traceback" not in err, said
        return out, err


def ours(posttrain: Command, run: str, **options: object) -> list[Node]:
    """The same command on two nodes."""
    given = options | {"trainer__nnodes": 2, "trainer__rdzv_endpoint": f"localhost:{free_port()}"}
    command = posttrain.arguments("sft", *posttrain.sft_options(run, **given))
    return [Node(posttrain, *command) for _ in range(2)]


TORCHRUN_COMMAND = [sys.executable, "-m", "torch.distributed.run"]
LENGTH = {"trainer__total_training_steps": 40, "trainer__save_freq": 5}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> Path:
    """A run of torchrun's over two nodes."""
    command = Command(tiny, tmp_path_factory.mktemp("undisturbed"))
    launcher = [*TORCHRUN_COMMAND, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                f"--rdzv_endpoint=localhost:{free_port()}", "-m", "posttrain", "sft"]  # fmt: skip
    nodes = [Node(command, *launcher, *command.sft_options("run", **LENGTH)) for _ in range(2)]
    assert sorted(bool(node.end()[0].strip()) for node in nodes) == [False, True]
    run = command.folder / "run"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    return run


def lose_a_worker(node: Node, run: Path) -> None:
    wait_for(lambda: (run / "checkpoint-5").exists(), node.process)
    os.kill(node.workers()[-1], signal.SIGKILL)


def assert_same(run: Path, undisturbed: Path) -> None:
    found, expected = (load_file(r / "checkpoint-final" / "model.safetensors") for r in (run, undisturbed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(undisturbed)]


@pytest.mark.slow
def test_two_nodes_lose_a_worker_and_end_as_if_they_had_not(undisturbed, posttrain):
    nodes = ours(posttrain, "run", trainer__max_restarts=1, trainer__resume_mode="disable", **LENGTH)
    lose_a_worker(nodes[1], posttrain.folder / "run")
    (out, err), (other_out, other_err) = (node.end() for node in nodes)
    assert sorted(map(bool, (out.strip(), other_out.strip()))) == [False, True]
    assert "resumed from" in out + other_out
    assert "was killed by SIGKILL" in other_err and "restart 1 of 1" in other_err, other_err
    assert "no effect" not in err + other_err
    assert_same(posttrain.folder / "run", undisturbed)


@pytest.mark.slow
def test_torchrun_restarts_a_lost_worker_and_the_run_goes_on(undisturbed, posttrain):
    node = Node(posttrain, *TORCHRUN_COMMAND, "--nproc_per_node=2", "--max_restarts=1", "-m", "posttrain", "sft",
                *posttrain.sft_options("run", trainer__max_restarts=3, trainer__nnodes=4, **LENGTH))  # fmt: skip
    lose_a_worker(node, posttrain.folder / "run")
    out, err = node.end(code=None)
    assert node.process.returncode == 0, out + err
    assert "resumed from" in out
    assert "no effect in this run: trainer.max_restarts" in err and "no effect in this run: trainer.nnodes" in err
    assert_same(posttrain.folder / "run", undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_node_stops_and_saves_on_all(posttrain):
    nodes = ours(posttrain, "run", trainer__max_restarts=1, trainer__total_training_steps=400)
    run = posttrain.folder / "run"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) >= 2, nodes[0].process)
    for pid in [nodes[0].process.pid, *nodes[0].workers()]:  # as Slurm does
        os.kill(pid, signal.SIGTERM)
    said = "".join(node.end(143)[1] for node in nodes)
    assert said.count("saved") == 1
    state = json.loads((run / "run.json").read_text())
    assert state["status"] == "stopped" and (run / f"checkpoint-{state['step']}").exists()


@pytest.mark.slow
def test_what_cannot_be_started_is_told_and_not_tried_again(posttrain, tiny):
    broken = posttrain.folder / "broken.jsonl"
    broken.write_text('{"messages": "none"}\n')
    done = posttrain.sft("run", code=2, trainer__n_gpus_per_node=2, trainer__max_restarts=3, data__train_files=broken)
    assert len(done.stderr.strip().splitlines()) <= 3 and done.stderr.count("broken.jsonl") >= 1, done.stderr
    absent = (
        "from posttrain.launch.agent import run_workers; from posttrain.launch.plan import Workers; import sys; "
        "sys.exit(run_workers(Workers(1, 0, 2, sys.argv[1]), [], meet_seconds=2))"
    )
    for endpoint, words in ((f"localhost:{free_port()}", "2 nodes did not meet"), ("192.0.2.1:1", "was not reached")):
        found = subprocess.run([sys.executable, "-c", absent, endpoint], capture_output=True, text=True, timeout=60)
        assert found.returncode == 3 and words in found.stderr and "Traceback" not in found.stderr, found.stderr
