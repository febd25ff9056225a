"""A vision model's parts, and what its forward pass takes of images besides ids.

The vision tower turns pixels into features, a projector brings them to the width of the language model, which reads them in
the places of image tokens. Nothing here knows a family: what differs is asked of the model's own code.
"""

# T tokens of a packed row, A axes along which positions are counted (time, height, width)

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.errors import InputError
from posttrain.models.load import sees_images
from posttrain.records import ImageArrays

# how families call what stands between tower and language model, inside of the tower or beside it
PROJECTORS = ("merger", "projector", "connector", "aligner", "adapter", "embed_vision", "vision_projection")
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # what families call the mask of image tokens


@dataclass(frozen=True)
class Images:
    """The images of a micro-batch, for each document by the names of the model's arguments, in the host's memory until a forward pass
    takes them to the device.

    `seen_whole` has, for each document, for each token the number of its image or -1, where tokens of an image see each other.
    """

    arrays: ImageArrays
    device: torch.device
    seen_whole: tuple[Tensor | None, ...] = ()

    def packed(self) -> dict[str, Tensor]:
        """Those of all documents, one after the other; tiles or sides of which some have fewer are filled up with zeros, as
        processors do for batches."""
        names = dict.fromkeys(name for arrays in self.arrays for name in arrays)
        joined = {name: [torch.from_numpy(a[name]) for a in self.arrays if name in a] for name in names}
        return {name: _joined(tensors).to(self.device, non_blocking=True) for name, tensors in joined.items()}

    def of_document(self, number: int) -> dict[str, Tensor]:
        """Those of one document alone; nothing for one that fills up a row."""
        arrays = self.arrays[number] if number < len(self.arrays) else {}
        return {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in arrays.items()}


def _joined(tensors: list[Tensor]) -> Tensor:
    most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    missing = [
        [size for pair in zip(most, t.shape[1:], strict=True) for size in (pair[0] - pair[1], 0)] for t in tensors
    ]
    return torch.cat(
        [nn.functional.pad(t, less[::-1]) if any(less) else t for t, less in zip(tensors, missing, strict=True)]
    )


class Vision:
    """What must be known of a vision model to run it on packed rows."""

    def __init__(self, lm: Any):
        body = lm.base_model
        self._body = body
        takes = inspect.signature(type(body).forward).parameters
        self._takes = set(takes)
        self._types = next((name for name in TOKEN_TYPES if name in takes), None)
        self._counts_axes = hasattr(body, "get_rope_index")
        self.image_token_id: int = lm.config.image_token_id

    def taken(self, arrays: ImageArrays) -> ImageArrays:
        """Without what the image processor gives and the model does not take."""
        return tuple({name: array for name, array in d.items() if name in self._takes} for d in arrays)

    def types(self, ids_T: Tensor) -> dict[str, Tensor]:
        """The mask of image tokens, (1, T), where the model wants to be told."""
        if self._types is None:
            return {}
        return {self._types: (ids_T == self.image_token_id).to(torch.int32)[None]}

    def seen_whole(self, ids_T: Tensor, lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor | None, ...]:
        """Of each document, for each token the number of its image or -1, if tokens of an image see each other in this model
        (Gemma 3); else nothing."""
        if self._types != "token_type_ids":
            return ()
        found = []
        for ids in ids_T.split(list(lengths)):
            image = ids == self.image_token_id
            begins = image & ~torch.cat([image.new_zeros(1), image[:-1]])
            numbers = (begins.cumsum(0) - 1).masked_fill(~image, -1)
            found.append(numbers.to(device, non_blocking=True) if image.any() else None)
        return tuple(found)

    def positions(self, ids_T: Tensor, lengths: tuple[int, ...], arrays: ImageArrays) -> Tensor:
        """Positions from 0 in each document: (A, T) where the model counts those of images along several axes, else (T).

        All tensors on the CPU, so that nothing waits for a device.
        """
        each = [
            self._positions(ids, found)
            for ids, found in zip(ids_T.split(list(lengths)), _as_many(arrays, lengths), strict=True)
        ]
        return torch.cat(each, dim=-1)

    def forget(self) -> None:
        """What the model remembers of the positions of its last call."""
        if self._counts_axes:
            self._body.rope_deltas = None

    def _positions(self, ids_L: Tensor, arrays: dict[str, np.ndarray]) -> Tensor:
        if not self._counts_axes:
            return torch.arange(len(ids_L))
        if not arrays:
            return torch.arange(len(ids_L)).expand(3, -1)
        grids = {name: torch.from_numpy(array) for name, array in arrays.items() if name.endswith("_thw")}
        found, _ = self._body.get_rope_index(ids_L[None], **self.types(ids_L), **grids)
        return found[:, 0]


def _as_many(arrays: ImageArrays, lengths: tuple[int, ...]) -> ImageArrays:
    """With nothing for documents that fill up a row."""
    return (*arrays, *({} for _ in range(len(lengths) - len(arrays))))


def vision_of(lm: Any) -> Vision | None:
    """None for a text model."""
    return Vision(lm) if sees_images(lm.config) else None


def language_model(lm: Any) -> nn.Module:
    """The part that reads embeddings: the body of a text model, the decoder of a vision model."""
    return lm.base_model.get_decoder() if sees_images(lm.config) else lm.base_model


def vision_modules(lm: Any) -> list[nn.Module]:
    """The modules beside the language model: tower and projector."""
    language = language_model(lm)
    return [] if language is lm.base_model else [m for m in lm.base_model.children() if m is not language]


def is_projector(name: str) -> bool:
    return any(part in name for part in PROJECTORS)


def vision_weights(lm: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of tower and projector, by the model's names."""
    inside = {id(weight) for module in vision_modules(lm) for weight in module.parameters()}
    return ((name, weight) for name, weight in lm.named_parameters() if id(weight) in inside)


def freeze(lm: Any, tower: bool, projector: bool) -> None:
    """Let those weights stay as they are."""
    for name, weight in vision_weights(lm):
        if projector if is_projector(name) else tower:
            weight.requires_grad_(False)


def check_parts(lm: Any, tower: bool, projector: bool) -> None:
    """Raise InputError where the model lacks a part that was to be frozen."""
    projectors = {is_projector(name) for name, _ in vision_weights(lm)}
    for option, wanted, there in (
        ("freeze_vision_tower", tower, False in projectors),
        ("freeze_projector", projector, True in projectors),
    ):
        if wanted and not there:
            raise InputError(f"model.{option}: {type(lm).__name__} has no such part. Set it to false.")
