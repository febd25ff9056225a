"""What a run is told about itself: its memory, what its numbers show, and what would fit where memory ran out.

The rules stand in `run/advice/`; here is what they are told, and when.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from posttrain.config.schema import Config
from posttrain.data.batches import Schedule
from posttrain.distributed.world import World
from posttrain.engine.build import count_weights, kept_dtype
from posttrain.errors import OutOfMemory
from posttrain.loops.prompts import ANSWERS_A_GROUP, PromptData, updates_of
from posttrain.loops.training_data import TrainingData
from posttrain.models.lora import wants_adapters
from posttrain.run.advice.advice import Seen
from posttrain.run.advice.adviser import Adviser, earlier_run
from posttrain.run.advice.history import History
from posttrain.run.advice.memory import Needs, does_not_fit, memory_line, out_of_memory
from posttrain.run.folder import RunFolder
from posttrain.run.metrics import drop_after
from posttrain.run.progress import Display


class RunAdvice:
    """Every process has one; the rules are asked on the main one alone, from numbers that it has."""

    def __init__(self, config: Config, world: World, folder: RunFolder, display: Display):
        self.config, self.world, self.folder, self.display = config, world, folder, display
        self.history = History()
        self.needs: Needs | None = None
        self._adviser: Adviser | None = None

    def plan(self, data: Any, shape: Any, report: dict[str, Any], resumed_at: int) -> None:
        """Say what memory the run needs, and whether that cannot be, before a model of this shape is loaded."""
        dtype = self.world.device.compute_dtype(self.config.model.dtype)
        counted = count_weights(self.config.model, dtype, sees=data.images is not None)
        self._needs_of = partial(_needs, data, self.config, self.world, shape)
        self.needs = self._needs_of(*counted) if counted else None
        if self.world.is_main:
            drop_after(self.folder.advice, resumed_at)
            self._adviser = Adviser(self.folder, self.display.say, self._seen(data, shape, report))
        self._say_memory()

    def begin(self, trained: int, every: int) -> None:
        """Say what is unusual before the first step of a model with so many weights, of which so many are trained."""
        if self.needs is None:
            self.needs = self._needs_of(trained, every)
            self._say_memory()
        if self._adviser:
            self._adviser.seen.num_trained, self._adviser.seen.num_weights = trained, every
            self.history.read(self.folder.metrics)
            self._adviser.begin()

    def _say_memory(self) -> None:
        if self.needs is None:  # it is said when the model is there
            return
        device = self.world.device
        capacity = device.capacity_gib()
        self.display.say(memory_line(self.needs, capacity))
        if self._adviser:
            no_room = does_not_fit(self.needs, self.config, capacity, device.has_own_memory)
            self._adviser.tell(no_room, "before training")

    def look(self) -> None:
        """Say what a validation shows."""
        if self._adviser:
            self._adviser.look()

    def conclude(self) -> None:
        """Say what the whole run shows."""
        if self._adviser:
            self._adviser.conclude()

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        """The error that says what would fit."""
        device, place = self.world.device, self.world.watchdog.place
        advice = out_of_memory(
            self.needs,
            self.config,
            place=f"{place}, rank {self.world.rank}" if self.world.size > 1 else str(place),
            cause=str(error).strip().split("\n")[0] or type(error).__name__,
            peak_gib=device.peak_memory_gib(),
            capacity_gib=device.capacity_gib(),
            has_own_memory=device.has_own_memory,
            answering=place.phase == "answering",
        )
        return OutOfMemory(str(advice))

    def _seen(self, data: Any, shape: Any, report: dict[str, Any]) -> Seen:
        schedule: Schedule = data.schedule
        draws = isinstance(data, PromptData)
        counts = ("rows_read", "rows_used", "num_tokens", "num_trained_tokens")
        return Seen(
            config=self.config,
            draws_answers=draws,
            num_steps=schedule.num_steps,
            num_updates=sum(updates_of(schedule, self.config)) if draws else schedule.num_steps,
            steps_per_epoch=schedule.steps_per_epoch,
            vocabulary=shape.get_text_config().vocab_size,
            num_weights=0,  # known when the model is there
            num_trained=0,
            rows={name: report[name] for name in counts},
            rows_dropped=report["rows_dropped"],
            earlier=earlier_run(self.config.model.path or ""),
            history=self.history,
        )


def _needs(
    data: TrainingData | PromptData, config: Config, world: World, shape: Any, trained: int, every: int, linear: int = 0
) -> Needs:
    model, engine, text = config.model, config.engine, shape.get_text_config()
    own = world.device.has_own_memory
    tokens, longest = _tokens_of_a_micro_batch(data, config, world)
    return Needs(
        num_weights=every,
        num_trained=trained,
        num_linear=linear,
        num_blocks=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        shards=min(engine.fsdp_size or world.size, world.size),
        sharded=world.mesh is not None,
        kept_bytes=kept_dtype(model).itemsize,
        computed_bytes=world.device.compute_dtype(model.dtype).itemsize,
        reference=isinstance(data, PromptData) and bool(config.algorithm.kl_coef) and not wants_adapters(model),
        tower_learns=data.images is not None
        and (model.lora_vision if wants_adapters(model) else not model.freeze_vision_tower),
        tokens=tokens,
        longest=longest,
        param_offload=engine.param_offload and own,
        optimizer_offload=engine.optimizer_offload and own,
        reference_offload=engine.reference_offload and own,
        recompute_every=model.gradient_checkpointing_every if model.enable_gradient_checkpointing else None,
        activation_offload=model.enable_activation_offload and own,
        in_4bit=model.load_in_4bit,
        stays_gathered=not engine.reshard_after_forward,
        averages_in_8bit=config.optim.optimizer == "adamw_8bit",
    )


def _tokens_of_a_micro_batch(data: TrainingData | PromptData, config: Config, world: World) -> tuple[int, int]:
    """About how many a device holds at most, and how many the longest row has."""
    options, sharing = config.data, config.engine.ulysses_sequence_parallel_size
    if isinstance(data, PromptData):
        lengths = [len(problem.prompt_ids_T) + config.rollout.max_new_tokens for problem in data.train]
        answers = config.rollout.n or ANSWERS_A_GROUP
    else:
        lengths, answers = data.train.lengths_N.tolist(), 1
    longest = -(-max(lengths) // sharing)
    rows = min(options.train_batch_size, len(lengths)) * answers
    held = rows * sum(lengths) / len(lengths) / world.num_readers / sharing
    if options.max_tokens_per_gpu is not None or options.micro_batch_size_per_gpu is None:
        held = min(held, options.max_tokens_per_gpu or world.device.default_max_tokens)
    if options.micro_batch_size_per_gpu is not None:
        held = min(held, options.micro_batch_size_per_gpu * longest)
    return max(round(held) if options.packing else 0, longest), longest
