"""Speed and memory of fine-tuning on accelerators: Qwen2.5 shapes with random weights, by length of row.

    torchrun --nproc_per_node=1 benchmarks/sft_gpu.py --output-json gpu.json        # or plain python, for one device
    python benchmarks/sft_gpu.py --only 0.5B --lengths 2048 --profile 12            # where the time goes
    python benchmarks/sft_gpu.py --smoke                                            # the script itself, on any machine

Each line is one engine as `posttrain sft` builds it, on rows of real length without padding: documents of `length` tokens,
half of each trained, as many as fill `--tokens` in a micro-batch. Tokens/s and MFU are those of steps 3 to 8, real tokens
only; MFU is `models/flops.py` (formula in docs/metrics.md) over the device's bfloat16 peak in its maker's data sheet.
Weights do not matter to speed; with random ones nothing has to be downloaded.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import typer

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.data.batches import pack
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World, join_world
from posttrain.engine.build import build_engine
from posttrain.engine.engine import Engine
from posttrain.losses.sft import sft_loss
from posttrain.models.flops import forward_backward_flops
from posttrain.records import MicroBatch, Sample

# config.json of Qwen/Qwen2.5-*: hidden, MLP, layers, heads, key/value heads, vocabulary, tied embeddings
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "tiny": (64, 128, 2, 4, 2, 512, True),
}
WARM_UP_STEPS, NUM_STEPS = 2, 6


@dataclass(frozen=True)
class Case:
    """One line: which weights learn, by how long rows."""

    shape: str
    method: str
    length: int

    def options(self, folder: Path, recompute: bool, compiled: bool) -> ModelOptions:
        adapter = {"lora_rank": 16, "lora_alpha": 32} if self.method == "lora" else {}
        path = folder / self.shape
        write_config(path, self.shape)
        return ModelOptions(
            path=str(path),
            random_weights=True,
            enable_gradient_checkpointing=recompute,
            torch_compile=compiled,
            **adapter,
        )


def write_config(path: Path, shape: str) -> None:
    from transformers import Qwen2Config

    hidden, mlp, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    Qwen2Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=32768,
        rope_theta=1e6, rms_norm_eps=1e-6,
    ).save_pretrained(path)  # fmt: skip


def rows(length: int, tokens: int, vocabulary: int, seed: int) -> MicroBatch:
    """Documents of `length` tokens, the second half of each trained, that together have about `tokens`."""
    rng = np.random.default_rng(seed)
    weights = np.arange(length) >= length // 2
    documents = [
        Sample(row, rng.integers(0, vocabulary, length).astype(np.int32), weights.astype(np.float32))
        for row in range(max(1, tokens // length))
    ]
    return pack(documents)


def measure(case: Case, world: World, dtype: torch.dtype, model: ModelOptions, tokens: int, top: int) -> dict[str, Any]:
    """Tokens/s and MFU over all processes, the peak memory of one, and where the time of a step goes."""
    engine = build_engine(model, EngineOptions(), OptimOptions(), 100, world, dtype, packing=True, seed=0)
    vocabulary = SHAPES[case.shape][5]
    flops = forward_backward_flops(engine.policy.lm.config)
    seconds, work = [], []
    for step in range(WARM_UP_STEPS + NUM_STEPS):
        batch = rows(case.length, tokens, vocabulary, seed=100 * step + world.reader)
        world.device.synchronize()
        start = time.perf_counter()
        take_step(engine, batch)
        world.device.synchronize()
        seconds.append(time.perf_counter() - start)
        work.append((batch.num_tokens * world.num_readers, flops(batch) * world.num_readers))
    step_seconds = median(seconds[WARM_UP_STEPS:])
    num_tokens, num_flops = work[-1]
    peak = world.device.peak_flops(dtype) * world.size
    found = {
        **asdict(case),
        "tokens_a_step": num_tokens,
        "tokens_per_second": num_tokens / step_seconds,
        "mfu": num_flops / step_seconds / peak,
        "peak_memory_gib": world.device.peak_memory_gib(),
        "first_step_seconds": seconds[0],
    }
    if top:
        found["profile"] = profile(engine, rows(case.length, tokens, vocabulary, seed=1), top)
    return found


def take_step(engine: Engine, batch: MicroBatch) -> None:
    engine.forward_backward([batch], sft_loss)
    engine.optim_step()


def profile(engine: Engine, batch: MicroBatch, top: int) -> list[dict[str, Any]]:
    """The kernels that take most of a step's time on the device, with their share of it."""
    with torch.profiler.profile() as taken:
        take_step(engine, batch)
        engine.world.device.synchronize()
    on_device = engine.world.device.has_own_memory
    events = [(e.self_device_time_total if on_device else e.self_cpu_time_total, e) for e in taken.key_averages()]
    total = sum(micros for micros, _ in events) or 1.0
    events.sort(key=lambda pair: -pair[0])
    return [{"kernel": e.key[:90], "share": micros / total, "calls": e.count} for micros, e in events[:top]]


def hardware(world: World) -> str:
    return f"{world.size} x {world.device.name}, torch {torch.__version__}, Python {platform.python_version()}"


def main(
    only: list[str] = typer.Option([], help="Shapes: 0.5B, 1.5B, 7B; all if none is named."),
    lengths: list[int] = typer.Option([2048, 8192, 32768], help="Tokens of a document."),
    tokens: int = typer.Option(32768, help="Tokens of a micro-batch."),
    compiled: bool = typer.Option(False, help="model.torch_compile=true."),
    recompute: bool = typer.Option(True, help="model.enable_gradient_checkpointing=true."),
    profile: int = typer.Option(0, help="Show so many kernels of a step."),
    smoke: bool = typer.Option(False, help="A tiny shape on short rows, to see that the script runs."),
    output_json: Path | None = typer.Option(None, help="Write the results as data."),
) -> None:
    """Tokens/s, MFU and peak memory of full fine-tuning and LoRA."""
    shapes = ["tiny"] if smoke else only or ["0.5B", "1.5B", "7B"]
    if smoke:
        lengths, tokens = [32, 128], 256
    cases = [Case(shape, "full", length) for shape in shapes for length in lengths]
    cases += [Case(shape, "lora", length) for shape in shapes if shape in ("7B", "tiny") for length in lengths]
    device = choose_device("auto")
    dtype = device.compute_dtype("auto")
    found: list[dict[str, Any]] = []
    folder = Path(tempfile.gettempdir()) / f"sft-gpu-{os.environ.get('MASTER_PORT', os.getpid())}"
    with join_world(device, dtype) as world:
        for case in cases:
            gc.collect()
            device.reset_peak_memory()
            try:
                found.append(measure(case, world, dtype, case.options(folder, recompute, compiled), tokens, profile))
            except torch.OutOfMemoryError:  # alike on every process, since all hold the same
                found.append({**asdict(case), "out_of_memory": True})
            if world.is_main:
                print(json.dumps(found[-1]), flush=True)
        if world.is_main and output_json:
            output_json.write_text(json.dumps({"hardware": hardware(world), "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
