"""Answers by transformers' models: the default rollout, on CPU and accelerators alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import InputError
from posttrain.records import Completion, Segment
from posttrain.rollout.noise import stream
from posttrain.rollout.rollout import Request, Sampling


class TransformersRollout:
    """A model that answers prompts given as token ids. Stops at `end_ids`, the tokenizer's and the model's own end tokens."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, end_ids: Sequence[int] = ()):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        listed = model.generation_config.eos_token_id
        own = listed if isinstance(listed, list) else [listed]
        self.end_ids = sorted({int(i) for i in (*own, tokenizer.eos_token_id, *end_ids) if i is not None})
        if not self.end_ids:
            raise InputError(
                "Neither the model nor its tokenizer has an end-of-turn token, so that no answer would end."
            )

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        device, dtype = self.model.device, self.model.dtype
        self.model.load_state_dict({name: weight.to(device, dtype) for name, weight in weights}, assign=True)
        self.model.tie_weights()

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """One completion a request, in their order; prompts of like length are answered together."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids_T))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, completion in zip(batch, self._batch([requests[i] for i in batch], sampling), strict=True):
                completions[index] = completion
            advance(len(batch))
        return [completions[index] for index in range(len(requests))]

    @torch.no_grad()
    def _batch(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        prompts = [request.prompt_ids_T for request in requests]
        longest, device = max(map(len, prompts)), self.model.device
        pad = self.end_ids[0]
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: the answer follows the prompt
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        torch.manual_seed(stream(requests[0].key) >> 1)
        config = self._config(pad, max(request.max_new_tokens for request in requests), sampling)
        out = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [self._completion(prompt, row[longest:]) for prompt, row in zip(prompts, out.cpu().numpy(), strict=True)]

    def _config(self, pad: int, max_new_tokens: int, sampling: Sampling) -> Any:
        from transformers import GenerationConfig

        drawn = {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        }  # fmt: skip
        # a config of its own, so that a model's generation_config.json cannot change what an evaluation means
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=pad,
            **(drawn if sampling.temperature > 0 else {"do_sample": False}),
        )

    def _completion(self, prompt: np.ndarray, written: np.ndarray) -> Completion:
        ends = np.flatnonzero(np.isin(written, self.end_ids))
        ids_T = written[: ends[0] + 1] if len(ends) else written
        text = self.tokenizer.decode(ids_T, skip_special_tokens=True)
        return Completion(prompt, [Segment(ids_T.astype(np.int32))], text, stopped=bool(len(ends)))
