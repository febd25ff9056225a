"""What the engine asks of a loss: its value over tokens and, where known beforehand, its slope."""

# T tokens of a packed row

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """`value(logprobs_T, weights_T, total_weight)` is this micro-batch's share of the step's loss.

    `total_weight` is the sum of the weights of the whole optimizer step, on all ranks and micro-batches: the shares add up
    to the loss of one large batch. `slope(weights_T, total_weight)` is d(value)/d(logprobs_T) where it does not depend on
    the log-probabilities, which saves the engine a pass over the vocabulary.
    """

    value: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
