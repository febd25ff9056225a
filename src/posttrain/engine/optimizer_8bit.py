"""AdamW that keeps its averages in 8 bits each. Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.

A row of a tensor is cut into blocks of 256 numbers, each with a scale of its own: its largest magnitude. A shard holds whole rows,
so that it is coded as the whole tensor would be, and a checkpoint fits any number of processes. As each row of an embedding has
its own scales, embeddings need no exception.

The paper rounds to the nearest of its levels, where an average that moves by less than half a level stays as it is for ever. Here
levels are evenly spaced in the logarithm, and which way a number is rounded alternates from step to step, in proportion to
how near it is, so that small changes add up; no random numbers are drawn.
"""

# R rows, C columns: all dimensions after the first, B blocks of a row

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from posttrain.engine.optimizer import AdamW

BLOCK = 256
FEWEST_ELEMENTS = 4096  # of a tensor that is coded; averages of smaller ones, norms and biases are AdamW's own
DECADES = 5  # from the smallest level to the largest one of the gradient's average; of its square's twice as many


@dataclass(frozen=True)
class Levels:
    """Magnitudes that a code can mean, as shares of its block's scale: those of the codes first to last are evenly spaced in the
    logarithm, from 10^-decades to 1."""

    first: int
    last: int
    decades: int

    def __call__(self, codes: Tensor) -> Tensor:
        levels = ((codes - self.last) * (math.log(10) * self.decades / (self.last - self.first))).exp_()
        return levels.mul_(codes.clamp(max=1)) if self.first else levels

    def below(self, shares: Tensor) -> Tensor:
        """The code of the nearest level that is not above, as a float."""
        turns = (self.last - self.first) / (math.log(10) * self.decades)
        return (shares.log() * turns + self.last).floor_().clamp_(0, self.last - 1)


SIGNED = Levels(1, 127, DECADES)  # beside a sign; 0 means 0
# the square's average is never rounded to 0, by which the other would be divided
UNSIGNED = Levels(0, 255, 2 * DECADES)


def encode(numbers_RC: Tensor, levels: Levels, threshold_C: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and scales (R, B) of rows; a number between two levels becomes the upper one where it is further up than the
    threshold in its column, a share of the way."""
    magnitudes_RBb = _blocks(numbers_RC.float().abs())
    scales_RB = magnitudes_RBb.amax(-1)
    shares_RBb = magnitudes_RBb / scales_RB.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes_RBb = levels.below(shares_RBb)
    low_RBb, high_RBb = levels(codes_RBb), levels(codes_RBb + 1)
    codes_RBb += shares_RBb - low_RBb > _blocks(threshold_C[None]) * (high_RBb - low_RBb)
    codes_RC = codes_RBb.flatten(1)[:, : numbers_RC.shape[1]]
    if levels is UNSIGNED:
        return codes_RC.to(torch.uint8), scales_RB
    return torch.copysign(codes_RC, numbers_RC).to(torch.int8), scales_RB


def decode(codes_RC: Tensor, scales_RB: Tensor, levels: Levels) -> Tensor:
    """The numbers (float32) that codes and scales mean."""
    codes_RBb = _blocks(codes_RC.float())
    numbers_RBb = torch.copysign(levels(codes_RBb.abs()), codes_RBb) * scales_RB[..., None]
    return numbers_RBb.flatten(1)[:, : codes_RC.shape[1]].contiguous()


def threshold(step: int, num_columns: int, device: torch.device) -> Tensor:
    """Evenly spread over (0, 1) in the course of steps (by the golden ratio) and along a row; the same on every process."""
    columns_C = torch.arange(num_columns, device=device)
    turned_C = (columns_C * 3242174889 + step * 2654435769) % 2**32
    return ((turned_C >> 16).float() + 0.5) / 2**16


class AdamW8bit(AdamW):
    """The same, but for the averages of large matrices, which are codes with scales between steps.

    A tensor is decoded, moved and coded again some rows at a time.
    """

    @cached_property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        exact = {name: shard for name, shard in self.shards.items() if not self._is_coded(name)}
        moments = self._fresh(exact)
        for name, shard in self.shards.items():
            if self._is_coded(name):
                moments[name] = self._fresh_codes(shard)
        return moments

    def _is_coded(self, name: str) -> bool:
        whole = self.parameters[name]
        return whole.dim() >= 2 and whole.numel() >= FEWEST_ELEMENTS

    def _fresh_codes(self, shard: Tensor) -> dict[str, Tensor]:
        rows, columns = _as_rows(shard).shape
        codes = torch.empty(shard.shape, device="meta")
        scales = torch.empty(rows, -(-columns // BLOCK), device="meta")

        def zeros(shape: Tensor, dtype: torch.dtype) -> Tensor:
            return self.world.device.zeros_like(shape.to(dtype), self.home)

        return {
            "step": torch.zeros((), dtype=torch.float32, device=self.world.device.torch_device),
            "exp_avg_codes": zeros(codes, torch.int8),
            "exp_avg_scales": zeros(scales, torch.float32),
            "exp_avg_sq_codes": zeros(codes, torch.uint8),
            "exp_avg_sq_scales": zeros(scales, torch.float32),
        }

    def _move_all(self, gradients: dict[str, Tensor], scale: Tensor, skipped: Tensor, lr: float, step: int) -> None:
        exact = {name: gradient for name, gradient in gradients.items() if not self._is_coded(name)}
        super()._move_all(exact, scale, skipped, lr, step)
        for name in [name for name in gradients if name not in exact]:
            self._move_coded(name, gradients[name], scale, skipped, lr, step)
        if self.streams:
            self.world.device.synchronize()

    @torch.no_grad()
    def _move_coded(self, name: str, gradient: Tensor, scale: Tensor, skipped: Tensor, lr: float, step: int) -> None:
        device, state = self.world.device.torch_device, self.moments[name]
        coded = [value for key, value in state.items() if key != "step"]
        tensors = [_as_rows(tensor) for tensor in (gradient, self.shards[name], *coded)]
        columns = tensors[0].shape[1]
        threshold_C = threshold(step, columns, device)
        for parts in zip(
            *(tensor.split(max(1, self.world.device.decoded_at_once // columns)) for tensor in tensors), strict=True
        ):
            here = [part.to(device, non_blocking=True) for part in parts]
            gradient_RC, weight_RC, codes, scales, square_codes, square_scales = here
            average, square = decode(codes, scales, SIGNED), decode(square_codes, square_scales, UNSIGNED)
            exact_RC, steps = weight_RC.float(), [state["step"].clone()]
            self._adamw(
                [exact_RC], [gradient_RC.float()], [average], [square], steps, scale, skipped, lr, self.weight_decay
            )
            weight_RC.copy_(exact_RC)
            new = [*encode(average, SIGNED, threshold_C), *encode(square, UNSIGNED, threshold_C)]
            for old, value in zip(here[2:], new, strict=True):
                old.copy_(torch.where(skipped > 0, old, value))
            for home, moved in zip(parts[1:], here[1:], strict=True):
                if home is not moved:
                    home.copy_(moved, non_blocking=True)
        state["step"] += 1 - skipped


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), math.prod(tensor.shape[1:]))  # never a copy, which would be moved in its place


def _blocks(numbers_RC: Tensor) -> Tensor:
    """The same in blocks, the last one of a row filled up with zeros."""
    missing = -numbers_RC.shape[1] % BLOCK
    return (pad(numbers_RC, (0, missing)) if missing else numbers_RC).unflatten(1, (-1, BLOCK))
