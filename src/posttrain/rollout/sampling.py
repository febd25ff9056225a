"""Drawing the next token of each answer, and what its log-probability was."""

# B answers, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.rollout.rollout import Sampling


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities (float32) of one token each: where the sum of the likely ones' shares reaches the uniform.

    Log-probabilities are those of softmax(logits / temperature) over the whole vocabulary; at temperature 0 of temperature 1.
    """
    shifted_BV = logits_BV.float()
    if sampling.temperature not in (0, 1):
        shifted_BV = shifted_BV / sampling.temperature
    shifted_BV = shifted_BV - shifted_BV.amax(-1, keepdim=True)
    weights_BV = shifted_BV.exp()
    if sampling.temperature == 0:
        ids_B = _without(shifted_BV, sampling.never, float("-inf")).argmax(-1)
    else:
        sums_BV = _likely(weights_BV, sampling).cumsum(-1)
        # the first token whose sum reaches the number has a share of its own, as the number is above 0 and at most the last sum
        ids_B = torch.searchsorted(sums_BV, uniforms_B[:, None] * sums_BV[:, -1:])[:, 0]
    logprobs_B = shifted_BV.gather(1, ids_B[:, None])[:, 0] - weights_BV.sum(-1).log()
    return ids_B, logprobs_B


def _likely(weights_BV: Tensor, sampling: Sampling) -> Tensor:
    """Weights of the `top_k` likeliest tokens, and of those the fewest whose share is `top_p`; 0 for all others."""
    weights_BV = _without(weights_BV, sampling.never, 0.0)
    if sampling.top_k:
        least_B1 = weights_BV.topk(min(sampling.top_k, weights_BV.shape[1])).values[:, -1:]
        weights_BV = weights_BV.where(weights_BV >= least_B1, 0)
    if sampling.top_p < 1:
        sorted_BV = weights_BV.sort(-1, descending=True).values
        sums_BV = sorted_BV.cumsum(-1)
        kept_BV = sums_BV - sorted_BV < sampling.top_p * sums_BV[:, -1:]
        least_B1 = sorted_BV.masked_fill(~kept_BV, float("inf")).amin(-1, keepdim=True)
        weights_BV = weights_BV.where(weights_BV >= least_B1, 0)
    return weights_BV


def _without(values_BV: Tensor, never: tuple[int, ...], value: float) -> Tensor:
    if never:
        values_BV = values_BV.clone()
    for token in never:  # one by one: a copy of their numbers to the device would be waited for, at every token
        values_BV[:, token] = value
    return values_BV
