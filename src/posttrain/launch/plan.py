"""What a command becomes, from its options and its environment: a worker of others, or workers to start here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.config.schema import TrainerOptions
from posttrain.errors import InputError

Environment = Mapping[str, str]
FIRST_PORT, NUM_PORTS = 20_000, 12_000  # below those that systems hand out by themselves
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Workers:
    """Workers to start on this node. With several nodes each starts its own, and they meet at `endpoint` as `run_id`."""

    processes: int
    max_restarts: int = 0
    num_nodes: int = 1
    endpoint: str = "127.0.0.1:0"
    run_id: str = "posttrain"


@dataclass(frozen=True)
class SlurmStep:
    """What srun tells each of its tasks."""

    num_tasks: int
    num_nodes: int
    rank: int
    local_rank: int
    first_node: str
    name: str
    port: int

    @classmethod
    def of(cls, environment: Environment) -> SlurmStep | None:
        """None outside of a step: in a batch script, or in a shell that holds an allocation."""
        if "SLURM_STEP_NUM_TASKS" not in environment:
            return None
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        return cls(
            num_tasks=int(environment["SLURM_STEP_NUM_TASKS"]),
            num_nodes=int(environment["SLURM_STEP_NUM_NODES"]),
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            first_node=first_of_nodelist(environment["SLURM_STEP_NODELIST"]),
            name=f"slurm-{job}.{step}",
            port=FIRST_PORT + (16 * job + step) % NUM_PORTS,  # neighbouring jobs and steps may share a node
        )

    @property
    def is_one_task_a_node(self) -> bool:
        return self.num_tasks == self.num_nodes


def plan_launch(
    trainer: TrainerOptions, environment: Environment, at_terminal: bool = False
) -> Workers | dict[str, str]:
    """The workers to start on this node, or, where this process does the work, what its environment lacks for that.

    `at_terminal` says that a person types: a shell opened by srun carries a task's variables, and is none.
    Raises InputError where options and environment contradict each other.
    """
    if is_launched(environment):
        _check_world(environment)
        return {}
    step = None if at_terminal else SlurmStep.of(environment)
    if step and step.num_tasks > 1 and not (step.is_one_task_a_node and step.num_nodes == trainer.nnodes):
        return _slurm_task(trainer, step, environment)
    processes = trainer.n_gpus_per_node or 1
    if trainer.nnodes > 1:
        endpoint, run_id = _meeting(trainer, step, environment)
        return Workers(processes, trainer.max_restarts, trainer.nnodes, endpoint, run_id)
    return Workers(processes, trainer.max_restarts) if processes > 1 or trainer.max_restarts else {}


def is_launched(environment: Environment) -> bool:
    """Whether torchrun or another launcher has started this process among others."""
    return "LOCAL_RANK" in environment or environment.get("WORLD_SIZE", "1") != "1"


def first_of_nodelist(nodelist: str) -> str:
    """The first host of Slurm's short form: `gpu[007-010,12],login1` -> `gpu007`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else nodelist


def _check_world(environment: Environment) -> None:
    """Raise InputError where a launcher's variables cannot be of one process among others."""
    size = environment.get("WORLD_SIZE", "1")
    if size == "1":
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise InputError(
            f"The environment says WORLD_SIZE={size}, as a launcher does, but not {', '.join(missing)}. Start the command "
            "with torchrun, or unset WORLD_SIZE."
        )
    per_pod = environment.get("PET_NPROC_PER_NODE", "1")
    if per_pod != "1" and "LOCAL_RANK" not in environment:  # of Kubeflow: RANK counts pods, WORLD_SIZE processes
        raise InputError(
            f"The environment asks for PET_NPROC_PER_NODE={per_pod} processes in this pod, which torchrun starts: use "
            "`torchrun -m posttrain ...` as the command."
        )
    rank = environment["RANK"]
    if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"The environment says RANK={rank} and WORLD_SIZE={size}; RANK counts from 0 to WORLD_SIZE - 1. Check the "
            "number of nodes and processes that the launcher was given."
        )


def _slurm_task(trainer: TrainerOptions, step: SlurmStep, environment: Environment) -> dict[str, str]:
    """The variables of a worker, for a task among others that Slurm started one a device."""
    nodes, per_node = trainer.nnodes, trainer.n_gpus_per_node
    if nodes not in (1, step.num_nodes) or per_node not in (None, step.num_tasks / step.num_nodes):
        raise InputError(
            f"Slurm started {step.num_tasks} tasks on {step.num_nodes} nodes, while the options ask for {nodes} nodes with "
            f"{per_node or 1} processes each (trainer.nnodes, trainer.n_gpus_per_node). Start one task a node, with "
            f"srun --ntasks-per-node=1 and trainer.nnodes={step.num_nodes}, or one a device, with "
            f"srun --ntasks-per-node={per_node or 1}."
        )
    sees_one = any(re.fullmatch(r"[^,]+", environment.get(name, "")) for name in VISIBLE_DEVICES)
    return {
        "RANK": str(step.rank),
        "LOCAL_RANK": "0" if sees_one else str(step.local_rank),  # with --gpus-per-task a task sees its own alone
        "WORLD_SIZE": str(step.num_tasks),
        "MASTER_ADDR": step.first_node,
        "MASTER_PORT": str(step.port),
    }


def _meeting(trainer: TrainerOptions, step: SlurmStep | None, environment: Environment) -> tuple[str, str]:
    """Where the nodes meet and under which name."""
    if trainer.rdzv_endpoint:
        return trainer.rdzv_endpoint, Workers.run_id
    if step and step.is_one_task_a_node and step.num_nodes == trainer.nnodes:
        return f"{step.first_node}:{step.port}", step.name
    hint = (
        f"Under Slurm, start it on each node instead: srun --nodes={trainer.nnodes} --ntasks-per-node=1 posttrain ..."
        if "SLURM_JOB_ID" in environment
        else "Then start the same command on each node."
    )
    raise InputError(
        f"trainer.nnodes={trainer.nnodes} needs trainer.rdzv_endpoint=HOST:PORT, the name of the first node and a free port "
        f"there. {hint}"
    )
