"""Log-probabilities of given tokens over a large vocabulary, computed in chunks so that full logits never exist.

The logits of T tokens over V words are the largest tensor of training. Here they live a chunk at a time. Where the slope
of the loss in each log-probability is known before the forward pass (SFT: minus the weight over the total), gradients
are made in that same pass; otherwise the backward pass computes each chunk again.
"""

# T tokens, D hidden, V vocabulary, C tokens of a chunk

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """How a model turns its last hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Tokens drawn at a `temperature` have the probabilities softmax(logits / temperature).
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    logits_a_chunk: int = 2**23  # that are held at the same time,
    least_tokens_a_chunk: int = 256  # if those are more


def token_logprobs(hidden_TD: Tensor, head: Head, labels_T: Tensor, slope_T: Tensor | None = None) -> Tensor:
    """Log-probability (float32, T) of each label.

    `slope_T` is d(loss)/d(logprob), where that is known already; the backward pass then gives the gradients of that loss
    and ignores what flows into it, so the loss must be the one that the slope belongs to.
    """
    if slope_T is None:
        return token_logprobs_and_entropies(hidden_TD, head, labels_T, False)[0]
    return _KnownSlope.apply(hidden_TD, head.weight_VD, head.bias_V, labels_T, slope_T, head)


def token_logprobs_and_entropies(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, entropies: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability (float32, T) of each label, and the entropy (nats) of the choice; zeros where not asked for."""
    return _Recomputed.apply(hidden_TD, head.weight_VD, head.bias_V, labels_T, head, entropies)


class _KnownSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD, weight_VD, bias_V, labels_T, slope_T, head: Head):
        head = replace(head, weight_VD=weight_VD, bias_V=bias_V)
        if not any(ctx.needs_input_grad[:3]):
            return _without_gradients(hidden_TD, head, labels_T, False)[0]
        logprobs_T, *gradients = _with_gradients(hidden_TD, head, labels_T, slope_T, None, ctx.needs_input_grad[1])
        ctx.save_for_backward(*gradients)
        return logprobs_T

    @staticmethod
    def backward(ctx: Any, _slope_T):
        hidden_grad_TD, weight_grad_VD, bias_grad_V = ctx.saved_tensors
        return hidden_grad_TD, weight_grad_VD, bias_grad_V if ctx.needs_input_grad[2] else None, None, None, None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD, weight_VD, bias_V, labels_T, head: Head, entropies: bool):
        ctx.head = head = replace(head, weight_VD=weight_VD, bias_V=bias_V)
        ctx.entropies = entropies
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_TD, labels_T)
        return _without_gradients(hidden_TD, head, labels_T, entropies)

    @staticmethod
    def backward(ctx: Any, slope_T, entropy_slope_T):
        hidden_TD, labels_T = ctx.saved_tensors
        if slope_T is None:
            slope_T = torch.zeros(len(labels_T), device=hidden_TD.device)
        of_weight = ctx.needs_input_grad[1]
        entropy_slope_T = entropy_slope_T if ctx.entropies else None
        _, *gradients = _with_gradients(hidden_TD, ctx.head, labels_T, slope_T, entropy_slope_T, of_weight)
        hidden_grad_TD, weight_grad_VD, bias_grad_V = gradients
        return hidden_grad_TD, weight_grad_VD, bias_grad_V if ctx.needs_input_grad[2] else None, None, None, None


def _chunks(num_tokens: int, head: Head) -> list[slice]:
    # each chunk reads and writes the whole gradient of the weight: with few tokens a chunk that would take the time
    size = max(head.least_tokens_a_chunk, head.logits_a_chunk // len(head.weight_VD))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _logits(hidden_CD: Tensor, head: Head) -> Tensor:
    logits_CV = torch.nn.functional.linear(hidden_CD, head.weight_VD, head.bias_V).float()
    if head.scale != 1.0:
        logits_CV = logits_CV * head.scale
    if head.softcap:
        logits_CV = head.softcap * torch.tanh(logits_CV / head.softcap)
    return logits_CV / head.temperature if head.temperature != 1.0 else logits_CV


def _without_gradients(hidden_TD: Tensor, head: Head, labels_T: Tensor, entropies: bool) -> tuple[Tensor, Tensor]:
    logprobs_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
    entropies_T = torch.zeros_like(logprobs_T)
    for chunk in _chunks(len(labels_T), head):
        logits_CV = _logits(hidden_TD[chunk], head)
        picked_C = logits_CV.gather(1, labels_T[chunk, None])[:, 0]
        log_total_C = logits_CV.logsumexp(1)
        logprobs_T[chunk] = picked_C - log_total_C
        if entropies:
            entropies_T[chunk] = log_total_C - ((logits_CV - log_total_C[:, None]).exp() * logits_CV).sum(1)
    return logprobs_T, entropies_T


def _with_gradients(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, slope_T: Tensor, entropy_slope_T: Tensor | None, of_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Log-probabilities, and the gradients of hidden states, weight (unless it is frozen) and bias for the given slopes, of the
    log-probabilities and perhaps of the entropies."""
    logprobs_T = torch.empty(len(labels_T), dtype=torch.float32, device=hidden_TD.device)
    hidden_grad_TD = torch.empty_like(hidden_TD)
    weight_grad_VD = torch.zeros_like(head.weight_VD, dtype=torch.float32) if of_weight else None
    bias_grad_V = torch.zeros(len(head.weight_VD), dtype=torch.float32, device=hidden_TD.device)
    for chunk in _chunks(len(labels_T), head):
        hidden_CD, labels_C1 = hidden_TD[chunk], labels_T[chunk, None]
        logits_CV = _logits(hidden_CD, head)
        log_total_C = logits_CV.logsumexp(1)
        logprobs_T[chunk] = logits_CV.gather(1, labels_C1)[:, 0] - log_total_C
        # d(logprob)/d(logits) = onehot - softmax, times the slope
        slope_C1 = slope_T[chunk, None].float()
        bend_CV = 1 - (logits_CV * head.temperature / head.softcap) ** 2 if head.softcap else None
        logs_CV = logits_CV.sub_(log_total_C[:, None])
        if entropy_slope_T is None:
            grad_CV = logs_CV.exp_().mul_(-slope_C1)
        else:  # d(entropy)/d(logits) = -softmax * (log softmax + entropy)
            probs_CV = logs_CV.exp()
            entropy_C1 = -(probs_CV * logs_CV).sum(1, keepdim=True)
            grad_CV = probs_CV.mul_(-(slope_C1 + entropy_slope_T[chunk, None] * (logs_CV + entropy_C1)))
        grad_CV.scatter_add_(1, labels_C1, slope_C1)
        if bend_CV is not None:
            grad_CV *= bend_CV
        if head.scale != head.temperature:
            grad_CV *= head.scale / head.temperature
        if head.bias_V is not None:
            bias_grad_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(hidden_TD.dtype)
        torch.mm(grad_CV, head.weight_VD, out=hidden_grad_TD[chunk])
        if weight_grad_VD is None:
            continue
        if weight_grad_VD.dtype == grad_CV.dtype:
            weight_grad_VD.addmm_(grad_CV.T, hidden_CD)
        else:
            weight_grad_VD += grad_CV.T @ hidden_CD
    dtype = head.weight_VD.dtype
    return (
        logprobs_T,
        hidden_grad_TD,
        None if weight_grad_VD is None else weight_grad_VD.to(dtype),
        bias_grad_V.to(dtype),
    )
