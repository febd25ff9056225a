"""What AdamW's averages in 8 bits are worth beside exact ones, and what a step with them costs.

    OMP_NUM_THREADS=1 python benchmarks/averages_8bit.py

First, the root of the square's average, which divides the update, over the exact one, under gradients of noise that are smaller in some
columns of a block than in others: where the side to which a number is rounded alternates (posttrain), and where it is the
nearest of the levels of Dettmers et al. 2022. Then
nanoseconds a weight of one optimizer step, in turn with torch's fused kernel, and those of forward and backward beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from statistics import median

import numpy as np
import torch
import typer
from torch import Tensor

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.data.batches import pack
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World
from posttrain.engine.build import build_engine
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer_8bit import BLOCK, UNSIGNED, decode, encode, threshold
from posttrain.losses.sft import sft_loss
from posttrain.models.load import find_model
from posttrain.records import Sample

ROWS, COLUMNS = 64, 1024
BETAS = (0.95, 0.999)  # of the square's average: posttrain's default, and torch's
SIZES = (1.0, 0.1, 0.01, 0.001)  # of the gradients of every fourth column
# the paper's unsigned levels: seven decades, each cut twice as finely as the one below, by the middles of equal parts; 0 and 1
PAPERS_LEVELS = torch.tensor(
    [0.0, *(10 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2 ** (i + 1)) for i in range(7) for k in range(2 ** (i + 1))), 1.0]
)
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
TOKENS = 4096


def alternating(averages_RC: Tensor, step: int) -> Tensor:
    codes_RC, scales_RB = encode(averages_RC, UNSIGNED, threshold(step, COLUMNS, averages_RC.device))
    return decode(codes_RC, scales_RB, UNSIGNED)


def nearest(averages_RC: Tensor, step: int) -> Tensor:
    blocks_RBb = averages_RC.unflatten(1, (-1, BLOCK))
    scales_RB = blocks_RBb.amax(-1, keepdim=True)
    between = (PAPERS_LEVELS[1:] + PAPERS_LEVELS[:-1]) / 2
    return (PAPERS_LEVELS[torch.bucketize(blocks_RBb / scales_RB, between)] * scales_RB).flatten(1)


def roots(kept: Callable[[Tensor, int], Tensor], beta: float, num_steps: int) -> Tensor:
    """Of each weight, the root of the average that is kept over that of the exact one."""
    torch.manual_seed(0)
    sizes_C = torch.tensor(SIZES).repeat(COLUMNS // len(SIZES))
    exact_RC = kept_RC = torch.zeros(ROWS, COLUMNS)
    for step in range(num_steps):
        squares_RC = (torch.randn(ROWS, COLUMNS) * sizes_C).square()
        exact_RC = exact_RC.lerp(squares_RC, 1 - beta)
        kept_RC = kept(kept_RC.lerp(squares_RC, 1 - beta), step)
    return (kept_RC / exact_RC).sqrt()


def engine_of(optimizer: str) -> Engine:
    model = ModelOptions(path=find_model("posttrain/tiny"), override_config=SHAPE, random_weights=True)
    optim = OptimOptions(optimizer=optimizer)  # type: ignore[arg-type]
    return build_engine(model, EngineOptions(), optim, 100, World(choose_device("cpu")), torch.float32, packing=True, seed=0)  # fmt: skip


def rows() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(n, rng.integers(3, 2000, 256).astype(np.int32), np.ones(256, np.float32)) for n in range(TOKENS // 256)]  # fmt: skip


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def main(
    steps: int = typer.Option(3000, help="Of noise."), rounds: int = typer.Option(5, help="Steps in turn.")
) -> None:
    """AdamW's averages in 8 bits, on a CPU."""
    heads = " | ".join(f"gradients of {size:g}" for size in SIZES)
    print(
        f"| root of the square's average over the exact one, {steps:,} steps | {heads} |\n|---|{'---:|' * len(SIZES)}"
    )
    levels = {"posttrain's levels, the side alternates": alternating, "the paper's levels, the nearest": nearest}
    for beta, (name, kept) in product(BETAS, levels.items()):
        found = roots(kept, beta, steps).unflatten(1, (-1, len(SIZES)))
        cells = (f"{found[..., n].mean() - 1:+.1%}, spread {found[..., n].std():.1%}" for n in range(len(SIZES)))
        print(f"| {name}, decay {beta} | {' | '.join(cells)} |")
    engines = {name: engine_of(name) for name in ("adamw", "adamw_8bit")}
    taken: dict[str, list[float]] = {"forward and backward": [], **{name: [] for name in engines}}
    for _ in range(rounds + 1):  # the first makes the averages
        for name, engine in engines.items():
            taken["forward and backward"].append(seconds(lambda e=engine: e.forward_backward([pack(rows())], sft_loss)))
            taken[name].append(seconds(engine.optim_step))
    weights = engines["adamw"].num_weights()[1]
    print(f"\n| nanoseconds a weight of {weights:,}, {TOKENS:,} tokens a step | |\n|---|---:|")
    for name, found in taken.items():
        print(f"| {name} | {median(found[1:]) / weights * 1e9:,.1f} |")


if __name__ == "__main__":
    typer.run(main)
