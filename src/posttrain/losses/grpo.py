"""The policy-gradient loss of GRPO and its relatives, over tokens.

A sample's signals: `advantages`; `old_logprobs`, of the policy that the batch began with, where it has moved since;
`rollout_logprobs`, as the rollout engine drew the tokens; `reference_logprobs`, where the divergence from it counts.
"""

# T tokens of a packed row, N documents packed into it

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.losses.divergence import DIVERGENCES, MAX_LOG_RATIO
from posttrain.losses.loss import Loss, Scored


@dataclass(frozen=True)
class PolicyGradient:
    """The choices of the loss; the formulas are in the functions that take them.

    `dual_clip`, `rollout_cap` None: off. `kl_coef` and `entropy_coef` 0: off.
    """

    ratio: str = "clip"  # clip, gspo, cispo
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_type: str = "k3"
    entropy_coef: float = 0.0
    rollout_cap: float | None = None
    has_reference: bool = False  # whether samples know it, which `kl_coef` needs

    def loss(self) -> Loss:
        return Loss(self.value, measures=self.measures, wants_entropies=True)

    def value(self, scored: Scored) -> Tensor:
        """-(surrogate) + kl_coef * divergence - entropy_coef * entropy, weighted, summed and divided by the total weight."""
        losses_T = -self.surrogate(scored) * self.rollout_weights(scored)
        if self.kl_coef:
            reference_T = scored.signals.get("reference_logprobs", scored.logprobs_T.detach())
            losses_T = losses_T + self.kl_coef * DIVERGENCES[self.kl_type](scored.logprobs_T, reference_T)
        if self.entropy_coef and scored.entropies_T is not None:
            losses_T = losses_T - self.entropy_coef * scored.entropies_T
        return (losses_T * scored.weights_T).sum() / scored.total_weight

    def surrogate(self, scored: Scored) -> Tensor:
        """What each token adds to the objective (T).

        clip: min(ratio * A, clip(ratio, 1 - low, 1 + high) * A). Schulman et al. 2017, PPO, arXiv 1707.06347; the two bounds
        apart: Yu et al. 2025, DAPO, arXiv 2503.14476. With dual clip at least c * A where A < 0: Ye et al. 2020, arXiv 1912.09729.
        gspo: the same with the geometric mean of the answer's ratios for each of its tokens. Zheng et al. 2025, arXiv 2507.18071.
        cispo: clip(ratio) * A * logprob, the ratio held constant: no token's gradient is lost. MiniMax 2025, arXiv 2506.13585.
        """
        advantages_T = self.advantages(scored)
        ratio_T = self.ratios(scored)
        clipped_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high)
        if self.ratio == "cispo":
            return clipped_T.detach() * advantages_T * scored.logprobs_T
        objective_T = torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
        if self.dual_clip is not None:
            bounded_T = torch.maximum(objective_T, self.dual_clip * advantages_T)
            objective_T = torch.where(advantages_T < 0, bounded_T, objective_T)
        return objective_T

    def ratios(self, scored: Scored) -> Tensor:
        """policy / old policy of each token (T), or of its answer; 1 with the gradient of the log-probability on policy."""
        log_ratio_T = scored.logprobs_T - old_logprobs(scored)
        if self.ratio == "gspo":
            log_ratio_T = document_means(log_ratio_T, scored)
        return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    def rollout_weights(self, scored: Scored) -> Tensor | float:
        """Truncated importance weights min(old policy / rollout, cap) (T): the rollout engine's numbers are not the trainer's.

        Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
        """
        if self.rollout_cap is None or "rollout_logprobs" not in scored.signals:
            return 1.0
        log_ratio_T = old_logprobs(scored) - scored.signals["rollout_logprobs"]
        return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=self.rollout_cap)

    def advantages(self, scored: Scored) -> Tensor:
        return scored.signals.get("advantages", torch.zeros_like(scored.weights_T))

    def measures(self, scored: Scored) -> dict[str, Tensor]:
        """Sums over trained tokens: their number, entropy, divergence, how many were clipped, the rollout's gap."""
        trained_T = scored.weights_T > 0
        logprobs_T, advantages_T = scored.logprobs_T, self.advantages(scored)
        ratio_T = self.ratios(scored)
        too_high_T = (ratio_T > 1 + self.clip_high) & (advantages_T > 0)
        too_low_T = (ratio_T < 1 - self.clip_low) & (advantages_T < 0)
        sums = {
            "tokens": trained_T,
            "entropy": scored.entropies_T if scored.entropies_T is not None else torch.zeros_like(logprobs_T),
            "clip_share": too_high_T | too_low_T,
            "logprob_gap": (old_logprobs(scored) - scored.signals.get("rollout_logprobs", old_logprobs(scored))).abs(),
        }
        if self.has_reference:
            sums["kl"] = DIVERGENCES["k3"](logprobs_T, scored.signals.get("reference_logprobs", logprobs_T))
        return {name: (values_T * trained_T).float().sum() for name, values_T in sums.items()}


def old_logprobs(scored: Scored) -> Tensor:
    """Those of the policy that the batch began with: its own where it has not moved."""
    return scored.signals.get("old_logprobs", scored.logprobs_T.detach())


def document_means(values_T: Tensor, scored: Scored) -> Tensor:
    """The mean over the trained tokens of each token's document (T)."""
    trained_T = (scored.weights_T > 0).to(values_T.dtype)
    lengths_N = torch.tensor(scored.lengths_N, device=values_T.device)
    documents_T = torch.arange(len(lengths_N), device=values_T.device).repeat_interleave(lengths_N)
    zeros_N = values_T.new_zeros(len(lengths_N))
    sums_N = zeros_N.index_add(0, documents_T, values_T * trained_T)
    counts_N = zeros_N.index_add(0, documents_T, trained_T).clamp_min(1)
    return (sums_N / counts_N)[documents_T]
