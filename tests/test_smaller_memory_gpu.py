"""Activation offload where there is an accelerator: the same gradients from less of its memory."""

import pytest
import torch

from posttrain.config.schema import EngineOptions
from posttrain.distributed.device import choose_device
from posttrain.distributed.sharding import prepare
from posttrain.distributed.world import World
from posttrain.models.attention import Documents
from posttrain.models.policy import Policy
from tiny import VOCABULARY

TOKENS = 16384


def gradients_and_peak(offloads: bool) -> tuple[list[torch.Tensor], float, int]:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    lm = AutoModelForCausalLM.from_config(Qwen2Config(**shape, vocab_size=VOCABULARY, num_hidden_layers=16))
    world = World(choose_device())
    device = world.device.torch_device
    policy = prepare(
        Policy(lm.float()), world, torch.float32, EngineOptions(), recompute_every=1, offload_inputs=offloads
    ).train()
    ids = torch.arange(TOKENS, device=device) % VOCABULARY
    documents = Documents.of((1024,) * (TOKENS // 1024), device)
    positions = torch.arange(TOKENS, device=device) % 1024
    chosen = torch.arange(1, device=device)
    for _ in range(2):  # the first one warms up
        policy.zero_grad()
        world.device.reset_peak_memory()
        policy(ids, positions, ids, chosen, documents)[0].sum().backward()
    peak = world.device.peak_memory_gib() or 0.0
    return [p.grad.cpu() for p in policy.parameters() if p.grad is not None], peak, 16 * TOKENS * 512 * 4


@pytest.mark.gpu
@pytest.mark.skipif(choose_device().type == "cpu", reason="needs an accelerator")
def test_offloaded_inputs_give_the_same_gradients_from_less_memory():
    plain, most, size = gradients_and_peak(offloads=False)
    away, less, _ = gradients_and_peak(offloads=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, away, strict=True))
    assert most - less > 0.7 * size / 2**30
