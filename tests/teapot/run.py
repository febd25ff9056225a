"""One process of test_device.py: short fine-tunings by the real loop, and a report of where everything was.

python run.py REPORT_FOLDER '[["name", ["option=value", ...]], ...]'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from posttrain.config.compose import compose
from posttrain.distributed.device import choose_device
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer import local
from posttrain.errors import InputError
from posttrain.loops import sft as loop
from posttrain.losses.sft import sft_loss


def devices(tensors) -> list[str]:
    return sorted({str(local(tensor).device) for tensor in tensors})


def gradients(engine: Engine) -> list[Tensor]:
    return [p.grad for p in engine.policy.parameters() if p.grad is not None]


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: local(weight.detach()).cpu().clone() for name, weight in engine.policy.named_parameters()}


def shares_memory(engine: Engine) -> bool:
    """Whether what a checkpoint reads into the engine's state reaches its optimizer."""
    state = engine.state()["optimizer"]
    return all(
        local(state[f"{name}/{key}"]).data_ptr() == moment.data_ptr()
        for name, moments in engine.optimizer.moments.items()
        for key, moment in moments.items()
    )


def inspect(engine: Engine, micro_batches) -> dict:
    """Where weights, gradients and moments are, and whether a step whose gradient is not finite moves nothing."""
    engine.forward_backward(micro_batches, sft_loss)
    found = {
        "num_weights": len(list(engine.policy.parameters())),
        "weights": devices(engine.policy.parameters()),
        "gradients": devices(gradients(engine)),
        "moments": devices(t for name, t in engine.state()["optimizer"].items() if not name.endswith("/step")),
        "shared": shares_memory(engine),
    }
    for gradient in gradients(engine):
        local(gradient).fill_(float("nan"))
    before = weights(engine)
    found["skipped"] = float(engine.optim_step().skipped)
    engine.step -= 1  # the run goes on as if nothing had been
    found["kept"] = all(torch.equal(weight, before[name]) for name, weight in weights(engine).items())
    return found


def refusal(wanted: str, **environment: str) -> str:
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        choose_device(wanted)
    except InputError as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return "none"


def observed(train: Callable, found: dict) -> Callable:
    def train_and_inspect(run, engine, data, world, judge):
        train(run, engine, data, world, judge)
        found.update(inspect(engine, data.micro_batches(0, world)))

    return train_and_inspect


def main(folder: Path, runs: list[tuple[str, list[str]]]) -> None:
    report: dict = {}
    train = loop.train
    for number, (name, options) in enumerate(runs):
        # as torchrun counts its restarts: the store still holds the addresses of the run before
        os.environ.update(GROUP_WORLD_SIZE="1", TORCHELASTIC_RESTART_COUNT=str(number))
        report[name] = {}
        loop.train = observed(train, report[name])
        resolved = compose(options)
        loop.sft(resolved.config, resolved.as_yaml())
    device = choose_device()
    plugin = sys.modules.get(f"torch_{device.type}")
    report["device"] = {
        "type": device.type,
        "name": device.name,
        "backend": device.backend,
        "dtype": str(device.compute_dtype("auto")),
    }
    report["backends_made"] = plugin.BACKENDS_MADE if plugin else []
    report["operators"] = dict(torch.ops.teapot.operators()) if plugin else {}
    report["refusals"] = [refusal("cuda"), refusal("auto", LOCAL_WORLD_SIZE="3")]
    (folder / f"report-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
