"""Writing answers token by token: a prompt is read once, answers that end leave the batch, and others take their places."""

# P prompts, B answers being written, N tokens of the longest answer and one that nobody reads, V vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.distributed.device import tokens_between_looks
from posttrain.rollout.cache import DECODING, Cache
from posttrain.rollout.noise import stream, uniforms
from posttrain.rollout.prompt_images import Packed, PromptImages
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
    """Inside, what reads the text attends as `decode` needs it. Raises ValueError where it has no choice of attention."""
    text, whole = model.config.get_text_config(), model.config
    part = next((name for name in whole.sub_configs if getattr(whole, name) is text), "")
    chosen = text._attn_implementation
    model.set_attn_implementation({part: DECODING})
    try:
        yield
    finally:
        model.set_attn_implementation({part: chosen})


@torch.no_grad()
def decode(
    model: Any,
    requests: Sequence[Request],
    batch_size: int,
    sampling: Sampling,
    end_ids: Sequence[int],
    images: PromptImages | None = None,
) -> Iterator[list[tuple[int, Written]]]:
    """Answers with the places of their requests, as they end; at most `batch_size` are written at a time.

    Equal prompts should be neighbours, and prompts of like length near each other. `images` reads those of the prompts.
    """
    device, limit = model.device, max(request.max_new_tokens for request in requests)
    cache, ends, between = (
        Cache(limit, device),
        torch.tensor(list(end_ids), device=device),
        tokens_between_looks(device),
    )
    rows, begun = Rows.of([], [], limit, device, torch.zeros(0, dtype=torch.long)), 0
    for tick in count():
        logits = []
        if len(rows):
            positions_B1 = cache.begin_token() + rows.shifts_B1
            out = model(input_ids=rows.last_B1, position_ids=positions_B1, decoding=cache, use_cache=False)
            logits.append(out.logits[:, -1])
        entering = range(begun, begun + _entering(requests[begun:], batch_size - len(rows), batch_size))
        if entering:
            begun = entering.stop
            first, shifts_B = _read(model, cache, [requests[i] for i in entering], images)
            logits.append(first)
            rows = rows.joined(Rows.of(requests, entering, limit, device, shifts_B))
        rows.write(*draw(torch.cat(logits), rows.uniforms_B, sampling), ends)
        if tick % between:
            continue
        going_B = rows.going_B.cpu().numpy()
        left, gone = np.flatnonzero(going_B), np.flatnonzero(~going_B)
        if not len(left) or len(gone) * 8 >= len(rows):  # fewer would not pay for copying the cache
            yield list(zip(rows.places_B[gone].tolist(), rows.written(gone, requests, end_ids), strict=True))
            rows = rows.kept(left)
            if not len(left) and begun == len(requests):
                return
            if len(left):
                cache.keep(left)
            else:
                cache = Cache(limit, device)


@dataclass
class Rows:
    """The answers of a batch. What an answer has drawn after its end means nothing."""

    places_B: np.ndarray  # among the requests
    uniforms_BN: Tensor
    ids_BN: Tensor
    logprobs_BN: Tensor
    counts_B1: Tensor  # tokens drawn
    limits_B1: Tensor
    going_B: Tensor
    last_B1: Tensor
    shifts_B1: Tensor  # from the places of tokens to their positions: an image may take fewer positions than tokens

    @classmethod
    def of(
        cls, requests: Sequence[Request], places: Sequence[int], limit: int, device: torch.device, shifts_B: Tensor
    ) -> Rows:
        chosen, shape = [requests[i] for i in places], (len(places), limit + 1)
        limits_B1 = torch.tensor([[request.max_new_tokens] for request in chosen], dtype=torch.long).view(-1, 1)
        return cls(
            np.array(places, dtype=np.int64),
            uniforms_for(chosen, limit + 1).to(device, non_blocking=True),
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(len(chosen), 1, dtype=torch.long, device=device),
            limits_B1.to(device, non_blocking=True),
            torch.ones(len(chosen), dtype=torch.bool, device=device),
            torch.zeros(len(chosen), 1, dtype=torch.long, device=device),
            shifts_B[:, None].to(device, non_blocking=True),
        )

    def __len__(self) -> int:
        return len(self.places_B)

    @property
    def uniforms_B(self) -> Tensor:
        """The number that draws each answer's next token."""
        return self.uniforms_BN.gather(1, self.counts_B1)[:, 0]

    def write(self, ids_B: Tensor, logprobs_B: Tensor, ends: Tensor) -> None:
        self.last_B1 = ids_B[:, None]
        self.ids_BN.scatter_(1, self.counts_B1, self.last_B1)
        self.logprobs_BN.scatter_(1, self.counts_B1, logprobs_B[:, None])
        # an answer that waits to leave writes on at the end of its row, where nobody reads
        self.counts_B1 = (self.counts_B1 + 1).clamp_(max=self.ids_BN.shape[1] - 1)
        self.going_B = self.going_B & ~torch.isin(ids_B, ends) & (self.counts_B1 < self.limits_B1)[:, 0]

    def joined(self, other: Rows) -> Rows:
        if not len(self):
            return other
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return Rows(np.concatenate([self.places_B, other.places_B]), *(torch.cat(pair) for pair in pairs))

    def kept(self, chosen: np.ndarray) -> Rows:
        index = torch.from_numpy(chosen).to(self.ids_BN.device)
        return Rows(self.places_B[chosen], *(x.index_select(0, index) for x in self._tensors()))

    def written(self, chosen: np.ndarray, requests: Sequence[Request], end_ids: Sequence[int]) -> list[Written]:
        index = torch.from_numpy(chosen).to(self.ids_BN.device)
        ids_BN, logprobs_BN = (x.index_select(0, index).cpu().numpy() for x in (self.ids_BN, self.logprobs_BN))
        return cut(ids_BN, logprobs_BN, [requests[i].max_new_tokens for i in self.places_B[chosen]], end_ids)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            self.uniforms_BN, self.ids_BN, self.logprobs_BN, self.counts_B1, self.limits_B1, self.going_B, self.last_B1,
            self.shifts_B1,
        )  # fmt: skip


def uniforms_for(requests: Sequence[Request], length: int) -> Tensor:
    """The number (B, length) that draws each token of each answer."""
    first_B1 = np.array([request.first_position for request in requests], dtype=np.int64).reshape(-1, 1)
    numbers_BN = uniforms([stream(request.key) for request in requests], first_B1 + np.arange(length))
    return torch.from_numpy(numbers_BN.astype(np.float32))


def cut(ids_BN: np.ndarray, logprobs_BN: np.ndarray, limits_B: Sequence[int], end_ids: Sequence[int]) -> list[Written]:
    """Answers up to their first end token or their limits."""
    ends_BN = np.isin(ids_BN, list(end_ids))
    written = []
    for ids_N, logprobs_N, ends_N, limit in zip(ids_BN, logprobs_BN, ends_BN, limits_B, strict=True):
        found = np.flatnonzero(ends_N[:limit])
        length = int(found[0]) + 1 if len(found) else limit
        written.append(Written(ids_N[:length].astype(np.int32), logprobs_N[:length].copy(), bool(len(found))))
    return written


def _entering(waiting: Sequence[Request], places: int, batch_size: int) -> int:
    """How many requests enter: enough to pay for reading prompts in between, and no part of a group if it can be whole."""
    if not waiting or places * 4 < min(batch_size, len(waiting) * 4):
        return 0
    if len(waiting) <= places:
        return len(waiting)
    whole = places
    while whole and _same(waiting[whole - 1], waiting[whole]):
        whole -= 1
    return whole or places


def _same(a: Request, b: Request) -> bool:
    return a.prompt == b.prompt


def _read(model: Any, cache: Cache, requests: Sequence[Request], images: PromptImages | None) -> tuple[Tensor, Tensor]:
    """Logits (B, V) of the first token of each answer, and the shifts (B) of what follows; neighbours with equal prompts share the
    reading."""
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt)]
    lengths_P = np.array([len(group[0].prompt_ids_T) for group in groups])
    counts_P = np.array([len(group) for group in groups])
    ids_T = torch.from_numpy(np.concatenate([group[0].prompt_ids_T for group in groups]).astype(np.int64))
    packed = Packed(torch.zeros(len(groups), dtype=torch.long))
    if images:
        packed = images.packed([group[0] for group in groups], ids_T, cache.device)
    with cache.reading(lengths_P, counts_P, packed.seen_whole) as prompts:
        out = model(
            input_ids=ids_T[None].to(cache.device),
            decoding=cache,
            use_cache=False,
            logits_to_keep=prompts.last_P,
            **{"position_ids": prompts.place_T[None], **packed.arguments},
        )
    repeats_P = torch.from_numpy(counts_P)
    logits_BV = out.logits[0].repeat_interleave(repeats_P.to(cache.device), dim=0, output_size=len(requests))
    return logits_BV, packed.shifts_P.repeat_interleave(repeats_P)
