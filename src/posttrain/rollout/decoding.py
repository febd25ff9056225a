"""Writing a batch of answers token by token: each prompt is read once, and answers that have ended leave the batch."""

# T tokens of all prompts in a row, P prompts, B answers, N new tokens, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.rollout.cache import DECODING, Cache
from posttrain.rollout.noise import stream, uniforms
from posttrain.rollout.rollout import Request, Sampling
from posttrain.rollout.sampling import draw


@dataclass(frozen=True)
class Written:
    """Tokens of an answer up to its end token, which it has unless it met its limit."""

    ids_T: np.ndarray  # int32
    logprobs_T: np.ndarray  # float32
    stopped: bool


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Inside, the model attends as `decode` needs it. Raises ValueError where it has no choice of attention."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation(DECODING)
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@torch.no_grad()
def decode(model: Any, requests: Sequence[Request], sampling: Sampling, end_ids: Sequence[int]) -> list[Written]:
    """An answer to each request, in their order. Those with equal prompts should come next to each other."""
    device = model.device
    prompts: dict[bytes, int] = {}
    prompt_of_B = np.array([prompts.setdefault(request.prompt_ids_T.tobytes(), len(prompts)) for request in requests])
    by_prompt = np.argsort(prompt_of_B, kind="stable")
    requests_B, prompt_of_B = [requests[i] for i in by_prompt], prompt_of_B[by_prompt]
    first_P = np.unique(prompt_of_B, return_index=True)[1]
    limits_B = np.array([request.max_new_tokens for request in requests_B])
    cache = Cache([len(requests_B[i].prompt_ids_T) for i in first_P], prompt_of_B, int(limits_B.max()), device)
    logits_PV = _read_prompts(model, cache, np.concatenate([requests_B[i].prompt_ids_T for i in first_P]))
    logits_BV = logits_PV.index_select(0, torch.from_numpy(prompt_of_B).to(device))
    ids_BN, logprobs_BN = _write(model, cache, logits_BV, requests_B, limits_B, sampling, end_ids)
    written = cut(ids_BN.cpu().numpy(), logprobs_BN.cpu().numpy(), limits_B, end_ids)
    return [written[i] for i in np.argsort(by_prompt)]


def uniforms_for(requests: Sequence[Request], device: torch.device) -> Tensor:
    """The number (B, N) that draws each token of each answer."""
    first_B1 = np.array([request.first_position for request in requests])[:, None]
    positions_BN = first_B1 + np.arange(max(request.max_new_tokens for request in requests))
    numbers_BN = uniforms([stream(request.key) for request in requests], positions_BN)
    return torch.from_numpy(numbers_BN.astype(np.float32)).to(device, non_blocking=True)


def tokens_between_looks(device: torch.device) -> int:
    """On an accelerator, asking which answers have ended waits for all that was dispatched, so it is asked seldom."""
    return 1 if device.type == "cpu" else 8


def _read_prompts(model: Any, cache: Cache, ids_T: np.ndarray) -> Tensor:
    """Logits (P, V) of the first new token after each prompt."""
    last_P = (cache.documents.borders[1:] - 1).long()
    ids_1T = torch.from_numpy(ids_T.astype(np.int64))[None].to(cache.device)
    return model(
        input_ids=ids_1T,
        position_ids=cache.places_T[None],
        decoding=cache,
        use_cache=False,
        logits_to_keep=last_P,
    ).logits[0]


def _write(
    model: Any,
    cache: Cache,
    logits_BV: Tensor,
    requests_B: Sequence[Request],
    limits_B: np.ndarray,
    sampling: Sampling,
    end_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities (B, N); what stands behind an answer's end means nothing."""
    device, limit = cache.device, int(limits_B.max())
    uniforms_BN = uniforms_for(requests_B, device)
    ids_BN = torch.zeros(len(requests_B), limit, dtype=torch.long, device=device)
    logprobs_BN = torch.zeros(len(requests_B), limit, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    rows_B = torch.arange(len(requests_B), device=device)  # of the answers that are still in the batch
    until_B = torch.from_numpy(limits_B).to(device)
    going_B = torch.ones(len(requests_B), dtype=torch.bool, device=device)
    between = tokens_between_looks(device)
    for n in range(limit):
        drawn_B, logprobs_B = draw(logits_BV, uniforms_BN[:, n], sampling)
        ids_BN[rows_B, n], logprobs_BN[rows_B, n] = drawn_B, logprobs_B
        if n + 1 == limit:
            break
        going_B &= ~torch.isin(drawn_B, ends) & (until_B > n + 1)
        if n % between == 0:
            left = np.flatnonzero(going_B.cpu().numpy())
            if not len(left):
                break
            if len(left) <= len(going_B) * 7 // 8:
                cache.keep(left)
                kept = torch.from_numpy(left).to(device)
                drawn_B, going_B, rows_B, until_B = (x[kept] for x in (drawn_B, going_B, rows_B, until_B))
                uniforms_BN = uniforms_BN[kept]
        positions_B1 = cache.begin_token()
        logits_BV = model(
            input_ids=drawn_B[:, None], position_ids=positions_B1, decoding=cache, use_cache=False
        ).logits[:, -1]
    return ids_BN, logprobs_BN


def cut(ids_BN: np.ndarray, logprobs_BN: np.ndarray, limits_B: np.ndarray, end_ids: Sequence[int]) -> list[Written]:
    ends_BN = np.isin(ids_BN, list(end_ids))
    written = []
    for ids_N, logprobs_N, ends_N, limit in zip(ids_BN, logprobs_BN, ends_BN, limits_B, strict=True):
        found = np.flatnonzero(ends_N[:limit])
        length = int(found[0]) + 1 if len(found) else limit
        written.append(Written(ids_N[:length].astype(np.int32), logprobs_N[:length].copy(), bool(len(found))))
    return written
