"""Supervised fine-tuning: the mean negative log-likelihood of the trained tokens."""

# T tokens of a packed row

from __future__ import annotations

from torch import Tensor

from posttrain.losses.loss import Loss, Scored


def sft_value(scored: Scored) -> Tensor:
    """Weighted negative log-likelihood, summed over tokens and divided by the weight of the whole step."""
    return -(scored.logprobs_T * scored.weights_T).sum() / scored.total_weight


def sft_slope(weights_T: Tensor, total_weight: Tensor) -> Tensor:
    """Derivative of `sft_value` in each log-probability."""
    return -weights_T / total_weight


sft_loss = Loss(sft_value, sft_slope)
