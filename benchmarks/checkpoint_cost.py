"""What saving costs training on CPU: the same steps without saving, with one save beside them, and with one waited for.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint_cost.py --folder FOLDER

One process, one model of 30M parameters (360 MB of weights and optimizer state, flushed to the disk with fsync). A turn is
`--steps` optimizer steps; each round takes the three turns one after the other, so that what the machine does meanwhile
meets all of them. A turn with saving counts whole: where the checkpoint is not complete when its steps are done, the wait
for it belongs to it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen2Config

from posttrain.config.schema import EngineOptions, OptimOptions
from posttrain.data.batches import pack
from posttrain.distributed.device import choose_device
from posttrain.distributed.sharding import prepare
from posttrain.distributed.world import World
from posttrain.engine.build import make_optimizer
from posttrain.engine.checkpoint import Checkpoints, Progress
from posttrain.engine.engine import Engine
from posttrain.losses.sft import sft_loss
from posttrain.models.policy import Policy
from posttrain.records import Sample

SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
TURNS = ("no saving", "saved beside", "saved and waited for")


def build() -> Engine:
    torch.manual_seed(0)
    world = World(choose_device("cpu"))
    policy = Policy(AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE), dtype=torch.float32), packing=True)
    policy = prepare(policy, world, torch.float32, EngineOptions())
    return Engine(policy, world, partial(make_optimizer, OptimOptions(), EngineOptions(), 10_000))


def turn(kind: str, engine: Engine, checkpoints: Checkpoints, sample: Sample, steps: int) -> tuple[float, float]:
    """Seconds of the turn, and those of it in which training stood still for saving."""
    started, waited = time.perf_counter(), 0.0
    for step in range(steps):
        engine.forward_backward([pack([sample])], sft_loss)
        engine.optim_step()
        if step == 0 and kind != "no saving":
            saving = time.perf_counter()
            checkpoints.save(engine, Progress(engine.step, None, None, 0, "", ""))
            if kind == "saved and waited for":
                checkpoints.wait()
            waited += time.perf_counter() - saving
    saving = time.perf_counter()
    checkpoints.wait()
    return time.perf_counter() - started, waited + time.perf_counter() - saving


def main(folder: Path | None = None, rounds: int = 5, steps: int = 8, tokens: int = 128) -> None:
    engine = build()
    rng = np.random.default_rng(0)
    sample = Sample(0, rng.integers(0, SHAPE["vocab_size"], tokens).astype(np.int32), np.ones(tokens, np.float32))
    where = Path(tempfile.mkdtemp(dir=folder))
    checkpoints = Checkpoints(where, 1, engine.world)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in TURNS}
    try:
        turn("saved and waited for", engine, checkpoints, sample, 2)  # warm-up
        for _ in range(rounds):
            for kind in TURNS:
                found[kind].append(turn(kind, engine, checkpoints, sample, steps))
    finally:
        checkpoints.close()
        shutil.rmtree(where)
    show(found, steps, sum(p.numel() for p in engine.policy.parameters()))


def show(found: dict[str, list[tuple[float, float]]], steps: int, parameters: int) -> None:
    table = Table(title=f"{parameters / 1e6:.1f}M parameters, {steps} steps a turn, {torch.get_num_threads()} thread(s), "
                        f"{os.cpu_count()} cores")  # fmt: skip
    for name in ("turn", "seconds", "least", "most", "stood still", "more than no saving"):
        table.add_column(name, justify="left" if name == "turn" else "right")
    for kind, turns in found.items():
        seconds, waits = ([t[i] for t in turns] for i in (0, 1))
        more = median(s / base[0] - 1 for s, base in zip(seconds, found["no saving"], strict=True))
        table.add_row(kind, f"{median(seconds):.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}",
                      f"{median(waits):.2f}", f"{more:+.1%}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
