"""Samples of an update -> micro-batches, with the log-probabilities that its loss compares with."""

# T tokens of a sample

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from posttrain.data.batches import pack_answers, split
from posttrain.data.images.loader import ImageLoader
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.loops.training_data import seeing
from posttrain.records import MicroBatch, Sample


@dataclass(frozen=True)
class Part:
    """A micro-batch to be: the numbers of the samples in each of its documents, and whether the vision tower runs for it."""

    documents: list[list[int]]
    sees: bool


@dataclass(frozen=True)
class Limits:
    """Of one micro-batch: samples and tokens. `share`: answers to one prompt, next to each other, go through the model with it once.

    With `loader`, which reads images and which a run on text has not, each answer brings its prompt.
    """

    max_rows: int | None
    max_tokens: int | None
    share: bool
    loader: ImageLoader | None = None

    def parts(self, samples: Sequence[Sample], world: World, trains_vision: bool = False) -> list[Part]:
        """This process's micro-batches; `trains_vision` as of `seeing`."""
        documents = self._documents(samples)
        lengths = [_num_tokens([samples[i] for i in document]) for document in documents]
        if self.max_tokens is not None:  # an answer is as long as it is; one over the limit goes alone
            lengths = [min(length, self.max_tokens) for length in lengths]
        readers = split(lengths, world.num_readers, self.max_rows, self.max_tokens)
        own = [[documents[number] for number in part] for part in readers[world.reader]]
        sees = seeing(samples, readers, world, trains_vision) if self.loader else [False] * len(own)
        return [Part(*pair) for pair in zip(own, sees, strict=True)]

    def packed(self, samples: Sequence[Sample], parts: Sequence[Part]) -> list[MicroBatch]:
        """The micro-batches; their images are read when they are asked for, or expected."""
        groups = [[[samples[i] for i in document] for document in part.documents] for part in parts]
        if self.loader is None:
            return [pack_answers(group) for group in groups]
        return [
            self.loader.pack([sample for (sample,) in group], part.sees)
            for group, part in zip(groups, parts, strict=True)
        ]

    def _documents(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Samples that share a prompt, no more than fit."""
        if not self.share or self.max_rows is not None or self.loader is not None:
            return [[i] for i in range(len(samples))]
        documents: list[list[int]] = []
        for _, same in groupby(range(len(samples)), key=lambda i: _prompt(samples[i], i)):
            begun: list[int] = []
            for i in same:
                if begun and self.max_tokens and _num_tokens([samples[j] for j in (*begun, i)]) > self.max_tokens:
                    documents.append(begun)
                    begun = []
                begun.append(i)
            documents.append(begun)
        return documents


def micro_batches(
    samples: Sequence[Sample], limits: Limits, world: World, trains_vision: bool = False
) -> list[MicroBatch]:
    """This process's part of the samples; `trains_vision` as of `seeing`."""
    return limits.packed(samples, limits.parts(samples, world, trains_vision))


def with_logprobs(
    samples: Sequence[Sample], name: str, engine: Engine, limits: Limits, adapters: bool = True
) -> list[Sample]:
    """The samples with the log-probabilities that the engine gives them now, as a signal. Every process must call this."""
    world = engine.world
    parts = limits.parts(samples, world)
    batches = limits.packed(samples, parts)
    if limits.loader:
        limits.loader.expect(batches)
    found: dict[int, np.ndarray] = {}
    outputs = engine.forward(batches, adapters)
    for part, logprobs_T in zip(parts, outputs, strict=True):
        end = 0
        for document in part.documents:
            shared = samples[document[0]].prompt_length - 1 if len(document) > 1 else 0
            end += shared
            for i in document:
                begin, end = end, end + len(samples[i]) - shared
                # a signal stands at its token, a log-probability at the one before it
                found[i] = np.concatenate([np.zeros(shared + 1, np.float32), logprobs_T[begin : end - 1]])
    for others in world.gather(found if world.counts else {}):
        found |= others
    return [replace(sample, signals={**sample.signals, name: found[i]}) for i, sample in enumerate(samples)]


def _num_tokens(group: Sequence[Sample]) -> int:
    shared = group[0].prompt_length - 1 if len(group) > 1 else 0
    return shared + sum(len(sample) - shared for sample in group)


def _prompt(sample: Sample, number: int) -> bytes | int:
    """What answers to the same prompt have in common; those with a prompt too short to share have nothing."""
    return sample.ids_T[: sample.prompt_length].tobytes() if sample.prompt_length > 1 else number
