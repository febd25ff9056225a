"""Ulysses: processes share a packed row; inside attention each trades its tokens' heads for all tokens of its own heads.

Everything but attention works on single tokens, so each process holds and computes 1/N of the row. Attention needs whole
documents: there an all-to-all turns (all heads, own tokens) into (own heads, all tokens), and another one turns the
result back. Source: Jacobs et al. 2023, DeepSpeed Ulysses.
"""

# T tokens of the packed row, L = T / N of them here, H query heads, K key/value heads, D head dim, N processes

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.records import IGNORED_LABEL, MicroBatch


@dataclass(frozen=True)
class Sequence:
    """The processes that share this one's rows, in the order of their parts."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, size: int, timeout: timedelta) -> Sequence | None:
        """Groups of `size` neighbours in the order of ranks; None for one. Every process must call this."""
        if size == 1:
            return None
        world, rank = dist.get_world_size(), dist.get_rank()
        group, _ = dist.new_subgroups_by_enumeration(
            [list(range(first, first + size)) for first in range(0, world, size)], timeout=timeout
        )
        return cls(group, rank % size, size)

    def filled(self, whole: MicroBatch) -> MicroBatch:
        """The row with one more document, that counts nothing, up to a multiple of N tokens."""
        missing = -len(whole.ids_T) % self.size
        if not missing:
            return whole

        def filled(array_T: np.ndarray, filling: Any) -> np.ndarray:
            return np.append(array_T, np.full(missing, filling, dtype=array_T.dtype))

        return replace(
            whole,
            ids_T=filled(whole.ids_T, 0),
            labels_T=filled(whole.labels_T, IGNORED_LABEL),
            weights_T=filled(whole.weights_T, 0),
            positions_T=np.append(whole.positions_T, np.arange(missing)),
            lengths_N=(*whole.lengths_N, missing),
            signals={},
            branches_N=(*whole.branches_N, (missing,)) if whole.branches_N else whole.branches_N,
        )

    def cut(self, filled: MicroBatch) -> MicroBatch:
        """This process's part of a row: its tokens, labels, weights and positions; `lengths_N` stays that of the whole."""
        length = len(filled.ids_T) // self.size
        here = slice(self.rank * length, (self.rank + 1) * length)
        return replace(
            filled,
            ids_T=filled.ids_T[here],
            labels_T=filled.labels_T[here],
            weights_T=filled.weights_T[here],
            positions_T=filled.positions_T[here],
            signals={},
        )

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of what belongs to the tokens of a filled row."""
        return whole.chunk(self.size, dim)[self.rank]

    def own_part(self, values_T: Tensor) -> Tensor:
        """The values of this process's tokens, 0 for those that fill up the row."""
        filled_T = torch.nn.functional.pad(values_T, (0, -len(values_T) % self.size))
        return filled_T.chunk(self.size)[self.rank]

    def join(self, part_L: Tensor, num_tokens: int) -> Tensor:
        """The values of the whole row (T) from each process's part. Their gradient flows to the own part only.

        So a loss that every process computes alike on the whole row counts once.
        """
        return _Join.apply(part_L, self)[:num_tokens]

    def tokens_for_heads(self, heads_1HLD: Tensor) -> Tensor:
        """(1, H, L, D) of all heads and own tokens -> (1, H / N, T, D) of own heads and all tokens."""
        _, heads, length, dim = heads_1HLD.shape
        sent = heads_1HLD.reshape(self.size, heads // self.size, length, dim)
        received = _Exchange.apply(sent, self)
        return received.transpose(0, 1).reshape(1, heads // self.size, self.size * length, dim)

    def heads_for_tokens(self, tokens_1THD: Tensor) -> Tensor:
        """(1, T, H / N, D) of own heads and all tokens -> (1, L, H, D) of all heads and own tokens."""
        _, total, heads, dim = tokens_1THD.shape
        sent = tokens_1THD.reshape(self.size, total // self.size, heads, dim)
        received = _Exchange.apply(sent, self)
        return received.transpose(0, 1).reshape(1, total // self.size, self.size * heads, dim)

    def repeats(self, query_heads: int, key_heads: int) -> int:
        """How often each key/value head is repeated so that every process gets those that its query heads look at."""
        for times in range(1, query_heads // key_heads + 1):
            if (key_heads * times) % self.size == 0 and query_heads % (key_heads * times) == 0:
                return times
        raise ValueError(f"{query_heads} query heads cannot be dealt to {self.size} processes")


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension goes to process i; what comes from process i becomes part i. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, sequence: Sequence) -> Tensor:
        ctx.sequence = sequence
        return _exchange(sent, sequence)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.sequence), None


def _exchange(sent: Tensor, sequence: Sequence) -> Tensor:
    sent = sent.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=sequence.group)
    return received


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_L: Tensor, sequence: Sequence) -> Tensor:
        ctx.sequence = sequence
        whole = part_L.new_empty(len(part_L) * sequence.size)
        dist.all_gather(list(whole.chunk(sequence.size)), part_L.contiguous(), group=sequence.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None]:
        return gradient_T.chunk(ctx.sequence.size)[ctx.sequence.rank], None


def heads_refused(query_heads: int, size: int) -> str | None:
    """Why so many heads cannot be dealt to `size` processes, or None where they can."""
    if query_heads % size == 0:
        return None
    fits = [n for n in range(1, query_heads + 1) if query_heads % n == 0 and n < size]
    return f"the model's {query_heads} attention heads cannot be dealt to {size} processes; {max(fits, default=1)} would do"
