"""What a process needs, by layout: peak memory and time a step, on CPU.

    python benchmarks/memory.py --output-json memory.json --output-md memory.md

Each line is a run of its own. Memory is what the process took beyond what it had after its imports (resident set, highest
from the building of the engine to the end of the third step), the largest over the processes; glibc is told to give freed memory back. Random rows, AdamW, float32.
All processes share the machine's cores, so that a step of N processes takes the time of N processes' work on those cores: the
seconds say what a layout costs, not what it gains. Tokens/s are those of all processes, of which each has one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer
from rich.console import Console

MODELS = {
    # 95% of the weights in blocks, as in large models; weights, gradients and AdamW's two averages take 1.5 GiB
    "100M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 13, "vocab_size": 8192},
    # few weights and long rows: what counts are the activations
    "3M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 512},
    "vocabulary": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 1, "vocab_size": 151936},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
NUM_STEPS = 3
# glibc would keep what is freed in pieces below 32 MiB, such as blocks that were gathered, and hide what is in use
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "200000"}


@dataclass(frozen=True)
class Case:
    """One line of a table: a model, rows of `length` tokens (as many as there are readers), and options."""

    table: str
    name: str
    model: str
    processes: int
    length: int
    options: dict[str, Any]
    full_logits: bool = False


def cases() -> list[Case]:
    found = [Case("FSDP2", f"{n} processes", "100M", n, 256, {}) for n in (1, 2, 4)]
    found += [
        Case("FSDP2", "4 processes, 2 copies", "100M", 4, 256, {"engine": {"fsdp_size": 2}}),
        Case("FSDP2", "2 processes, whole weights kept", "100M", 2, 256, {"engine": {"reshard_after_forward": False}}),
    ]
    found += [
        Case("Ulysses", f"{n} processes share {length:,} tokens", "3M", n, length,
             {"engine": {"ulysses_sequence_parallel_size": n}})
        for length in (2048, 4096, 8192) for n in (1, 2, 4)
    ]  # fmt: skip
    found += [
        Case("LoRA", "all weights", "100M", 1, 256, {}),
        Case("LoRA", "all weights, averages in 8 bits", "100M", 1, 256, {"optim": {"optimizer": "adamw_8bit"}}),
        Case("LoRA", "rank 16, all linear layers", "100M", 1, 256, {"model": {"lora_rank": 16}}),
        Case("LoRA", "the same, base in 4 bits", "100M", 1, 256, {"model": {"lora_rank": 16, "load_in_4bit": True}}),
        Case("Recomputation", "none", "3M", 1, 4096, {}),
        Case("Recomputation", "every block", "3M", 1, 4096, {"model": {"enable_gradient_checkpointing": True}}),
        Case("Recomputation", "every second block", "3M", 1, 4096,
             {"model": {"enable_gradient_checkpointing": True, "gradient_checkpointing_every": 2}}),
        Case("Vocabulary of 151,936", "in chunks", "vocabulary", 1, 1024, {}),
        Case("Vocabulary of 151,936", "full logits", "vocabulary", 1, 1024, {}, full_logits=True),
    ]  # fmt: skip
    return found


def work(case: Case, folder: Path) -> None:
    """What one process of a case does; the main one prints the result."""
    import numpy as np
    import torch

    from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
    from posttrain.data.batches import pack
    from posttrain.distributed.device import choose_device
    from posttrain.distributed.world import join_world
    from posttrain.engine.build import build_engine
    from posttrain.losses.sft import sft_loss
    from posttrain.records import Sample

    if case.full_logits:
        use_full_logits()
    optim = OptimOptions(**case.options.get("optim", {}))
    model = ModelOptions(path=str(folder / case.model), **case.options.get("model", {}))
    layout = EngineOptions(**case.options.get("engine", {}))
    with join_world(choose_device("cpu"), torch.float32, layout) as world:
        before = memory("VmRSS")
        engine = build_engine(model, layout, optim, 10, world, torch.float32, packing=True, seed=0)
        rng = np.random.default_rng(world.reader)
        ids = rng.integers(0, 500, case.length).astype(np.int32)
        documents = [Sample(row, part, np.ones(len(part), np.float32)) for row, part in enumerate(np.split(ids, 4))]
        seconds = []
        for _ in range(NUM_STEPS):
            world.sum(torch.zeros(()))
            start = time.perf_counter()
            float(engine.forward_backward([pack(documents)], sft_loss).loss)
            engine.optim_step()
            seconds.append(time.perf_counter() - start)
        peaks = world.gather(memory("VmHWM") - before)
        if world.is_main:
            tokens = case.length * world.num_readers
            print(json.dumps({"peak_gib": max(peaks), "step_seconds": median(seconds[1:]), "tokens": tokens}))


def use_full_logits() -> None:
    """The vocabulary loss as torch has it, for comparison."""
    import torch

    from posttrain.models import policy

    def whole(hidden_TD, head, labels_T, slope_T=None):
        logits_TV = torch.nn.functional.linear(hidden_TD, head.weight_VD)
        return -torch.nn.functional.cross_entropy(logits_TV.float(), labels_T, reduction="none")

    policy.token_logprobs = whole


def memory(what: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 2**20
    raise ValueError(what)


def run(case: Case, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}",
        __file__, "--folder", str(folder), "--case", json.dumps(asdict(case)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{case.name}:\n{done.stderr[-2000:]}")
    return {**asdict(case), **json.loads(lines[-1])}


def write_models(folder: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for name, shape in MODELS.items():
        Qwen2ForCausalLM(Qwen2Config(**HEADS, **shape, max_position_embeddings=32768)).save_pretrained(folder / name)


def main(
    folder: Path | None = None,
    case: str | None = None,
    only: str | None = None,
    output_json: Path | None = None,
    output_md: Path | None = None,
) -> None:
    """Peak memory and time a step, by layout."""
    if case and folder:
        work(Case(**json.loads(case)), folder)
        return
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    write_models(folder)
    console, found = Console(), []
    for each in cases():
        if only is None or only in each.table:
            found.append(run(each, folder))
            console.print(
                f"{each.table}: {each.name}: {found[-1]['peak_gib']:.2f} GiB, {found[-1]['step_seconds']:.2f} s"
            )
    lines = ["| layout | | peak memory of a process | a step | tokens/s |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {f['table']} | {f['name']} | {f['peak_gib']:.2f} GiB | {f['step_seconds']:.2f} s | "
        f"{f['tokens'] / f['step_seconds']:,.0f} |"
        for f in found
    ]
    if output_json:
        output_json.write_text(json.dumps(found, indent=2) + "\n")
    if output_md:
        output_md.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    typer.run(main)
