"""Tiny models and samples that the tests share."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from posttrain.config.schema import EngineOptions
from posttrain.data.batches import pack, split
from posttrain.distributed.device import choose_device
from posttrain.distributed.sharding import prepare
from posttrain.distributed.world import World
from posttrain.engine.check import check_engine
from posttrain.engine.engine import Engine
from posttrain.engine.optimizer import AdamW, learning_rate
from posttrain.models.policy import Policy
from posttrain.records import MicroBatch, Sample

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "three-key-heads": lambda: Qwen3Config(**SHAPE | {"num_attention_heads": 6, "num_key_value_heads": 3}, head_dim=8),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
}


def tiny_lm(family: str = "qwen2", seed: int = 0):
    """A causal LM of a few thousand weights, larger than usual so that mistakes show."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.dim() >= 2:
                weight.mul_(4)
    return lm


def alone() -> World:
    return World(choose_device("cpu"))


def make_engine(
    lm,
    world: World | None = None,
    *,
    packing: bool = True,
    checkpointing: bool = False,
    compiled: bool = False,
    **optim,
) -> Engine:
    world = world or alone()
    every = 1 if checkpointing else None
    policy = prepare(
        Policy(lm, packing), world, torch.float32, EngineOptions(), recompute_every=every, compile_blocks=compiled
    )
    engine = Engine(policy, world, partial(_optimizer, optim))
    check_engine(engine, torch.float32)
    return engine


def _optimizer(optim: dict, policy: Policy, world: World) -> AdamW:
    rate = optim.pop("rate", None) or learning_rate(1e-2, "constant", 100, 0, 0.0, 0.1)
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad": 1.0, **optim}
    return AdamW(policy.lm.named_parameters(), world, rate, **options)


def random_samples(count: int, seed: int = 0, longest: int = 30) -> list[Sample]:
    """Samples of random length whose first part is untrained; one of them has no trained token at all."""
    rng = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        length = int(rng.integers(2, longest))
        weights = np.ones(length, dtype=np.float32)
        weights[: int(rng.integers(0, length))] = 0
        if row == 1:
            weights[:] = 0
        samples.append(Sample(row, rng.integers(0, VOCABULARY, length).astype(np.int32), weights))
    return samples


def packed(samples: list[Sample], world: World | None = None, **limits: int) -> list[MicroBatch]:
    """This process's micro-batches of one step."""
    world = world or alone()
    readers = split([len(s) for s in samples], world.num_readers, **limits)
    return [pack([samples[i] for i in documents]) for documents in readers[world.reader]]


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: gradient.clone() for name, gradient in engine.named_gradients()}


def clear(engine: Engine) -> None:
    for parameter in engine.policy.parameters():
        parameter.grad = None


def worst_gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ||g - g'|| / ||g'|| over the tensors, which must be the same ones."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12)) for n in expected)
