"""What a model takes of the images of prompts, besides the ids that stand for them."""

# B prompts, T longest prompt, P prompts in one packed row

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posttrain.data.images.loader import ImageLoader
from posttrain.data.images.processor import ImageText
from posttrain.models.vision import Images, Vision
from posttrain.records import ImageArrays, Sample
from posttrain.rollout.rollout import Request


@dataclass(frozen=True)
class Packed:
    """What a model takes of prompts that lie one after the other in a row, besides ids and what can be told from their lengths.

    `shifts_P`: how far from its place the position is of what follows each prompt, an image having fewer positions than tokens.
    `seen_whole` as of `Vision`.
    """

    shifts_P: Tensor
    arguments: dict[str, Tensor] = field(default_factory=dict)
    seen_whole: tuple[Tensor | None, ...] = ()


class PromptImages:
    """The images of prompts as the forward pass of a model takes them, made by its own processor."""

    def __init__(self, model: Any, images: ImageText):
        self.token_id = images.token_id
        self._loader, self._vision = ImageLoader(images), Vision(model)

    def padded(self, requests: Sequence[Request], ids_BT: Tensor) -> dict[str, Tensor]:
        """Arguments for prompts in rows of their own."""
        given = Images(self._arrays(requests), ids_BT.device).packed()
        types = [self._vision.types(ids_T) for ids_T in ids_BT]
        return {**given, **{name: torch.cat([of_row[name] for of_row in types]) for name in types[0]}}

    def packed(self, prompts: Sequence[Request], ids_T: Tensor, device: torch.device) -> Packed:
        """Of prompts one after the other; their ids are on the CPU."""
        lengths, arrays = [len(prompt.prompt_ids_T) for prompt in prompts], self._arrays(prompts)
        positions = self._vision.positions(ids_T, tuple(lengths), arrays)
        ends_P = torch.stack([part.max() + 1 for part in positions.split(lengths, dim=-1)])
        return Packed(
            ends_P - torch.tensor(lengths),
            {"position_ids": positions[..., None, :].to(device), **Images(arrays, device).packed()},
            self._vision.seen_whole(ids_T, tuple(lengths), device),
        )

    def _arrays(self, requests: Sequence[Request]) -> ImageArrays:
        """Of each prompt, those of its images; of equal prompts they are made once. All prompts have images."""
        begun: dict[Any, Future[dict[str, np.ndarray]]] = {}
        for request in requests:
            if request.prompt not in begun:
                ids_T = request.prompt_ids_T
                begun[request.prompt] = self._loader.submit(
                    Sample(0, ids_T, np.zeros(len(ids_T), np.float32), images=request.images)
                )
        made = {prompt: reading.result() for prompt, reading in begun.items()}
        return self._vision.taken(tuple(made[request.prompt] for request in requests))
