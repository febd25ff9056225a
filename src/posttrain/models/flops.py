"""How many operations training takes, for model FLOPs utilization (MFU). The formula stands in docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from posttrain.records import MicroBatch


def forward_backward_flops(config: Any) -> Callable[[MicroBatch], float]:
    """FLOPs of one micro-batch, forward and backward, real tokens only, without recomputation.

    6 x matrix weights a token, plus 6 x (hidden x vocabulary) for each trained token, plus causal attention:
    6 x layers x heads x head dim x sum of squared document lengths.
    """
    text = config.get_text_config()
    hidden, layers, heads = text.hidden_size, text.num_hidden_layers, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    experts = getattr(text, "num_experts_per_tok", None) or 1  # mixtures: what a token uses, not what there is
    inner = getattr(text, "moe_intermediate_size", None) if experts > 1 else None
    mlp = 3 * hidden * (inner or getattr(text, "intermediate_size", 4 * hidden)) * experts
    body = layers * (attention + mlp)

    def count(micro_batch: MicroBatch) -> float:
        squares = float(np.square(np.asarray(micro_batch.parts, dtype=np.float64)).sum())
        for prompt, *answers in (branches for branches in micro_batch.branches_N if len(branches) > 1):
            squares += 2.0 * prompt * sum(answers)  # each answer looks at the whole prompt
        trained = int(np.count_nonzero(micro_batch.weights_T))
        return 6.0 * (
            body * micro_batch.num_tokens + hidden * text.vocab_size * trained + layers * heads * head_dim * squares
        )

    return count
