"""Options -> an engine: load, add adapters, shard, fill, add the optimizer, compare with transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.data.images.processor import ImageText
from posttrain.distributed.broadcast import BroadcastWeights
from posttrain.distributed.device import runs_liger
from posttrain.distributed.sequence import heads_refused
from posttrain.distributed.sharding import fill, local, prepare
from posttrain.distributed.world import World
from posttrain.engine.check import check_engine
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer import AdamW, learning_rate, warmup_steps
from posttrain.engine.optimizer_8bit import AdamW8bit
from posttrain.errors import InputError
from posttrain.models.four_bit import PackedWeights, four_bit_layers, frozen_linear_layers, load_in_4bit
from posttrain.models.kernels import use_liger
from posttrain.models.load import empty_model, find_model, load_config, load_model, set_tables
from posttrain.models.lora import Adapters, AdapterWeights, add_adapters, fill_adapters, fingerprint, wants_adapters
from posttrain.models.policy import Policy, with_dropout, without_dropout
from posttrain.models.vision import check_parts, freeze
from posttrain.models.weights import FileWeights, Weights, weights_folder


def build_engine(
    model: ModelOptions,
    layout: EngineOptions,
    optim: OptimOptions,
    num_steps: int,
    world: World,
    dtype: torch.dtype,
    *,
    packing: bool,
    seed: int,
    temperature: float = 1.0,
    dropout: bool = True,
    images: ImageText | None = None,
) -> Engine:
    """The engine of a run of `num_steps` steps, which computes in `dtype`. Every process must call this.

    `images` is how those of the rows are prepared; where no row has any, a vision model's weights for them stay as they are.
    """
    check_layout(model, layout, packing)
    liger = model.use_liger and runs_liger(world.device.torch_device)
    if liger and model.torch_compile:
        raise InputError(
            "model.use_liger and model.torch_compile fuse the same operations, and Liger's kernels inside of compiled blocks are "
            "unproven. Choose one of the two."
        )
    world.watchdog.beat("loading the model")
    sharded, wanted = world.mesh is not None, wants_adapters(model)
    lm, base = _empty(model, world, seed) if sharded else (_whole(model, seed), None)
    if liger:
        use_liger(lm)
    _freeze(lm, model, sees=images is not None)
    adapter_config = add_adapters(lm, model, dtype) if wanted else None
    if not dropout:
        without_dropout(lm)
    weights = AdapterWeights(base, model, seed) if wanted else base
    policy = Policy(lm, packing, temperature)
    if model.load_in_4bit:
        load_in_4bit(policy.blocks)
    if dropout and model.dropout:
        with_dropout(policy, model.dropout)
    prepare(
        policy,
        world,
        dtype,
        layout,
        recompute_every=model.gradient_checkpointing_every if model.enable_gradient_checkpointing else None,
        compile_blocks=model.torch_compile,
        offload_inputs=model.enable_activation_offload,
    )
    if sharded and weights:
        fill(policy, PackedWeights(lm, weights, world.device.torch_device), world, layout)
    elif isinstance(weights, AdapterWeights):
        fill_adapters(lm, weights)
    adapters = Adapters(adapter_config, str(model.path), _base_fingerprint(policy, world)) if adapter_config else None
    engine = Engine(policy, world, partial(make_optimizer, optim, layout, num_steps), seed, adapters)
    check_engine(engine, dtype, images)
    return engine


def build_reference(engine: Engine, model: ModelOptions, layout: EngineOptions, dtype: torch.dtype) -> Engine:
    """The policy that a run began with, which stays as it was: the engine's own without adapters, or else a frozen copy, sharded
    likewise and with engine.reference_offload kept in CPU memory. Every process must call this."""
    if engine.adapters:
        return engine
    frozen = layout.model_copy(update={"param_offload": layout.reference_offload})
    copy = build_engine(
        model, frozen, OptimOptions(), 1, engine.world, dtype,
        packing=engine.policy.packing, seed=engine.seed, temperature=engine.policy.temperature,
    )  # fmt: skip
    copy.policy.requires_grad_(False)
    return copy


def _freeze(lm: Any, model: ModelOptions, sees: bool) -> None:
    check_parts(lm, model.freeze_vision_tower, model.freeze_projector)
    freeze(lm, tower=model.freeze_vision_tower or not sees, projector=model.freeze_projector or not sees)


def count_weights(model: ModelOptions, dtype: torch.dtype, sees: bool) -> tuple[int, int, int] | None:
    """How many of the model's weights are trained, how many there are, and how many model.load_in_4bit can mean, without loading any;
    `sees`: some rows have images. None for a model whose own code cannot make it without memory."""
    try:
        lm, _ = empty_model(**_source(model))
    except InputError:
        raise
    except Exception:  # of any kind: what loads it needs not fail, and says better what is wrong if it does
        return None
    _freeze(lm, model, sees)
    if wants_adapters(model):
        add_adapters(lm, model, dtype)
    numbers = [(weight.numel(), weight.requires_grad) for weight in lm.parameters()]
    trained = sum(number for number, is_trained in numbers if is_trained)
    return trained, sum(number for number, _ in numbers), _num_frozen_linear(lm) if wants_adapters(model) else 0


def _num_frozen_linear(lm: Any) -> int:
    modules = (module for block in Policy(lm, packing=False).blocks for module in block.modules())
    return sum(layer.weight.numel() for module in modules for _, layer in frozen_linear_layers(module))


def kept_dtype(model: ModelOptions) -> torch.dtype:
    """The number format of trained weights between steps."""
    return getattr(torch, model.weights_dtype)


def check_layout(model: ModelOptions, layout: EngineOptions, packing: bool) -> None:
    """Raise InputError for what cannot work together, before anything large is loaded."""
    size = layout.ulysses_sequence_parallel_size
    if size == 1:
        return
    option = f"engine.ulysses_sequence_parallel_size={size}"
    if not packing:
        raise InputError(
            f"{option} cuts packed rows, and data.packing=false runs each document alone. Choose one of the two."
        )
    config = load_config(find_model(model.path), model.override_config, model.revision, model.trust_remote_code)
    refused = heads_refused(config.get_text_config().num_attention_heads, size)
    if refused:
        raise InputError(f"{option}: {refused}.")


def make_optimizer(optim: OptimOptions, layout: EngineOptions, num_steps: int, policy: Policy, world: World) -> AdamW:
    warmup = warmup_steps(num_steps, optim.lr_warmup_steps, optim.lr_warmup_steps_ratio)
    rate = learning_rate(
        optim.lr, optim.lr_scheduler_type, num_steps, warmup, optim.min_lr_ratio, optim.wsd_decay_ratio
    )
    kind = AdamW8bit if optim.optimizer == "adamw_8bit" else AdamW
    return kind(
        policy.lm.named_parameters(),
        world,
        rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        offload=layout.optimizer_offload,
    )


def _source(model: ModelOptions) -> dict[str, Any]:
    return {
        "path": find_model(model.path),
        "dtype": kept_dtype(model),
        "override_config": model.override_config,
        "revision": model.revision,
        "trust": model.trust_remote_code,
    }


def _whole(model: ModelOptions, seed: int) -> Any:
    return load_model(**_source(model), random_weights=model.random_weights, seed=seed)


def _empty(model: ModelOptions, world: World, seed: int) -> tuple[Any, Weights]:
    """The model without memory, and where its weights come from: files read in parts where they can be, else one process."""
    source = _source(model)
    lm, complete = empty_model(**source)
    if complete and not model.random_weights:
        world.on_main(lambda: weights_folder(source["path"], model.revision))
        folder = world.everyone(lambda: weights_folder(source["path"], model.revision))  # other machines have their own
        found = FileWeights.matching(folder, lm)
        everywhere = all(world.gather(found is not None))
        if found and everywhere:
            return lm, found
    handed = BroadcastWeights(world, partial(_whole, model, seed), source["dtype"])
    set_tables(lm, handed.tables)
    return lm, handed


def _base_fingerprint(policy: Policy, world: World) -> str:
    packed = four_bit_layers(policy.lm)
    shards = ((name, local(p.detach())) for name, p in policy.lm.named_parameters() if not p.requires_grad)
    frozen = ((name, shard.view(torch.int16) if name in packed else shard) for name, shard in shards)
    return fingerprint(frozen, lambda sums: world.sum_over_shards(sums.to(world.device.torch_device)))
