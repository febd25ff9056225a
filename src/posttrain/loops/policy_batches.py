"""Samples of an update -> micro-batches, with the log-probabilities that its loss compares with."""

# T tokens of a sample

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain.data.batches import pack, split
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.records import MicroBatch, Sample


@dataclass(frozen=True)
class Limits:
    """Of one micro-batch: samples and tokens."""

    max_rows: int | None
    max_tokens: int | None

    def parts(self, samples: Sequence[Sample], world: World) -> list[list[int]]:
        """Numbers of the samples in each of this process's micro-batches."""
        lengths = [len(sample) for sample in samples]
        longest = max([*lengths, self.max_tokens or 0])  # an answer is as long as it is
        return split(lengths, world.num_readers, self.max_rows, self.max_tokens and longest)[world.reader]


def micro_batches(samples: Sequence[Sample], limits: Limits, world: World) -> list[MicroBatch]:
    """This process's part of the samples."""
    return [pack([samples[i] for i in documents]) for documents in limits.parts(samples, world)]


def with_logprobs(
    samples: Sequence[Sample], name: str, engine: Engine, limits: Limits, adapters: bool = True
) -> list[Sample]:
    """The samples with the log-probabilities that the engine gives them now, as a signal. Every process must call this."""
    world = engine.world
    parts = limits.parts(samples, world)
    found: dict[int, np.ndarray] = {}
    outputs = engine.forward([pack([samples[i] for i in documents]) for documents in parts], adapters)
    for documents, logprobs_T in zip(parts, outputs, strict=True):
        ends = np.cumsum([len(samples[i]) for i in documents])
        for i, end in zip(documents, ends, strict=True):
            own_T = logprobs_T[end - len(samples[i]) : end]
            found[i] = np.concatenate(
                [np.zeros(1, np.float32), own_T[:-1]]
            )  # a signal stands at its token, not before it
    for others in world.gather(found if world.counts else {}):
        found |= others
    return [replace(s, signals={**s.signals, name: found[i]}) for i, s in enumerate(samples)]
