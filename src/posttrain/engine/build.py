"""Options -> an engine: load, wrap, shard, compare with transformers, add the optimizer."""

from __future__ import annotations

from functools import partial

import torch

from posttrain.config.schema import ModelOptions, OptimOptions
from posttrain.distributed.sharding import at_rest, prepare
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer import AdamW, learning_rate, warmup_steps
from posttrain.models.load import find_model, load_model
from posttrain.models.policy import Policy, check_policy


def build_engine(
    model: ModelOptions,
    optim: OptimOptions,
    num_steps: int,
    world: World,
    dtype: torch.dtype,
    *,
    packing: bool,
    seed: int,
) -> Engine:
    """The engine of a run of `num_steps` steps. Every process must call this."""
    world.watchdog.beat("loading the model")
    lm = load_model(
        find_model(model.path),
        dtype=torch.float32,
        random_weights=model.random_weights,
        override_config=model.override_config,
        revision=model.revision,
        trust=model.trust_remote_code,
        seed=seed,
    )
    policy = prepare(Policy(lm, packing), world, dtype, model.enable_gradient_checkpointing)
    check_policy(policy, world.device.torch_device)
    at_rest(policy)
    return Engine(policy, world, partial(make_optimizer, optim, num_steps), seed)


def make_optimizer(optim: OptimOptions, num_steps: int, policy: Policy, world: World) -> AdamW:
    warmup = warmup_steps(num_steps, optim.lr_warmup_steps, optim.lr_warmup_steps_ratio)
    rate = learning_rate(
        optim.lr, optim.lr_scheduler_type, num_steps, warmup, optim.min_lr_ratio, optim.wsd_decay_ratio
    )
    return AdamW(
        policy.lm.named_parameters(),
        world,
        rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
    )
