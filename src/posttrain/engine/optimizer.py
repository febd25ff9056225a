"""AdamW over the local shards, its schedule, clipping, and the guard against steps that are not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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

    Clipping and skipping happen inside the fused kernel, so that nothing waits for the norm: a step whose gradient is
    not finite changes neither weights nor moments.
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
    ):
        self.world, self.rate, self.clip_grad = world, rate, clip_grad
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        self.shards = {name: nn.Parameter(local(p.detach())) for name, p in self.parameters.items()}
        matrices = [self.shards[name] for name, p in self.parameters.items() if p.dim() >= 2]
        vectors = [self.shards[name] for name, p in self.parameters.items() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.torch = torch.optim.AdamW([g for g in groups if g["params"]], lr=1.0, betas=betas, eps=eps, fused=True)

    def step(self, step: int) -> StepReport:
        """Move the weights by the gradients gathered so far, at the rate of `step`, and clear them. All ranks call this."""
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        norm = self._norm(list(gradients.values()))
        started = time.perf_counter()
        for name, gradient in gradients.items():
            self.shards[name].grad = gradient
        skipped = (~torch.isfinite(norm)).float()
        # the kernel divides gradients by grad_scale, which is how they are clipped
        over = norm / self.clip_grad if self.clip_grad else torch.ones_like(norm)
        self.torch.grad_scale = torch.where(over > 1, over, 1.0)  # type: ignore[attr-defined]
        self.torch.found_inf = skipped  # type: ignore[attr-defined]
        lr = self.rate(step)
        for group in self.torch.param_groups:
            group["lr"] = lr
        self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None
        return StepReport(norm, skipped, lr, time.perf_counter() - started)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name; on a mesh as DTensors, so that a checkpoint fits any world size."""
        for group in self.torch.param_groups:
            for shard in group["params"]:
                if not self.torch.state[shard]:
                    self.torch.state[shard] = {
                        "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                        "exp_avg": torch.zeros_like(shard),
                        "exp_avg_sq": torch.zeros_like(shard),
                    }
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.torch.state[self.shards[name]].items():
                state[f"{name}/{key}"] = like(value, parameter) if value.dim() or key != "step" else value
        return state

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Norm (float32) of the whole gradient, over the shards of all processes."""
        if not gradients:
            return torch.zeros((), device=self.world.device.torch_device)
        squares = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
        return self.world.sum(squares).sqrt()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor as the same part of a sharded one as the parameter's."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


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
