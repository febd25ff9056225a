"""What options do to speed and memory on a CPU: tokens/s, peak memory and the first step, beside the same training without them.

    OMP_NUM_THREADS=1 python benchmarks/options_cpu.py --table "text, 8M" --output-md options.md

Each line is a process of its own, and all are there at once. Steps of the first line and of another are taken in turn, and the ratio
is the median over these pairs, so that what else runs on the machine burdens both: once of the processor's time, which leaves out
what others take, and once by the clock. Memory is the most that a process took beyond its imports; for that run it once more with
MALLOC_MMAP_THRESHOLD_=200000, else glibc keeps what is freed. Rows are random, of other lengths in each step. Of compiled lines:
the start, which is the first step less a later one, with an empty cache and, in a second process, whose memory is shown, with the
cache that the first left; and the graphs that later steps made torch trace.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import wait
from functools import cache
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from torch._dynamo.utils import counters

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.data.batches import pack, split
from posttrain.data.images import loader as image_loader
from posttrain.data.images.processor import ImageText
from posttrain.data.images.reading import decode
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World
from posttrain.engine.build import build_engine
from posttrain.losses.sft import sft_loss
from posttrain.models.load import find_model, load_processor
from posttrain.records import ImageSource, Sample

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
LARGE = SMALL | {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12}
TOWER = {"depth": 6, "hidden_size": 192, "intermediate_size": 768, "num_heads": 6, "out_hidden_size": 256, "fullatt_block_indexes": [2, 5]}  # fmt: skip
SEEING = {"text_config": SMALL, "vision_config": TOWER}
LORA, RECOMPUTED = {"lora_rank": 16}, {"model": {"enable_gradient_checkpointing": True}}
PHOTO = {"pixels": (3000, 2000)}
TEXT_LINES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "model.torch_compile": {"model": {"torch_compile": True}},
    "model.enable_gradient_checkpointing": RECOMPUTED,
    "optim.optimizer=adamw_8bit": {"optim": {"optimizer": "adamw_8bit"}},
    "model.lora_rank=16": {"model": LORA},
    "LoRA, model.load_in_4bit": {"model": LORA | {"load_in_4bit": True}},
}
VISION_LINES: dict[str, dict[str, Any]] = {
    "all weights, packed": {},
    "data.packing=false": {"packing": False},
    "model.freeze_vision_tower": {"model": {"freeze_vision_tower": True}},
    "model.lora_rank=16": {"model": LORA},
    "LoRA, model.lora_vision": {"model": LORA | {"lora_vision": True}},
    "model.enable_gradient_checkpointing": RECOMPUTED,
    "images read when needed": {"ahead": 0},
}
PHOTO_LINES = {"photos of 3000 x 2000 pixels": PHOTO, "the same, read when needed": PHOTO | {"ahead": 0}}
# lines, of which the first is what the others are compared with; what is changed of the tiny model; rows a step
TABLES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any], int]] = {
    "text, 8M": (TEXT_LINES, SMALL, 8),
    "text, 60M": (TEXT_LINES, LARGE, 4),
    "vision, 8M and 4M": (VISION_LINES, SEEING, 12),
    "photos": (PHOTO_LINES, SEEING, 12),
}
MAX_PIXELS = 77 * 28 * 28  # whole tokens of an image of 300 x 200
HEAD = """\
| {} | tokens/s of the processor | of the first (least - most) | by the clock | peak memory | start | filled cache | traced later |
|---|---:|---:|---:|---:|---:|---:|---:|"""


class Step(NamedTuple):
    """What a step took; graphs and memory are all so far."""

    tokens: int
    seconds: float
    processor_seconds: float
    graphs: int
    peak_gib: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def processor_rate(self) -> float:
        return self.tokens / self.processor_seconds


class Trainer:
    """One line: an engine, and the rows of each step."""

    def __init__(self, shape: dict[str, Any], num_rows: int, line: dict[str, Any]):
        self.num_rows, self.pixels, self.images = num_rows, line.get("pixels", (300, 200)), None
        path = find_model("posttrain/tiny-vision" if shape is SEEING else "posttrain/tiny")
        if shape is SEEING:
            image_loader.AHEAD = line.get("ahead", image_loader.AHEAD)
            self.images = ImageText(load_processor(path, kwargs={"max_pixels": MAX_PIXELS}))
            self.loader = image_loader.ImageLoader(self.images)
        model = ModelOptions(path=path, override_config=shape, random_weights=True, **line.get("model", {}))
        self.engine = build_engine(
            model, EngineOptions(), OptimOptions(**line.get("optim", {})), 100, World(choose_device("cpu")), torch.float32,
            packing=line.get("packing", True), seed=0, images=self.images,
        )  # fmt: skip
        self.made = [self.rows(0)]

    def step(self) -> tuple[int, float, float]:
        """Tokens of a step, its seconds, in which images of the next one may be read, and those of the processor."""
        self.made.append(self.rows(len(self.made)))
        now, following = self.made[-2:]
        begin, begin_processor = time.perf_counter(), time.process_time()
        if self.images:
            self.loader.expect(chain(now, following))
        float(self.engine.forward_backward(now, sft_loss).loss)
        self.engine.optim_step()
        for micro_batch in following if self.images else ():  # else they would be read in another process's time
            wait([reading for reading in micro_batch.images._begun or () if reading])
        took = time.perf_counter() - begin, time.process_time() - begin_processor
        return sum(micro_batch.num_tokens for micro_batch in now), *took

    def rows(self, step: int) -> list[Any]:
        """The micro-batches of a step; those of images have 6 rows."""
        rng = np.random.default_rng(step)
        samples = [self.sample(rng, row) for row in range(self.num_rows)]
        if not self.images:
            return [pack(samples)]
        (parts,) = split([len(sample) for sample in samples], 1, max_rows=6)
        return [self.loader.pack([samples[n] for n in part], True) for part in parts]

    def sample(self, rng: np.random.Generator, row: int) -> Sample:
        """A text, and before it in two of three rows an image; the second half of the text is trained."""
        ids_T = rng.integers(3, 2000, rng.integers(50, 150) if self.images else rng.integers(100, 400)).astype(np.int32)
        weights_T = (np.arange(len(ids_T)) >= len(ids_T) // 2).astype(np.float32)
        if not self.images or row % 3 == 2:
            return Sample(row, ids_T, weights_T)
        width, height = (side - int(rng.integers(0, 4)) for side in self.pixels)
        image_ids, image = self.images.ids(width, height), ImageSource(data=picture(width, height))
        weights_T = np.concatenate([np.zeros(len(image_ids), np.float32), weights_T])
        return Sample(row, np.concatenate([image_ids, ids_T]), weights_T, images=(image,))


@cache
def picture(width: int, height: int) -> bytes:
    pixels, stream = np.random.default_rng(0).integers(0, 256, (12, 18, 3), np.uint8), io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(stream, "JPEG")
    return stream.getvalue()


class Process:
    """A fork of this process, which has imported everything and begun no thread: it takes a step when told to."""

    def __init__(self, *arguments: Any):
        self.pipe, other = multiprocessing.Pipe()
        multiprocessing.get_context("fork").Process(target=work, args=(other, *arguments), daemon=True).start()

    def step(self) -> Step:
        self.pipe.send(True)
        return Step(*self.pipe.recv())


def work(pipe: Any, compiled: Path, *arguments: Any) -> None:
    """A process, to its end."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled)
    before = memory("VmRSS")
    trainer = Trainer(*arguments)
    while pipe.recv():
        pipe.send((*trainer.step(), counters["stats"]["unique_graphs"], memory("VmHWM") - before))


def reading(width: int, height: int) -> float:
    """Milliseconds of the processor for one image: decoding, and what the processor of images does."""
    images, source = (
        ImageText(load_processor(find_model("posttrain/tiny-vision"), kwargs={"max_pixels": MAX_PIXELS})),
        ImageSource(data=picture(width, height)),
    )
    taken = []
    for _ in range(10):
        begin = time.process_time()
        images.arrays([decode(source)])
        taken.append(time.process_time() - begin)
    return median(taken) * 1e3


def memory(what: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process, in GiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 2**20


def measure(table: str, rounds: int, only: list[str]) -> list[str]:
    """The lines of a table."""
    lines, shape, num_rows = TABLES[table]
    place, (base, *others) = Path(tempfile.mkdtemp(prefix="options-")), [n for n in lines if n in only or not only]
    running, first, again = {}, {}, {}
    for number, name in enumerate([base, *others]):
        given = (place / str(number), shape, num_rows, lines[name])
        running[name] = Process(*given)
        first[name] = running[name].step()
        if "torch_compile" in lines[name].get("model", {}):
            second = Process(*given)
            again[name] = [second.step() for _ in range(3)]
            second.pipe.send(False)
    pairs: dict[str, list[tuple[Step, Step]]] = {name: [] for name in others}
    for _, name in product(range(rounds), others):
        pairs[name].append((running[base].step(), running[name].step()))
    for process in running.values():
        process.pipe.send(False)
    pairs[base] = [(step, step) for step, _ in chain.from_iterable(pairs.values())]
    return [HEAD.format(table), *(described(name, pairs[name], first[name], again.get(name)) for name in running)]


def described(name: str, pairs: list[tuple[Step, Step]], first: Step, again: list[Step] | None) -> str:
    ratios = sorted(own.processor_rate / other.processor_rate for other, own in pairs)
    by_clock = median(own.rate / other.rate for other, own in pairs)
    seconds, rate = (
        median(values) for values in zip(*((own.seconds, own.processor_rate) for _, own in pairs), strict=True)
    )
    peak = again[-1].peak_gib if again else pairs[-1][1].peak_gib
    start = (
        f"{first.seconds - seconds:.0f} s | {again[0].seconds - seconds:.0f} s | {pairs[-1][1].graphs - first.graphs}"
        if again
        else "| |"
    )
    return f"| {name} | {rate:,.0f} | {median(ratios):.2f} x ({ratios[0]:.2f} - {ratios[-1]:.2f}) | {by_clock:.2f} x | {peak:.2f} GiB | {start} |"


def main(
    table: list[str] = typer.Option(list(TABLES)),
    rounds: int = typer.Option(5, help="Pairs of steps for each line."),
    only: list[str] = typer.Option([], help="Lines to measure; all if none is named."),
    output_md: Path | None = None,
) -> None:
    """Options on and off, on a CPU."""
    text = "\n\n".join("\n".join(measure(name, rounds, only)) for name in table)
    read = (
        f"{reading(width, height):.0f} ms of {width:,} x {height:,} pixels"
        for width, height in ((300, 200), (1024, 768), PHOTO["pixels"])
    )
    text += f"\n\nReading an image, of the processor's time: {', '.join(read)}."
    text += "\n\nmodel.enable_activation_offload and model.use_liger have no effect on a CPU."
    print(text)
    if output_md:
        output_md.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
