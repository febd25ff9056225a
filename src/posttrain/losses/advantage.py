"""Rewards of a group of answers to one prompt -> how much better each was than could be expected."""

# N answers, in any order of their prompts; numpy, since rewards are known before the engine is asked

from __future__ import annotations

import numpy as np

EPSILON = 1e-6


def advantages(rewards_N: np.ndarray, prompts_N: np.ndarray, estimator: str) -> np.ndarray:
    """Advantage (float64, N) of each answer among those with the same number in `prompts_N`.

    NaN rewards, which could not be told, take no part and have NaN advantages. Estimators:
    grpo: (reward - mean) / (std + 1e-6), std over n - 1. Shao et al. 2024, DeepSeekMath, arXiv 2402.03300.
    dr_grpo: reward - mean: the std favours prompts that are easy or hard. Liu et al. 2025, arXiv 2503.20783.
    rloo: reward - mean of the others. Ahmadian et al. 2024, arXiv 2402.14740.
    """
    advantages_N = np.full(len(rewards_N), np.nan)
    for members in groups(prompts_N):
        known = members[~np.isnan(rewards_N[members])]
        if len(known):
            advantages_N[known] = _of_group(rewards_N[known], estimator)
    return advantages_N


def has_signal(rewards_N: np.ndarray, prompts_N: np.ndarray) -> np.ndarray:
    """Whether (bool, N) the answer's group has rewards that differ, so that something can be learnt from it."""
    signal_N = np.zeros(len(rewards_N), dtype=bool)
    for members in groups(prompts_N):
        known = rewards_N[members][~np.isnan(rewards_N[members])]
        signal_N[members] = len(known) > 1 and bool(np.ptp(known) > EPSILON)
    return signal_N


def groups(prompts_N: np.ndarray) -> list[np.ndarray]:
    """Indices of the answers to each prompt, by the first of each."""
    _, first, inverse = np.unique(prompts_N, return_index=True, return_inverse=True)
    return [np.flatnonzero(inverse == number) for number in np.argsort(first)]


def _of_group(rewards_G: np.ndarray, estimator: str) -> np.ndarray:
    if np.ptp(rewards_G) <= EPSILON:  # the mean of equal numbers is not always that number
        return np.zeros(len(rewards_G))
    centered_G = rewards_G - rewards_G.mean()
    match estimator:
        case "grpo":
            return centered_G / (rewards_G.std(ddof=1) + EPSILON)
        case "dr_grpo":
            return centered_G
        case "rloo":
            return centered_G * len(rewards_G) / (len(rewards_G) - 1)
        case _:
            raise ValueError(estimator)
