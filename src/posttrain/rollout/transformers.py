"""Answers by transformers' `generate`: the default rollout, on CPU and accelerators alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from posttrain.config.schema import RolloutOptions
from posttrain.errors import InputError
from posttrain.records import Completion, Segment


class TransformersRollout:
    """A model that answers prompts given as token ids. Stops at `end_ids`, the tokenizer's and the model's own end tokens."""

    def __init__(self, model: Any, tokenizer: Any, options: RolloutOptions, end_ids: Sequence[int] = (), seed: int = 0):
        self.model, self.tokenizer, self.options, self.seed = model, tokenizer, options, seed
        listed = model.generation_config.eos_token_id
        own = listed if isinstance(listed, list) else [listed]
        self.end_ids = sorted({int(i) for i in (*own, tokenizer.eos_token_id, *end_ids) if i is not None})
        if not self.end_ids:
            raise InputError(
                "Neither the model nor its tokenizer has an end-of-turn token, so that no answer would end."
            )

    def generate(
        self, prompts: Sequence[np.ndarray], advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """One completion a prompt, in the prompts' order; prompts of like length are answered together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.options.batch_size):
            batch = order[start : start + self.options.batch_size]
            for index, completion in zip(batch, self._batch([prompts[i] for i in batch], start), strict=True):
                completions[index] = completion
            advance(len(batch))
        return [completions[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, prompts: list[np.ndarray], start: int) -> list[Completion]:
        longest, device = max(map(len, prompts)), self.model.device
        pad = self.end_ids[0]
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padding on the left: the answer follows the prompt
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, longest - len(prompt) :] = 1
        torch.manual_seed(self.seed + start)
        out = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **self._sampling(pad))
        return [self._completion(prompt, row[longest:]) for prompt, row in zip(prompts, out.cpu().numpy(), strict=True)]

    def _sampling(self, pad: int) -> dict[str, Any]:
        from transformers import GenerationConfig

        options = self.options
        drawn = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        # a config of its own, so that a model's generation_config.json cannot change what an evaluation means
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=pad,
            **(drawn if options.temperature > 0 else {"do_sample": False}),
        )
        return {"generation_config": config}

    def _completion(self, prompt: np.ndarray, written: np.ndarray) -> Completion:
        ends = np.flatnonzero(np.isin(written, self.end_ids))
        ids_T = written[: ends[0] + 1] if len(ends) else written
        text = self.tokenizer.decode(ids_T, skip_special_tokens=True)
        return Completion(prompt, [Segment(ids_T.astype(np.int32))], text, stopped=bool(len(ends)))
