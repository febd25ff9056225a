"""The rows of a run: tokenized once by the main process, read by all, their steps known before a model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from posttrain.config.schema import Config, DataOptions, ModelOptions
from posttrain.data.batches import Schedule, choose, pack, plan_steps, split
from posttrain.data.chat import ChatTokenizer, Rules
from posttrain.data.formats import Columns
from posttrain.data.images.loader import ImageLoader
from posttrain.data.images.processor import ImageText
from posttrain.data.sources import Source, find_sources
from posttrain.data.tokenized import Report, TokenizedData, load_tokenized, taken
from posttrain.data.truncation import truncated
from posttrain.distributed.device import runs_liger
from posttrain.distributed.world import World
from posttrain.models.load import find_model, find_tokenizer, load_processor, load_tokenizer
from posttrain.models.lora import wants_adapters
from posttrain.records import MicroBatch, Sample
from posttrain.run.progress import Display
from posttrain.wording import counted

VALIDATION_ROWS_A_PASS = 512
ROWS_LOOKED_AT_FOR_ENDS = 256


@dataclass(frozen=True)
class TrainingData:
    """Training and validation rows, and which rows each step takes."""

    train: TokenizedData
    val: TokenizedData | None
    val_sources: list[Source]
    schedule: Schedule
    chat: ChatTokenizer
    max_rows: int | None
    max_tokens: int | None
    loader: ImageLoader | None = None  # where some row has images
    trains_vision: bool = False
    _ahead: dict[int, list[MicroBatch]] = field(default_factory=dict)

    @property
    def images(self) -> ImageText | None:
        """How those of the rows that are trained on are prepared; None where no such row has any."""
        return self.chat.images if self.train.images is not None else None

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the rows of a step."""
        lengths = hashlib.sha256(self.train.lengths_N.tobytes()).hexdigest()[:12]
        plan = (self.schedule.batch_size, self.schedule.seed, self.schedule.shuffle)
        return f"{self.train.fingerprint}-{lengths}-{'-'.join(map(str, plan))}"

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end trained turns, by the first rows."""
        samples = (self.train[i] for i in range(min(len(self.train), ROWS_LOOKED_AT_FOR_ENDS)))
        return sorted({end for sample in samples for end in self.chat.end_ids(sample.ids_T, sample.weights_T)})

    def micro_batches(self, step: int, world: World) -> list[MicroBatch]:
        """This process's part of a step. With images the next step is made too, so that its images can be read meanwhile."""
        if self.loader is None:
            return self._packed(self.train, self.schedule.rows(step), world)
        steps = [step, *([step + 1] if step + 1 < self.schedule.num_steps else [])]
        made = {
            k: self._ahead.get(k) or self._packed(self.train, self.schedule.rows(k), world, self.trains_vision)
            for k in steps
        }
        self._ahead.clear()
        self._ahead.update(made)
        self.loader.expect(chain.from_iterable(made.values()))
        return made[step]

    def validation_passes(self, world: World) -> list[list[MicroBatch]]:
        """Every validation row once, in passes of a few hundred."""
        assert self.val is not None
        rows = np.arange(len(self.val))
        passes = [rows[i : i + VALIDATION_ROWS_A_PASS] for i in range(0, len(rows), VALIDATION_ROWS_A_PASS)]
        packed = [self._packed(self.val, part, world) for part in passes]
        if self.loader is not None:
            self.loader.expect(chain.from_iterable(packed))
        return packed

    def _packed(
        self, data: TokenizedData, rows: np.ndarray, world: World, trains_vision: bool = False
    ) -> list[MicroBatch]:
        samples = [data[int(row)] for row in rows]
        return packed(samples, world, self.max_rows, self.max_tokens, self.loader, trains_vision)


def packed(
    samples: Sequence[Sample],
    world: World,
    max_rows: int | None = None,
    max_tokens: int | None = None,
    loader: ImageLoader | None = None,
    trains_vision: bool = False,
) -> list[MicroBatch]:
    """This process's micro-batches of samples that all processes share. `trains_vision`: weights that see images learn from them."""
    readers = split([len(sample) for sample in samples], world.num_readers, max_rows, max_tokens)
    own = [[samples[i] for i in documents] for documents in readers[world.reader]]
    if loader is None:
        return [pack(documents) for documents in own]
    seen = seeing(samples, readers, world, trains_vision)
    return [loader.pack(documents, sees) for documents, sees in zip(own, seen, strict=True)]


def seeing(
    samples: Sequence[Sample], readers: list[list[list[int]]], world: World, trains_vision: bool = False
) -> list[bool]:
    """In which micro-batches the vision tower runs: on all processes or on none, and in training once a step at least, so that its
    gradient is never missing. Whether a step moves its weights must not hang on how rows are dealt."""
    seen = [any(samples[i].images for i in chain.from_iterable(each)) for each in zip(*readers, strict=True)]
    if trains_vision and world.mesh is not None and world.mesh.ndim > 1:
        seen = [True] * len(seen)  # copies of the weights add up the gradients of all micro-batches before they talk
    seen[0] |= trains_vision and not any(seen)
    return seen


def open_training_data(config: Config, world: World, display: Display) -> TrainingData:
    """Tokenized rows and the schedule. Every process must call this. Raises InputError for what cannot be trained on."""
    data = config.data
    world.watchdog.beat("preparing rows")
    columns = Columns.of(data)
    make_chat = chat_maker(config)
    train_sources, val_sources = world.on_main(lambda: _sources(data))

    def tokenize(sources: list[Source], what: str) -> TokenizedData:
        display.begin_work(f"tokenizing {what}", None)
        try:
            return load_tokenized(
                sources,
                columns,
                make_chat,
                data.cache_dir,
                drop_invalid=data.invalid_rows == "drop",
                num_workers=data.num_workers,
                progress=display.advance,
            )
        finally:
            display.end_work()

    def load(sources: list[Source], what: str, most: int | None) -> TokenizedData:
        world.on_main(lambda: bool(tokenize(sources, what)))  # the others find the cache made
        usable = truncated(tokenize(sources, what), data.max_length, data.truncation)
        return taken(usable, lambda num_rows: choose(num_rows, most, config.trainer.seed, data.shuffle))

    train = load(train_sources, "training rows", data.train_max_samples)
    val = load(val_sources, "validation rows", data.val_max_samples) if val_sources else None
    sharing = config.engine.ulysses_sequence_parallel_size  # processes that hold one row
    max_tokens = data.max_tokens_per_gpu and data.max_tokens_per_gpu * sharing
    if max_tokens is None and data.micro_batch_size_per_gpu is None:
        max_tokens = max(world.device.default_max_tokens * sharing, data.max_length)
    # processes run the model as often as each other: unpacked, once for each row
    max_rows = data.micro_batch_size_per_gpu if data.packing else 1
    chat = make_chat()
    sees = train.images is not None or (val is not None and val.images is not None)
    return TrainingData(
        train, val, val_sources, schedule_of(len(train), config), chat, max_rows, max_tokens,
        loader=ImageLoader(chat.images) if sees and chat.images else None,
        trains_vision=trains_vision(config.model) and train.images is not None,
    )  # fmt: skip


def schedule_of(num_rows: int, config: Config) -> Schedule:
    """Which of so many rows, or prompts, each step of the run takes."""
    data, trainer = config.data, config.trainer
    epochs, steps = trainer.total_epochs, trainer.total_training_steps
    return plan_steps(num_rows, data.train_batch_size, epochs, steps, trainer.seed, data.shuffle)


def chat_maker(config: Config) -> partial[ChatTokenizer]:
    """A picklable maker of the run's tokenizer, for worker processes."""
    model = config.model
    path = find_tokenizer(model.tokenizer_path) if model.tokenizer_path else find_model(model.path)
    seeing = find_model(model.path) if model.path else None
    return partial(
        make_chat, path, config.data.chat_template, model.revision, model.trust_remote_code, Rules.of(config.data),
        seeing, model.processor_kwargs,
    )  # fmt: skip


def make_chat(
    path: str,
    chat_template: str | None,
    revision: str | None,
    trust: bool,
    rules: Rules | None = None,
    model_path: str | None = None,
    processor_kwargs: dict[str, Any] | None = None,
) -> ChatTokenizer:
    """Of a tokenizer, and of the images of the model at `model_path`, if it is not the same."""
    tokenizer = load_tokenizer(path, chat_template, revision, trust)
    processor = load_processor(model_path or path, revision, trust, processor_kwargs)
    if processor is None:
        return ChatTokenizer(tokenizer, rules)
    # some settings, Gemma 3's do_pan_and_scan for one, a processor takes from its tokenizer alone; exports have this one
    tokenizer.init_kwargs |= processor_kwargs or {}
    if not chat_template and processor.chat_template:
        tokenizer.chat_template = processor.chat_template
    return ChatTokenizer(tokenizer, rules, ImageText(processor))


def trains_vision(model: ModelOptions) -> bool:
    """Whether any weight that sees images may be trained, where there are images."""
    if wants_adapters(model):
        return model.lora_vision or model.lora_adapter_path is not None  # an adapter's files decide where it stands
    return not (model.freeze_vision_tower and model.freeze_projector)


def data_report(data: TrainingData) -> dict[str, Any]:
    """data_report.json: what became of every row, and the counts of tokens."""
    return {"train": _facts(data.train), **({"val": _facts(data.val)} if data.val else {}), **_facts(data.train)}


def describe(data: TrainingData, config: Config, world: World) -> list[str]:
    """The arithmetic of the run, as lines to print before it starts."""
    schedule, lines = data.schedule, []
    for name, rows in (("train", data.train), ("val", data.val)):
        if rows is None:
            continue
        facts = _facts(rows)
        lengths = facts["length_percentiles"]
        samples = f" in {counted(len(rows), 'sample')}" if len(rows) != facts["rows_used"] else ""
        turns = f"{counted(facts['num_turns'], 'trained turn')}, " if facts["num_turns"] else ""
        lines.append(
            f"{name}: {facts['rows_used']:,} of {counted(facts['rows_read'], 'row')}{samples}, {turns}{facts['num_tokens']:,} tokens, "
            f"{facts['num_trained_tokens'] / facts['num_tokens']:.0%} trained; length median {lengths['50']}, "
            f"99% {lengths['99']}, longest {lengths['100']}"
        )
        if facts["num_images"]:
            lines.append(
                f"  images: {facts['num_images']:,}, {facts['num_image_tokens'] / facts['num_tokens']:.0%} of the tokens; the largest "
                f"has {facts['largest_image_tokens']:,}"
            )
        lines += not_chosen(rows.report, name, config)
        for reason, count in facts["rows_dropped"].items():
            lines.append(f"  left out {count:,}: {reason}, such as {rows.report.places[reason][0]}")
        for kind, count in facts["notes"].items():
            lines.append(f"  noted {_times(count)} {rows.report.places[kind][0]}")
    unit = "sample" if len(data.train) != data.train.report.rows_used else "row"
    tokens_a_step = data.train.lengths_N.mean() * schedule.batch_size
    lines.append(
        f"{counted(schedule.num_steps, 'step')} of {counted(schedule.batch_size, unit)} (about {tokens_a_step:,.0f} tokens) = "
        f"{schedule.num_epochs:.4g} {'epoch' if schedule.num_epochs == 1 else 'epochs'} of {counted(schedule.steps_per_epoch, 'step')}, "
        f"on {counted(world.size, 'process', 'processes')} ({world.device.type}){_layout(world)}"
    )
    if data.chat.images and not data.images:
        lines.append("no row to train on has an image: the vision tower and its projector stay as they are")
    return lines + without_effect_here(data.chat, config, world)


def not_chosen(report: Report, name: str, config: Config) -> list[str]:
    """A line on the rows that could be used, and fewer were asked for."""
    if not report.rows_not_chosen:
        return []
    how = f"chosen by trainer.seed={config.trainer.seed}" if config.data.shuffle else "the first"
    return [
        f"  {report.rows_not_chosen:,} more could be used: data.{name}_max_samples takes {report.rows_used:,} of them, {how}"
    ]


def without_effect_here(chat: ChatTokenizer, config: Config, world: World) -> list[str]:
    """Lines on options that have no effect on this device, with this model or with this chat template."""
    found = _without_effect_here(chat, config, world)
    return [f"no effect in this run: {option}: {reason}" for option, reason in found]


def _without_effect_here(chat: ChatTokenizer, config: Config, world: World) -> Iterator[tuple[str, str]]:
    model, engine = config.model, config.engine
    offloads = {
        "engine.param_offload": engine.param_offload,
        "engine.optimizer_offload": engine.optimizer_offload,
        "engine.reference_offload": engine.reference_offload,
        "model.enable_activation_offload": model.enable_activation_offload,
    }
    for option, is_on in offloads.items():
        if is_on and not world.device.has_own_memory:
            yield option, "this device computes in the host's memory anyway"
    if not engine.reshard_after_forward and world.mesh is None:
        yield "engine.reshard_after_forward", "there is one process, which holds all weights anyway"
    if model.use_liger and not runs_liger(world.device.torch_device):
        yield "model.use_liger", "its kernels are for CUDA; the results are the same without"
    if model.lora_vision and chat.images is None:
        yield "model.lora_vision", "the model has no vision tower"
    for option in _unread(chat, config):
        yield option, "the chat template never reads it"


def _unread(chat: ChatTokenizer, config: Config) -> list[str]:
    """What the options give to the chat template, and its text does not name."""
    options = config.data
    given = {name: f"data.chat_template_kwargs.{name}" for name in options.chat_template_kwargs}
    if options.enable_thinking is not None:
        given["enable_thinking"] = "data.enable_thinking"
    text = str(chat.tokenizer.chat_template)
    return [said for name, said in given.items() if name not in text and options.format != "tokens"]


def _times(count: int) -> str:
    return "once," if count == 1 else f"{count:,} times, first"


def _layout(world: World) -> str:
    said = []
    if world.mesh is not None and world.mesh.ndim > 1:
        said.append(f"{world.mesh.size(0)} copies of the weights over {world.mesh.size(1)} each")
    if world.sequence:
        said.append(f"{world.sequence.size} share a row")
    return "".join(f", {part}" for part in said)


def _sources(data: DataOptions) -> tuple[list[Source], list[Source]]:
    train = find_sources(data.train_files, "data.train_files", data.train_split, data.hub_config)
    val = find_sources(data.val_files, "data.val_files", data.val_split, data.hub_config) if data.val_files else []
    return train, val


def _facts(rows: TokenizedData) -> dict[str, Any]:
    image_tokens = rows.images.token_counts() if rows.images else np.zeros(0, dtype=np.int64)
    return {
        "rows_read": rows.report.rows_read,
        "rows_used": rows.report.rows_used,
        "num_samples": len(rows),
        "num_turns": int(rows.turns_N.sum()),
        "rows_not_chosen": rows.report.rows_not_chosen,
        "rows_dropped": rows.report.rows_dropped,
        "notes": rows.report.notes,
        "examples": rows.report.places,
        "num_tokens": int(rows.lengths_N.sum()),
        "num_trained_tokens": int(rows.num_trained_N.sum()),
        "num_images": len(image_tokens),
        "num_image_tokens": int(image_tokens.sum()),
        "largest_image_tokens": int(image_tokens.max(initial=0)),
        "length_percentiles": {str(p): int(np.percentile(rows.lengths_N, p)) for p in (1, 25, 50, 75, 99, 100)},
    }
