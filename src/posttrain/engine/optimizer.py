"""AdamW over the local shards, its schedule, clipping, and the guard against steps that are not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from posttrain.distributed.sharding import like, local
from posttrain.distributed.world import World


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, as tensors that nobody has waited for. `skipped` is 1 where it was not finite."""

    grad_norm: Tensor
    skipped: Tensor
    lr: float
    seconds: float  # that this process worked, after it knew the norm


class AdamW:
    """torch's fused AdamW on this process's shards. Matrices decay, vectors (biases, norms) do not.

    Clipping and skipping happen inside the fused kernel where the device's has them, so that nothing waits for the norm:
    a step whose gradient is not finite changes neither weights nor moments. What lives in the host's memory (`offload`: the
    moments; weights, where FSDP2 keeps them there) comes to the device a tensor at a time.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        world: World,
        rate: Callable[[int], float],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip_grad: float,
        offload: bool = False,
    ):
        self.world, self.rate, self.clip_grad = world, rate, clip_grad
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.shards = {name: local(p.detach()) for name, p in self.parameters.items()}
        device = world.device.torch_device
        self.home = world.device.host if offload else device
        self.streams = self.home != device or any(shard.device != device for shard in self.shards.values())

    @cached_property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's averages and step counts by name; made when first needed, which evaluation never does."""
        return self._fresh(self.shards)

    def _fresh(self, shards: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        device = self.world.device
        return {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=device.torch_device),
                "exp_avg": device.zeros_like(shard, self.home),
                "exp_avg_sq": device.zeros_like(shard, self.home),
            }
            for name, shard in shards.items()
        }

    def step(self, step: int) -> StepReport:
        """Move the weights by the gradients gathered so far, at the rate of `step`, and clear them. All ranks call this."""
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        norm = self._norm(list(gradients.values()))
        started = time.perf_counter()
        skipped = (~torch.isfinite(norm)).float()
        over = norm / self.clip_grad if self.clip_grad else torch.ones_like(norm)
        scale = torch.where(over > 1, over, 1.0)
        lr = self.rate(step)
        if self.world.device.fused_adamw_clips or not skipped:  # the second question waits for the norm
            self._move_all(gradients, scale, skipped, lr, step)
        for parameter in self.parameters.values():
            parameter.grad = None
        return StepReport(norm, skipped, lr, time.perf_counter() - started)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name; on a mesh as DTensors, so that a checkpoint fits any world size."""
        return {
            f"{name}/{key}": value if key == "step" else like(value, self.parameters[name])
            for name, moments in self.moments.items()
            for key, value in moments.items()
        }

    def _move_all(self, gradients: dict[str, Tensor], scale: Tensor, skipped: Tensor, lr: float, step: int) -> None:
        move = self._move_streaming if self.streams else self._move
        for decays in (True, False):
            names = [name for name in gradients if (self.parameters[name].dim() >= 2) == decays]
            if names:
                move(names, gradients, scale, skipped, lr, self.weight_decay if decays else 0.0)

    def _move_streaming(self, names: list[str], gradients: dict[str, Tensor], *how: Any) -> None:
        """The same tensor by tensor, each brought to the device and back where it lives elsewhere."""
        device = self.world.device.torch_device
        for name in names:
            at_home = [self.shards[name], self.moments[name]["exp_avg"], self.moments[name]["exp_avg_sq"]]
            here = [tensor.to(device, non_blocking=True) for tensor in at_home]
            gradient = gradients[name].to(device, non_blocking=True)
            self._adamw([here[0]], [gradient], [here[1]], [here[2]], [self.moments[name]["step"]], *how)
            for home, moved in zip(at_home, here, strict=True):
                if home is not moved:
                    home.copy_(moved, non_blocking=True)
        self.world.device.synchronize()  # the next forward pass reads what was copied back

    def _move(self, names: list[str], gradients: dict[str, Tensor], *how: Any) -> None:
        states = [self.moments[name] for name in names]
        self._adamw(
            [self.shards[name] for name in names],
            [gradients[name] for name in names],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            *how,
        )

    @torch.no_grad()
    def _adamw(
        self, shards, gradients, averages, squares, steps, scale: Tensor, skipped: Tensor, lr: float, decay: float
    ) -> None:
        clips = self.world.device.fused_adamw_clips  # the kernel divides gradients by grad_scale
        if not clips:
            torch._foreach_div_(gradients, scale)
        adamw(
            shards, gradients, averages, squares, [], steps, fused=True,
            grad_scale=scale if clips else None, found_inf=skipped if clips else None,
            amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=decay, eps=self.eps, maximize=False,
        )  # fmt: skip

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm (float32) of the whole gradient, over the shards of all processes."""
        squares = torch.zeros((), device=self.world.device.torch_device)
        if gradients:
            squares += (
                torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum().to(squares.device)
            )
        return self.world.sum_over_shards(squares).sqrt()


def learning_rate(
    lr: float, kind: str, num_steps: int, warmup_steps: int, min_ratio: float, wsd_decay_ratio: float
) -> Callable[[int], float]:
    """Step (from 0) -> rate. The first step of a warm-up has lr / warmup_steps, never zero."""
    decay_steps = max(1, round(wsd_decay_ratio * num_steps)) if kind == "wsd" else max(1, num_steps - warmup_steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / warmup_steps
        done = min(max((step - (num_steps - decay_steps)) / decay_steps, 0.0), 1.0)
        match kind:
            case "constant":
                share = 1.0
            case "linear" | "wsd":
                share = 1.0 - done
            case "cosine":
                share = 0.5 * (1.0 + math.cos(math.pi * done))
            case _:
                raise ValueError(kind)
        return lr * (min_ratio + (1.0 - min_ratio) * share)

    return rate


def warmup_steps(num_steps: int, steps: int | None, ratio: float | None) -> int:
    """Steps of warm-up from the two options that can give it; 5% where neither does."""
    return steps if steps is not None else round((0.05 if ratio is None else ratio) * num_steps)
