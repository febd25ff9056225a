"""The numbers do not depend on the layout: {shard, hybrid} x Ulysses x packing x micro-batches x accumulation x {full, LoRA}.

One group of processes is started per world size and works through all of its cases; each is compared with one process that
runs the same rows in one micro-batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import forked
from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.distributed.device import choose_device
from posttrain.distributed.sharding import local
from posttrain.distributed.world import World, join_world
from posttrain.engine.build import build_engine
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer import StepReport
from posttrain.losses.loss import Loss
from posttrain.losses.sft import sft_loss, sft_value
from posttrain.records import Sample
from tiny import VOCABULARY, alone, clear, gradients, packed, random_samples, worst_gap

LOSS_GAP, GRADIENT_GAP = 1e-6, 1e-5
NUM_STEPS = 20
LONGEST = 24
SIZES = [int(size) for size in os.environ.get("POSTTRAIN_TEST_SIZES", "1,2,3,4").split(",")]


@dataclass(frozen=True)
class Layout:
    """How one engine lies over the processes."""

    fsdp_size: int | None = None
    sequence: int = 1
    lora: bool = False
    family: str = "qwen2"
    recompute: int = 0
    reshard: bool = True
    offload: bool = False

    def options(self, models: Path) -> tuple[ModelOptions, EngineOptions]:
        adapter = {"lora_rank": 4, "lora_alpha": 8.0, "lora_adapter_path": str(models / "adapter")} if self.lora else {}
        recompute = {"enable_gradient_checkpointing": True, "gradient_checkpointing_every": self.recompute}
        model = ModelOptions(path=str(models / self.family), **adapter, **(recompute if self.recompute else {}))
        return model, EngineOptions(
            fsdp_size=self.fsdp_size,
            ulysses_sequence_parallel_size=self.sequence,
            reshard_after_forward=self.reshard,
            param_offload=self.offload,
            optimizer_offload=self.offload,
        )


@dataclass(frozen=True)
class Split:
    """How rows become micro-batches."""

    packed: bool
    by: str
    accumulation: int

    def limits(self, num_rows: int, readers: int) -> dict[str, int]:
        if not self.packed:
            return {"max_rows": 1} if self.by == "rows" else {"max_tokens": LONGEST}
        rows = -(-num_rows // (readers * self.accumulation))
        return {"max_rows": rows} if self.by == "rows" else {"max_tokens": rows * LONGEST}

    def num_rows(self, readers: int) -> int:
        return readers * self.accumulation * (3 if self.packed else 1)


SPLITS = [Split(*parts) for parts in product((True, False), ("rows", "tokens"), (1, 4))]


def layouts(size: int) -> list[Layout]:
    """Every layout of the matrix on so many processes, then some of other families and options."""
    if size == 3:  # nothing divides evenly
        return [Layout(), Layout(sequence=3, family="three-key-heads"), Layout(lora=True)]
    meshes = [None] if size == 1 else [None, size // 2]
    sequences = [n for n in (1, 2, 4) if n <= size]
    matrix = [Layout(mesh, n, lora) for mesh, n, lora in product(meshes, sequences, (False, True))]
    families = [Layout(None, sequences[-1], family=family) for family in ("llama", "gemma2", "qwen3")]
    others = [
        Layout(None, min(2, size), family="three-key-heads"),
        Layout(None, min(2, size), recompute=2),
        Layout(None, min(2, size), lora=True, recompute=1),
        Layout(meshes[-1], 1, reshard=False),
        Layout(None, 1, offload=True),
        Layout(None, 1, offload=True, lora=True),
    ]
    return matrix + families + others


def learns(layout: Layout, size: int) -> bool:
    """Whether a layout is followed over many steps: some of each kind are, to save time."""
    several_share = layout.sequence == min(2, size)
    plainest = layout == Layout(lora=layout.lora)
    copies = layout.fsdp_size is not None and several_share
    return layout.family == "gemma2" or (layout.family == "qwen2" and (plainest or copies))


def rows(count: int) -> list[Sample]:
    """Rows longer than half of LONGEST, so that a budget of LONGEST tokens holds one; the second has no trained token."""
    rng = np.random.default_rng(count)
    samples = []
    for row in range(count):
        length = int(rng.integers(LONGEST // 2 + 1, LONGEST + 1))
        weights = np.ones(length, dtype=np.float32)
        weights[: int(rng.integers(0, length - 1))] = 0
        if row == 1:
            weights[:] = 0
        samples.append(Sample(row, rng.integers(0, VOCABULARY, length).astype(np.int32), weights))
    return samples


# steps of many rows, of fewer than there are processes, of rows that are cut across processes
TRAJECTORY = [random_samples(count, seed=number) for number, count in enumerate([9, 8, 7, 6, 1] * (NUM_STEPS // 5))]


class Sgd:
    """Plain gradient descent: it does not amplify rounding as AdamW does."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @torch.no_grad()
    def step(self, step: int) -> StepReport:
        for parameter in self.engine.policy.lm.parameters():
            if parameter.grad is not None:
                local(parameter).sub_(local(parameter.grad), alpha=0.01)
                parameter.grad = None
        return StepReport(torch.zeros(()), torch.zeros(()), 0.01, 0.0)


def build(layout: Layout, world: World, models: Path) -> Engine:
    model, engine = layout.options(models)
    optim = OptimOptions(lr=1e-3, lr_scheduler_type="constant", lr_warmup_steps=0, weight_decay=0.1)
    return build_engine(model, engine, optim, NUM_STEPS, world, torch.float32, packing=True, seed=0)


def one_step(engine: Engine, samples: list[Sample], limits: dict[str, int], loss: Loss = sft_loss) -> dict:
    report = engine.forward_backward(packed(samples, engine.world, **limits), loss)
    found = {"loss": float(report.loss), "gradients": gradients(engine)}
    clear(engine)
    return found


def trajectory(layout: Layout, world: World, models: Path) -> dict:
    """Losses of 20 steps of AdamW, and the weights after 20 of gradient descent."""
    limits = {"max_tokens": 120}
    engine = build(layout, world, models)
    losses, norms = [], []
    for samples in TRAJECTORY:
        losses.append(float(engine.forward_backward(packed(samples, world, **limits), sft_loss).loss))
        norms.append(float(engine.optim_step().grad_norm))
    engine = build(layout, world, models)
    engine.optimizer = Sgd(engine)
    for samples in TRAJECTORY:
        engine.forward_backward(packed(samples, world, **limits), sft_loss)
        engine.optim_step()
    return {"losses": losses, "norms": norms, "weights": {n: w.clone() for n, w in engine.named_weights()}}


# a loss whose slope is not known before the forward pass, as in reinforcement learning
UNKNOWN_SLOPE = Loss(sft_value)


def work(layout: Layout, world: World, models: Path) -> dict:
    engine = build(layout, world, models)
    found = {"steps": {}, "unknown slope": one_step(engine, rows(7), {"max_rows": 2}, UNKNOWN_SLOPE)}
    for split in SPLITS:
        count = split.num_rows(world.num_readers)
        found["steps"][split] = (count, one_step(engine, rows(count), split.limits(count, world.num_readers)))
    if learns(layout, world.size):
        found["trajectory"] = trajectory(layout, world, models)
    return found


def worker(rank: int, size: int, models: Path, results: Path) -> None:
    torch.set_num_threads(1)
    for number, layout in enumerate(layouts(size)):
        forked.meet_again(number)
        with join_world(choose_device("cpu"), torch.float32, layout.options(models)[1]) as world:
            found = work(layout, world, models)
            if rank == 0:
                torch.save(found, results / f"{number}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_layout_computes_what_one_process_computes(size, models, tmp_path):
    torch.set_num_threads(1)

    @cache
    def expected_step(layout: Layout, count: int) -> dict:
        return one_step(build(plain(layout), alone(), models), rows(count), {})

    @cache
    def expected_trajectory(layout: Layout) -> dict:
        return trajectory(layout, alone(), models)

    if size > 1:
        forked.start_server()
        group = forked.start(worker, size, models, tmp_path, said=tmp_path / "said")
        group.ends([0] * size, seconds=600)
    problems: list[str] = []
    differences: list[float] = []
    for number, layout in enumerate(layouts(size)):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=False) if size > 1 else work(layout, alone(), models)
        steps = {**found["steps"], "unknown slope": (7, found["unknown slope"])}
        for split, (count, step) in steps.items():
            case, expected = f"{size} processes, {layout}, {split}", expected_step(plain(layout), count)
            gap = abs(step["loss"] / expected["loss"] - 1)
            worst = worst_gap(step["gradients"], expected["gradients"])
            if gap > LOSS_GAP or worst > GRADIENT_GAP:
                problems.append(f"{case}: loss off by {gap:.1e}, gradients by {worst:.1e}")
        if not learns(layout, size):
            continue
        path, wanted = found["trajectory"], expected_trajectory(plain(layout))
        off = (np.array(path["losses"]) / np.array(wanted["losses"]) - 1).tolist()
        weights = worst_gap(path["weights"], wanted["weights"])
        norms = float(np.abs(np.array(path["norms"]) / np.array(wanted["norms"]) - 1).max())
        differences += off
        if max(map(abs, off)) > 1e-4 or weights > 1e-5 or norms > 1e-3:
            problems.append(
                f"{size} processes, {layout}: losses off by {max(map(abs, off)):.1e}, weights by {weights:.1e}"
            )
    assert not problems, "\n".join(problems)
    # a drift to one side would be a mistake, however small
    assert abs(np.mean(differences)) < 3e-7 + 4 * np.std(differences) / np.sqrt(len(differences))


def plain(layout: Layout) -> Layout:
    """The same model on one process, with nothing special."""
    return replace(layout, fsdp_size=None, sequence=1, recompute=0, reshard=True, offload=False)
