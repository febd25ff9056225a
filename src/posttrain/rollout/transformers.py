"""Answers by transformers' models: the default rollout, on CPU and accelerators alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posttrain.data.images.processor import ImageText
from posttrain.errors import InputError, RunError
from posttrain.records import Completion, Segment
from posttrain.rollout import plain
from posttrain.rollout.decoding import Written, decode, decoding
from posttrain.rollout.prompt_images import PromptImages
from posttrain.rollout.proof import why_not, why_not_of
from posttrain.rollout.rollout import Request, Sampling


class TransformersRollout:
    """A model that answers prompts given as token ids. Stops at `end_ids`, the tokenizer's and the model's own end tokens.

    `batch_size` is the most answers written at one time, halved whenever memory runs out. `warnings` are for a person to
    see: each is said once. With `images`, prompts may hold images.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        end_ids: Sequence[int] = (),
        images: ImageText | None = None,
    ):
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.num_out_of_memory = 0
        self.warnings: list[str] = []
        self._device, self._dtype = model.device, model.dtype
        self._images = None if images is None else PromptImages(model, images)
        self._never = () if images is None else (images.token_id,)
        self._fast: dict[bool, bool] = {}  # by whether prompts have images; not known before the first answers
        listed = model.generation_config.eos_token_id
        own = listed if isinstance(listed, list) else [listed]
        self.end_ids = sorted({int(i) for i in (*own, tokenizer.eos_token_id, *end_ids) if i is not None})
        if not self.end_ids:
            raise InputError(
                "Neither the model nor its tokenizer has an end-of-turn token, so that no answer would end."
            )

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Answer with these weights from now on, which on one device may be the trainer's own memory."""
        moved = {name: weight.to(self._device, self._dtype) for name, weight in weights}
        self.model.load_state_dict(moved, assign=True)
        self.model.tie_weights()

    def sleep(self) -> None:
        """Give back the device's memory until the next `take`. Weights that the trainer shares are let go, not changed."""
        empty = {name: torch.empty_like(weight, device="meta") for name, weight in self.model.state_dict().items()}
        self.model.load_state_dict(empty, assign=True)
        self.model.tie_weights()

    def close(self) -> None:
        pass

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """One completion a request, in their order; prompts of like length are answered together, equal ones are read once."""
        sampling = replace(sampling, never=self._never)
        left = sorted(range(len(requests)), key=lambda i: _likeness(requests[i]))
        completions: dict[int, Completion] = {}
        while left:
            try:
                for some in self._write([requests[i] for i in left], sampling):
                    for place, written in some:
                        completions[left[place]] = self._completion(requests[left[place]], written)
                    advance(len(some))
                short = False
            except torch.OutOfMemoryError:
                short = True
            left = [index for index in left if index not in completions]
            if short:
                self._write_fewer([requests[i] for i in left])
        return [completions[index] for index in range(len(requests))]

    def _prove(self, requests: list[Request]) -> bool:
        """Whether `decode` writes answers to such requests as the model does."""
        images = self._images if requests[0].images else None
        cause = why_not(self.model) if images is None else why_not_of(self.model, requests, images)
        if cause:
            prompts = " to prompts with images" if images else ""
            self.warnings.append(
                f"{type(self.model).__name__} writes answers{prompts} by transformers' own generate, which is slower: {cause}."
            )
        return cause is None

    def _write(self, requests: list[Request], sampling: Sampling) -> Iterator[list[tuple[int, Written]]]:
        """Answers with the places of their requests, some at a time; first those to prompts without images."""
        num_plain = sum(not request.images for request in requests)
        for begin, part in ((0, requests[:num_plain]), (num_plain, requests[num_plain:])):
            for some in self._write_alike(part, sampling) if part else ():
                yield [(begin + place, written) for place, written in some]

    def _write_alike(self, requests: list[Request], sampling: Sampling) -> Iterator[list[tuple[int, Written]]]:
        seen = bool(requests[0].images)
        images = self._images if seen else None
        if seen not in self._fast:
            self._fast[seen] = self._prove(requests)
        if self._fast[seen]:
            with decoding(self.model):
                yield from decode(self.model, requests, self.batch_size, sampling, self.end_ids, images)
            return
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            yield list(enumerate(plain.generate(self.model, batch, sampling, self.end_ids, images), start))

    def _write_fewer(self, left: list[Request]) -> None:
        """Halve the batch after memory ran out, outside of the error, which holds on to memory."""
        tried = min(self.batch_size, len(left))
        longest = max(len(request.prompt_ids_T) + request.max_new_tokens for request in left)
        if tried == 1:
            raise RunError(
                f"Memory ran out while writing one answer, of up to {longest:,} tokens with its prompt. Lower "
                "rollout.max_new_tokens, or leave out the longest prompts."
            )
        self.num_out_of_memory += 1
        self.batch_size = tried // 2
        self.warnings.append(
            f"Memory ran out while writing {tried} answers at a time, of up to {longest:,} tokens with their prompts; going on "
            f"with {self.batch_size}. rollout.batch_size={self.batch_size} would save the attempt."
        )

    def _completion(self, request: Request, written: Written) -> Completion:
        text = self.tokenizer.decode(written.ids_T, skip_special_tokens=True)
        return Completion(request.prompt_ids_T, [Segment(written.ids_T, written.logprobs_T)], text, written.stopped)


def _likeness(request: Request) -> tuple[Any, ...]:
    """Those with images last: they are written in another way."""
    return bool(request.images), len(request.prompt_ids_T), *request.prompt
