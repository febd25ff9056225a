"""What is done to a model before it trains, in the order that matters: recomputation, then sharding."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from posttrain.distributed.world import World
from posttrain.models.policy import Policy


def prepare(policy: Policy, world: World, dtype: torch.dtype, gradient_checkpointing: bool) -> Policy:
    """The policy on its device, ready to train: float32 weights, `dtype` for forward and backward.

    Several processes shard weights, gradients and optimizer states by FSDP2, block by block. Gradients are summed over
    processes, not averaged: the loss is divided by its number of tokens already.
    """
    if gradient_checkpointing:
        lm = policy.lm  # transformers renames the method from 5.23 on
        enable = getattr(lm, "activation_checkpointing_enable", lm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if world.mesh is None:
        policy.to(world.device.torch_device)
        policy.lm.tie_weights()  # where a device's tensors cannot take the place of the CPU's, `to` makes one of each name
        return policy
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in policy.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=precision)
    fully_shard(policy, mesh=world.mesh, mp_policy=precision, reshard_after_forward=False)
    register_fsdp_forward_method(policy, "reference_logprobs")
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return policy.to(world.device.torch_device)


def at_rest(policy: Policy) -> None:
    """Give back the whole weights that a forward pass without a backward pass leaves gathered."""
    if isinstance(policy, FSDPModule):
        policy.reshard()
