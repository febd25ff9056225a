"""What the engine asks of a loss: its value over tokens and, where known beforehand, its slope."""

# T tokens of a packed row, N documents packed into it

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A micro-batch as a loss sees it: whole rows, each token with the log-probability that the policy gives it.

    `total_weight` is what the loss is divided by: that of the whole optimizer step, on all ranks and micro-batches.
    `signals` are the samples' own (see `Sample`), `entropies_T` those of the policy's choice of each token.
    """

    logprobs_T: Tensor
    weights_T: Tensor
    total_weight: Tensor
    entropies_T: Tensor | None = None
    lengths_N: tuple[int, ...] = ()
    signals: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """`value(scored)` is this micro-batch's share of the step's loss: the shares add up to the loss of one large batch.

    `slope(weights_T, total_weight)` is d(value)/d(logprobs_T) where it does not depend on the log-probabilities, which saves
    the engine a pass over the vocabulary. `measures(scored)` are sums over tokens by name, for metrics.
    """

    value: Callable[[Scored], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor] | None = None
    measures: Callable[[Scored], dict[str, Tensor]] | None = None
    wants_entropies: bool = False
