"""Compiled blocks: traced once, whatever the lengths of the rows. What the compiler makes of them is test_engine.py's."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.engine.build import build_engine
from posttrain.losses.sft import sft_loss
from tiny import alone, clear, gradients, packed, random_samples, worst_gap

TRAINING_GRAPHS = 4  # before attention, in it before and after what stays as it is, and behind it
SHAPES = range(5)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without a compiler behind it, which is what takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()


def test_a_row_of_another_length_is_no_reason_to_trace_again(models, traced):
    def build(**more):
        model = ModelOptions(path=str(models / "qwen3"), **more)
        return build_engine(model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=0)

    def rows(seed):
        return packed(random_samples(3 + seed, seed=seed, longest=8 + 4 * seed), max_tokens=100)

    plain, compiled = build(), build(torch_compile=True)
    for seed in SHAPES:
        for engine in (plain, compiled):
            clear(engine)
            engine.forward_backward(rows(seed), sft_loss)
        assert worst_gap(gradients(compiled), gradients(plain)) < 1e-5, seed
        assert counters["stats"]["unique_graphs"] == TRAINING_GRAPHS, seed
    for seed in SHAPES:
        compiled.forward(rows(seed))  # validation: once more, without gradients
        assert counters["stats"]["unique_graphs"] == 2 * TRAINING_GRAPHS, seed
