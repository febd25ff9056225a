"""One process equals two and three: loss, every gradient tensor, and the weights after steps."""

import os

import pytest
import torch
import torch.multiprocessing as mp

from posttrain.distributed.device import choose_device
from posttrain.distributed.world import join_world
from posttrain.errors import InputError
from posttrain.losses.sft import sft_loss
from tiny import CONFIGS, gradients, make_engine, packed, random_samples, tiny_lm, worst_gap

STEPS = 3
# rows: two steps of many, one with fewer rows than processes (some get a filler)
BATCHES = [random_samples(9, seed=0), random_samples(8, seed=1), random_samples(1, seed=2)]


def trajectory(family: str, world, limits: dict, checkpointing: bool) -> dict:
    """Losses and gradients of each step, and the weights after the last."""
    engine = make_engine(tiny_lm(family), world, checkpointing=checkpointing)
    found: dict = {"losses": [], "gradients": [], "norms": []}
    for samples in BATCHES:
        report = engine.forward_backward(packed(samples, world, **limits), sft_loss)
        found["losses"].append(float(report.loss))
        found["gradients"].append(gradients(engine))
        found["norms"].append(float(engine.optim_step().grad_norm))
    found["logprobs"] = [a.tolist() for a in engine.forward(packed(BATCHES[0], world, **limits))]
    found["weights"] = {name: weight.clone() for name, weight in engine.named_weights()}
    return found


def worker(rank: int, size: int, port: int, cases: list, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with join_world(choose_device("cpu")) as world:
        for number, (family, limits, checkpointing) in enumerate(cases):
            found = trajectory(family, world, limits, checkpointing)
            if rank == 0:
                torch.save(found, f"{folder}/{size}-{number}.pt")
        with pytest.raises(InputError, match="only rank 1"):
            world.everyone(lambda: fail() if rank == 1 else None)
        with pytest.raises(InputError, match="only rank 1"):
            world.on_main(lambda: fail())


def fail():
    raise InputError("only rank 1")


CASES = [(family, {"max_tokens": 60}, False) for family in CONFIGS]
CASES += [("qwen2", {"max_rows": 1}, False), ("qwen2", {}, True)]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_equal_one(size, tmp_path):
    mp.spawn(worker, (size, free_port(), CASES, str(tmp_path)), nprocs=size)
    for number, (family, limits, checkpointing) in enumerate(CASES):
        found = torch.load(tmp_path / f"{size}-{number}.pt")
        from tiny import alone

        expected = trajectory(family, alone(), limits, checkpointing)
        case = f"{family} {limits} checkpointing={checkpointing}"
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6), case
        assert worst_gap(found["gradients"][0], expected["gradients"][0]) < 1e-5, case
        assert found["norms"][0] == pytest.approx(expected["norms"][0], rel=1e-5), case
        # later steps stand on weights that AdamW has moved, which amplifies rounding
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4), case
        assert worst_gap(found["weights"], expected["weights"]) < 1e-3, case
