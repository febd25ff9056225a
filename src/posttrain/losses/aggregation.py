"""How the losses of tokens become one number: a weight for each token, and what the sum is divided by.

Weights are made while answers are whole, so that neither micro-batches nor ranks can change them.
"""

# N answers

from __future__ import annotations

import numpy as np


def token_weights(num_tokens_N: np.ndarray, mode: str, constant_length: int) -> tuple[np.ndarray, float]:
    """The weight (float64, N) of each token of an answer with so many trained tokens, and the divisor of the step.

    token-mean: each token counts alike. Yu et al. 2025, DAPO, arXiv 2503.14476.
    seq-mean-token-mean: each answer counts alike, its tokens share that. Shao et al. 2024, DeepSeekMath, arXiv 2402.03300.
    seq-mean-token-sum: the sum over an answer, on average: the policy gradient as it is derived.
    constant-length: the sum over all tokens by (answers x `constant_length`). Liu et al. 2025, Dr. GRPO, arXiv 2503.20783.
    """
    num_answers = len(num_tokens_N)
    ones_N = np.ones(num_answers)
    match mode:
        case "token-mean":
            return ones_N, float(num_tokens_N.sum())
        case "seq-mean-token-mean":
            return 1.0 / np.maximum(num_tokens_N, 1), float(num_answers)
        case "seq-mean-token-sum":
            return ones_N, float(num_answers)
        case "constant-length":
            return ones_N, float(num_answers * constant_length)
        case _:
            raise ValueError(mode)
