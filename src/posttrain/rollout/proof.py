"""The proof that `decode` computes what a model does, before its answers are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from posttrain.rollout.decoding import Written, decode, decoding
from posttrain.rollout.prompt_images import PromptImages
from posttrain.rollout.rollout import Request, Sampling

LENGTHS = (7, 4)
# largest difference in float32; mean difference in others, whose kernels round differently
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 0.1
LAYERS = {"full_attention", "sliding_attention"}


def why_not(model: Any) -> str | None:
    """Why `decode` cannot write this model's answers to text; None where its log-probabilities are the model's own."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.arange(3, 3 + 11 * sum(LENGTHS), 11, dtype=np.int32) % vocabulary
    prompts = [Request(part, (), 6) for part in (ids[: LENGTHS[0]], ids[LENGTHS[0] :])]
    return _why_not(model, prompts, None)


def why_not_of(model: Any, requests: Sequence[Request], images: PromptImages) -> str | None:
    """The same for prompts with images, by the shortest and the longest of these requests, which are sorted by length."""
    return _why_not(model, [requests[-1], requests[0]], images)


def _why_not(model: Any, prompts: Sequence[Request], images: PromptImages | None) -> str | None:
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    if others:  # such as attention in chunks, which short prompts would not show
        return f"it has layers of {', '.join(sorted(others))}"
    # two answers to one prompt, the first of which leaves early for one to the other
    requests = [
        replace(prompts[which], key=(number,), max_new_tokens=length)
        for number, (which, length) in enumerate([(0, 2), (0, 6), (1, 6)])
    ]
    sampling = Sampling(temperature=1.0, never=(images.token_id,) if images else ())
    try:
        with decoding(model):
            found = [pair for some in decode(model, requests, 2, sampling, (), images) for pair in some]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models differ in endless ways: whatever theirs is, transformers knows it
        return f"{type(error).__name__}: {error}"
    gaps = np.concatenate([_gaps(model, requests[place], written, images) for place, written in found])
    exact = model.dtype == torch.float32
    gap = float(gaps.max() if exact else gaps.mean())
    return None if gap < (TOLERANCE if exact else ROUGH_TOLERANCE) else f"log-probabilities would differ by {gap:.2g}"


@torch.no_grad()
def _gaps(model: Any, request: Request, written: Written, images: PromptImages | None) -> np.ndarray:
    """How far log-probabilities are from those of a forward pass over prompt and answer, without any cache."""
    ids_T = torch.from_numpy(np.concatenate([request.prompt_ids_T, written.ids_T])).long().to(model.device)
    seen = images.padded([request], ids_T[None]) if images else {}
    kept = len(written.ids_T) + 1  # of a long prompt all would take gigabytes
    logits = model(input_ids=ids_T[None], use_cache=False, logits_to_keep=kept, **seen).logits[0, -kept:-1]
    labels = ids_T[-len(written.ids_T) :, None]
    theirs = logits.float().log_softmax(-1).gather(1, labels)[:, 0]
    return np.abs(theirs.cpu().numpy() - written.logprobs_T)
