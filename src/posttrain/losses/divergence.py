"""Estimates of the Kullback-Leibler divergence KL(policy, reference) from the tokens that the policy drew.

Source: Schulman 2020, "Approximating KL divergence": with r = reference / policy of the token drawn, the mean of
k1 = -log r and of k3 = r - 1 - log r is the divergence; k2 = (log r)^2 / 2 is biased and has little variance.
"""

# T tokens of a packed row

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20: what is farther away is as wrong, and its exponential would not be finite


def k1(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Unbiased; negative for half of the tokens, and its gradient has a mean of zero."""
    return logprobs_T - reference_T


def k2(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Biased; its gradient is that of the divergence on policy (Tang & Munos 2025, arXiv 2506.09477)."""
    return (logprobs_T - reference_T).square() / 2


def k3(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """Unbiased and never negative: GRPO's own (Shao et al. 2024, DeepSeekMath, equation 4)."""
    log_ratio_T = (reference_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio_T.exp() - 1 - log_ratio_T


def absolute(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """No estimate of the divergence, but a distance with a bounded slope."""
    return (logprobs_T - reference_T).abs()


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
