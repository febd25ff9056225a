"""Step k -> its rows -> micro-batches. The rows of step k are a function of (data, seed, k) alone.

Neither the world size, nor the size of micro-batches, nor what ran before has any say in them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain.errors import InputError
from posttrain.records import IGNORED_LABEL, MicroBatch, Sample
from posttrain.wording import counted


@dataclass(frozen=True)
class Schedule:
    """Which rows each step takes. Steps count from 0; the last batch of an epoch holds what is left."""

    num_rows: int
    batch_size: int
    num_steps: int
    seed: int = 0
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of the step, int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.arange(self.num_rows)
        if self.shuffle:
            # Philox is counter-based: each (seed, epoch) is a stream of its own, whatever ran before
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_rows)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


def choose(num_rows: int, most: int | None, seed: int, shuffle: bool) -> np.ndarray:
    """The numbers of at most so many of the rows, rising: with `shuffle` a function of the seed, else the first."""
    if most is None or most >= num_rows:
        return np.arange(num_rows)
    if not shuffle:
        return np.arange(most)
    # epochs count from 0 and further prompts from 2^32, so that this stream is nobody else's
    stream = np.random.Generator(np.random.Philox(key=[seed, 1 << 40]))
    return np.sort(stream.permutation(num_rows)[:most])


def plan_steps(
    num_rows: int, batch_size: int, total_epochs: int, total_steps: int | None, seed: int, shuffle: bool
) -> Schedule:
    """The schedule of a run. Raises InputError where one batch would need more rows than there are."""
    if batch_size > num_rows:
        raise InputError(
            f"data.train_batch_size={batch_size} is more than the {counted(num_rows, 'row')} that can be used. "
            f"Set data.train_batch_size={num_rows} or less, or add rows."
        )
    num_steps = total_steps if total_steps is not None else total_epochs * math.ceil(num_rows / batch_size)
    return Schedule(num_rows, batch_size, num_steps, seed, shuffle)


def split(
    lengths_N: Sequence[int], num_ranks: int, max_rows: int | None = None, max_tokens: int | None = None
) -> list[list[list[int]]]:
    """Documents -> ranks -> micro-batches -> indices into `lengths_N`, balanced by tokens.

    Each rank gets as many micro-batches as any other, some perhaps empty. No micro-batch holds more than `max_rows`
    documents or `max_tokens` tokens. Raises InputError for a document longer than `max_tokens`.
    """
    lengths = np.asarray(lengths_N, dtype=np.int64)
    if max_tokens is not None and len(lengths) and lengths.max() > max_tokens:
        raise InputError(
            f"A sample of {lengths.max()} tokens does not fit in data.max_tokens_per_gpu={max_tokens}. Raise it to at least "
            "data.max_length, or shorten samples with data.max_length and data.truncation."
        )
    least = max(
        math.ceil(len(lengths) / (max_rows or math.inf)), math.ceil(lengths.sum() / (max_tokens or math.inf)), 1
    )
    for num_bins in range(math.ceil(least / num_ranks) * num_ranks, max(len(lengths), 1) + num_ranks, num_ranks):
        bins = _spread(lengths, num_bins, max_rows, max_tokens)
        if bins is not None:
            return _deal(bins, lengths, num_ranks)
    return _deal([[i] for i in range(len(lengths))], lengths, num_ranks)


def pack(samples: Sequence[Sample]) -> MicroBatch:
    """Samples end to end, labels shifted inside each; without samples a filler of one untrained token."""
    if not samples:
        one = np.zeros(1, dtype=np.int64)
        return MicroBatch(one, np.full(1, IGNORED_LABEL), np.zeros(1, dtype=np.float32), one, (1,), ())

    def shifted(values: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.append(value[1:], np.float32(0)) for value in values]).astype(np.float32)

    labels = [np.append(s.ids_T[1:].astype(np.int64), IGNORED_LABEL) for s in samples]
    return MicroBatch(
        ids_T=np.concatenate([s.ids_T for s in samples]).astype(np.int64),
        labels_T=np.concatenate(labels),
        weights_T=shifted([s.weights_T for s in samples]),
        positions_T=np.concatenate([np.arange(len(s)) for s in samples]),
        lengths_N=tuple(len(s) for s in samples),
        rows_N=tuple(s.row for s in samples),
        signals={name: shifted([s.signals[name] for s in samples]) for name in samples[0].signals},
    )


def pack_answers(groups: Sequence[Sequence[Sample]]) -> MicroBatch:
    """Answers end to end; those of a group, which begin with the same prompt of at least two tokens, share it."""
    parts, branches = [], []
    for group in groups:
        shared = group[0].prompt_length - 1 if len(group) > 1 else 0
        prompt = [_slice(group[0], 0, shared)] if shared else []
        answers = [_slice(sample, shared, len(sample)) for sample in group]
        parts += prompt + answers
        branches.append(tuple(len(part) for part in prompt + answers))
    packed = pack(parts)
    if all(len(lengths) == 1 for lengths in branches):
        return packed
    begins = [[0, *[lengths[0]] * (len(lengths) - 1)] for lengths in branches]
    offsets = [begin for group in begins for begin in group]
    return replace(
        packed,
        positions_T=packed.positions_T + np.repeat(offsets, packed.lengths_N),
        lengths_N=tuple(sum(lengths) for lengths in branches),
        rows_N=tuple(group[0].row for group in groups),
        branches_N=tuple(branches),
    )


def _slice(sample: Sample, begin: int, end: int) -> Sample:
    signals = {name: values[begin:end] for name, values in sample.signals.items()}
    return Sample(sample.row, sample.ids_T[begin:end], sample.weights_T[begin:end], signals)


def _spread(lengths: np.ndarray, num_bins: int, max_rows: int | None, max_tokens: int | None) -> list[list[int]] | None:
    """Longest first, each into the emptiest bin with room for a row; None where they do not fit."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, number) for number in range(num_bins)]
    for index in np.argsort(-lengths, kind="stable").tolist():
        if not emptiest:
            return None
        tokens, number = heapq.heappop(emptiest)
        tokens += int(lengths[index])
        if max_tokens is not None and tokens > max_tokens:
            return None
        bins[number].append(index)
        if max_rows is None or len(bins[number]) < max_rows:
            heapq.heappush(emptiest, (tokens, number))
    return bins


def _deal(bins: list[list[int]], lengths: np.ndarray, num_ranks: int) -> list[list[list[int]]]:
    """Bins to ranks in rounds, the fullest to whoever has least, so that ranks wait little for each other."""
    by_size = sorted(bins, key=lambda b: -int(lengths[b].sum()))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for start in range(0, len(by_size), num_ranks):
        order = sorted(range(num_ranks), key=lambda r: load[r])
        round_ = by_size[start : start + num_ranks] + [[]] * (num_ranks - len(by_size[start : start + num_ranks]))
        for rank, documents in zip(order, round_, strict=True):
            ranks[rank].append(sorted(documents))
            load[rank] += int(lengths[documents].sum()) if documents else 0
    return ranks
