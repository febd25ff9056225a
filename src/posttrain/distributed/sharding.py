"""What is done to a policy before it trains, in the order that matters: recomputation, compilation, sharding, weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from posttrain.config.schema import EngineOptions
from posttrain.distributed.offload import ActivationOffload
from posttrain.distributed.world import World
from posttrain.models.attention import leave_uncompiled
from posttrain.models.policy import Policy
from posttrain.models.weights import Part, Weights


def prepare(
    policy: Policy,
    world: World,
    dtype: torch.dtype,
    layout: EngineOptions,
    *,
    recompute_every: int | None = None,
    compile_blocks: bool = False,
    offload_inputs: bool = False,
) -> Policy:
    """The policy ready for its weights: every `recompute_every`-th block recomputed, its inputs meanwhile in the host's
    memory where `offload_inputs` says so, `dtype` for forward and backward. Of a vision tower all blocks are recomputed or none,
    and none is compiled: their rows are as long as images are large.

    On a mesh FSDP2 shards weights, gradients and optimizer states block by block. Gradients are summed over processes, not
    averaged: the loss is divided by its number of tokens already.
    """
    offload = ActivationOffload(world.device) if offload_inputs and world.device.has_own_memory else None
    for number, block in enumerate(policy.blocks):
        forward = torch.compile(block.forward, dynamic=True) if compile_blocks else block.forward
        if recompute_every is not None and number % recompute_every == 0:
            forward = partial(_recomputed, block, forward, offload)
        block.forward = forward
    for block in policy.vision_blocks if recompute_every is not None else []:
        block.forward = partial(_recomputed, block, block.forward, None)
    if compile_blocks:
        leave_uncompiled()
    if world.mesh is None:
        policy.to(world.device.torch_device)
        policy.lm.tie_weights()  # where a device's tensors cannot take the place of the CPU's, `to` makes one of each name
        return policy
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    weights_offload = (
        CPUOffloadPolicy(pin_memory=world.device.knows_pinned) if layout.param_offload else OffloadPolicy()
    )
    for block in (*policy.vision_blocks, *policy.blocks):
        fully_shard(
            block,
            mesh=world.mesh,
            mp_policy=precision,
            offload_policy=weights_offload,
            reshard_after_forward=layout.reshard_after_forward,
        )
    fully_shard(
        policy, mesh=world.mesh, mp_policy=precision, offload_policy=weights_offload, reshard_after_forward=False
    )
    register_fsdp_forward_method(policy, "reference_logprobs")
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return policy


@torch.no_grad()
def fill(policy: Policy, weights: Weights, world: World, layout: EngineOptions) -> None:
    """Give a sharded policy without memory its weights, a tensor at a time. Every process must call this."""
    device = world.device
    tables = {name: buffer for name, buffer in policy.named_buffers() if not buffer.is_meta}
    policy.to_empty(device=device.host if layout.param_offload else device.torch_device)
    for name, table in tables.items():
        owner, _, key = name.rpartition(".")
        policy.get_submodule(owner)._buffers[key] = table.to(device.torch_device)
    lm = policy.lm
    for name, parameter in lm.named_parameters():
        part = _local_part(parameter)
        local(parameter).copy_(weights.read(name, tuple(parameter.shape), part))
    in_files = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        if name in in_files:
            buffer.data = weights.read(name, tuple(buffer.shape), _whole(buffer)).to(device.torch_device)


def sum_copies(policy: Policy, world: World, now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all copies of the weights; once a step is enough."""
    if world.mesh is not None and world.mesh.ndim > 1:
        assert isinstance(policy, FSDPModule)
        policy.set_requires_all_reduce(now)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor as the same part of a sharded one as the parameter's: of as many rows, which may have other columns.

    It shares the tensor's memory wherever that is: what a checkpoint reads into it reaches what is offloaded too.
    """
    if not isinstance(parameter, DTensor):
        return shard
    shape = torch.Size((parameter.shape[0], *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    # from_local would copy what is in the host's memory to the device
    outline = DTensor.from_local(
        shard.to("meta"), parameter.device_mesh, parameter.placements, shape=shape, stride=stride
    )
    return DTensor(shard, outline._spec, requires_grad=False)


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """A sharded tensor gathered from all processes, on `device`. Every process must call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.to_local().device != device:  # offloaded: collectives run on the device
        return DTensor.full_tensor(like(tensor.to_local().to(device), tensor))  # type: ignore[arg-type]
    return tensor.full_tensor()


def _local_part(parameter: Tensor) -> Part:
    if not isinstance(parameter, DTensor):
        return _whole(parameter)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _whole(tensor: Tensor) -> Part:
    return tuple(slice(0, size) for size in tensor.shape)


def at_rest(policy: Policy) -> None:
    """Give back the whole weights that a forward pass without a backward pass leaves gathered."""
    for module in policy.modules():  # the call for the whole acts on its own weights alone
        if isinstance(module, FSDPModule):
            module.reshard()


def _recomputed(
    block: nn.Module, forward: Callable[..., Tensor], offload: ActivationOffload | None, *inputs: Any, **options: Any
) -> Any:
    """The block's output, from its inputs again in the backward pass. Around what is compiled, which could not hold it."""
    if not block.training:
        return forward(*inputs, **options)
    with offload.around() if offload else nullcontext():  # inside, checkpoint keeps nothing but the inputs
        return checkpoint(forward, *inputs, use_reentrant=False, **options)
