"""Answers by transformers' own `generate`, for models and prompts that `decode` does not know: slower, with the same noise."""

# B answers, T longest prompt, N new tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from posttrain.rollout.decoding import Written, cut, uniforms_for
from posttrain.rollout.prompt_images import PromptImages
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.sampling import draw


class Drawing(LogitsProcessor):
    """Draws each token as `decode` would, leaves nothing else to choose, and notes the log-probability."""

    def __init__(self, uniforms_BN: Tensor, sampling: Sampling):
        self.uniforms_BN, self.sampling = uniforms_BN, sampling
        self.ids: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids_B, logprobs_B = draw(scores, self.uniforms_BN[:, len(self.ids)], self.sampling)
        self.ids.append(ids_B)
        self.logprobs.append(logprobs_B)
        return torch.full_like(scores, float("-inf")).scatter(1, ids_B[:, None], 0.0)


@torch.no_grad()
def generate(
    model: Any,
    requests: Sequence[Request],
    sampling: Sampling,
    end_ids: Sequence[int],
    images: PromptImages | None = None,
) -> list[Written]:
    """An answer to each request, in their order."""
    longest = max(len(request.prompt_ids_T) for request in requests)
    ids_BT = torch.full((len(requests), longest), end_ids[0], dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, request in enumerate(requests):  # padding on the left: the answer follows the prompt
        start = longest - len(request.prompt_ids_T)
        ids_BT[row, start:] = torch.from_numpy(request.prompt_ids_T.astype(np.int64))
        mask_BT[row, start:] = 1
    limits_B = np.array([request.max_new_tokens for request in requests])
    drawing = Drawing(uniforms_for(requests, int(limits_B.max())).to(model.device), sampling)
    ids_BT = ids_BT.to(model.device)
    model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT.to(model.device),
        **(images.padded(requests, ids_BT) if images else {}),
        logits_processor=LogitsProcessorList([drawing]),
        # a config of its own, so that a model's generation_config.json cannot change what an evaluation means
        generation_config=GenerationConfig(
            max_new_tokens=int(limits_B.max()), eos_token_id=list(end_ids), pad_token_id=end_ids[0], do_sample=False
        ),
    )
    ids_BN, logprobs_BN = (torch.stack(each, 1).cpu().numpy() for each in (drawing.ids, drawing.logprobs))
    return cut(ids_BN, logprobs_BN, limits_B.tolist(), end_ids)
