"""What `data show` shows: the first rows of the files, or the batch of one step, as a run with these options has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from posttrain.config.compose import DEFAULT, Resolved
from posttrain.config.describe import shown as written
from posttrain.config.values import is_template
from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import Columns
from posttrain.data.show.page import Summary
from posttrain.data.show.samples import Group, Length, Refused, Shown, shown_rows
from posttrain.data.sources import Row, Source, find_sources, read_rows
from posttrain.distributed.device import choose_device
from posttrain.distributed.world import World
from posttrain.errors import InputError
from posttrain.loops.training_data import TrainingData, chat_maker, open_training_data
from posttrain.records import MicroBatch
from posttrain.run.progress import Display

OF_ROWS = ("data.", "model.processor_kwargs")  # options that change what is shown
ALWAYS_SAID = ("data.max_length", "data.truncation", "data.invalid_rows")
SAID_OTHERWISE = ("data.train_files", "data.val_files", "data.chat_template", "data.cache_dir", "data.num_workers")


@dataclass(frozen=True)
class Showing:
    """Rows and steps of a run, to look at."""

    resolved: Resolved

    def first_rows(self, count: int | None) -> Iterator[list[Shown] | Refused]:
        """The first rows of the files, all of them where `count` is None."""
        yield from self._shown(islice(read_rows(self._sources), count))

    def step(self, step: int, count: int | None) -> list[Group]:
        """The micro-batches of a step, as one process packs them; of its samples the first `count`."""
        data, world = self._open()
        if not 0 <= step < data.schedule.num_steps:
            raise InputError(f"--step {step}: this run has steps 0 to {data.schedule.num_steps - 1}.")
        packed = data.micro_batches(step, world)
        known = self._rows({row for micro_batch in packed for row in micro_batch.rows_N})
        groups: list[Group] = []
        left = len(data.schedule.rows(step)) if count is None else count
        for number, micro_batch in enumerate(packed):
            samples = _documents(micro_batch, known)
            most = "" if data.max_tokens is None else f" of at most {data.max_tokens:,}"
            some = "sample" if len(samples) == 1 else "samples packed"
            note = f"{micro_batch.num_tokens:,} tokens{most} in {len(samples)} {some}"
            if len(samples) > left:
                note += f", {left} shown"
            groups.append(Group([[s] for s in samples[:left]], f"Micro-batch {number + 1} of {len(packed)}", note))
            left -= min(left, len(samples))
        return groups

    def summary(self, step: int | None = None) -> Summary:
        """The headline, where rows, tokenizer and template come from, and the options that decide what is trained."""
        config, origins = self.resolved.config, self.resolved.origins
        template = config.data.chat_template
        facts = {
            "files": ", ".join(Path(source.name).name for source in self._sources),
            "tokenizer": str(self._chat.tokenizer.name_or_path),
            "chat template": _named(template) if template else "the tokenizer's own",
        }
        said = [
            *ALWAYS_SAID,
            *(key for key, origin in origins.items() if key.startswith(OF_ROWS) and origin != DEFAULT),
        ]
        values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in dict.fromkeys(said)}
        options = {key: written(value) for key, value in values.items() if key not in SAID_OTHERWISE}
        if step is None:
            return Summary("What will be trained", facts, options)
        options |= {
            "data.train_batch_size": str(config.data.train_batch_size),
            "trainer.seed": str(config.trainer.seed),
        }
        return Summary(f"The batch of step {step}", facts, options)

    @cached_property
    def _sources(self) -> list[Source]:
        data = self.resolved.config.data
        return find_sources(data.train_files, "data.train_files", data.train_split, data.hub_config)

    @cached_property
    def _chat(self) -> ChatTokenizer:
        return chat_maker(self.resolved.config)()

    def _shown(self, rows: Iterator[Row]) -> Iterator[list[Shown] | Refused]:
        data = self.resolved.config.data
        columns = Columns.of(data)
        return shown_rows(rows, columns, self._chat, Length(data.max_length, data.truncation))

    def _open(self) -> tuple[TrainingData, World]:
        world = World(choose_device())
        return open_training_data(self.resolved.config, world, Display(shown=False)), world

    def _rows(self, numbers: set[int]) -> dict[int, list[Shown] | Refused]:
        """Rows by their number among all that are read."""
        numbered = islice(enumerate(read_rows(self._sources)), max(numbers) + 1)
        rows = {number: row for number, row in numbered if number in numbers}
        return dict(zip(rows, self._shown(iter(rows.values())), strict=True))


def _named(template: str) -> str:
    return "given as text" if is_template(template) else Path(template).name


def _documents(micro_batch: MicroBatch, known: dict[int, list[Shown] | Refused]) -> list[Shown]:
    """The samples of a micro-batch, in its order."""
    own_T = micro_batch.ids_T[: micro_batch.num_tokens]  # what fills up is no sample's
    pieces = np.split(own_T, np.cumsum(micro_batch.lengths_N)[:-1])
    return [_sample_of(known[row], ids_T) for row, ids_T in zip(micro_batch.rows_N, pieces, strict=True)]


def _sample_of(samples: list[Shown] | Refused, ids_T: np.ndarray) -> Shown:
    """The one that the run trains on as these ids."""
    for sample in [] if isinstance(samples, Refused) else samples:
        if np.array_equal(sample.encoded.ids_T[sample.begin : sample.end], ids_T):
            return sample
    row = samples if isinstance(samples, Refused) else samples[0]
    raise InputError(
        f"{row.source} row {row.row}: it now gives other tokens than in the cache of tokenized rows. The row was changed in "
        "place, or the template writes what changes, such as the date. Choose another data.cache_dir to tokenize anew."
    )
