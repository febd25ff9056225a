"""Dropout on each block's output: where it falls, what it is a function of, and where it is off."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import forked
from posttrain.config.compose import compose
from posttrain.config.schema import EngineOptions, ModelOptions, OptimOptions
from posttrain.engine.build import build_engine
from posttrain.errors import InputError
from posttrain.losses.sft import sft_loss
from posttrain.models.policy import with_dropout
from tiny import CONFIGS, alone, gradients, packed, random_samples, worst_gap

SHARE = 0.3


def engine_with(models, share=SHARE, family="qwen2", dropout=True, **more):
    model = ModelOptions(path=str(models / family), dropout=share, **more)
    return build_engine(
        model, EngineOptions(), OptimOptions(), 1, alone(), torch.float32, packing=True, seed=3, dropout=dropout
    )


def first_gradients(engine, step=0):
    engine.step = step
    for parameter in engine.policy.parameters():
        parameter.grad = None
    engine.forward_backward(packed(random_samples(6), max_rows=3), sft_loss)
    return gradients(engine)


@pytest.mark.parametrize("family", CONFIGS)
def test_each_block_loses_its_share_in_training_and_nothing_in_validation(models, family):
    seen = []
    engine, plain = engine_with(models, family=family), engine_with(models, 0.0, family)
    for block in engine.policy.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    rows = packed(random_samples(6))
    expected, found = plain.forward(rows), engine.forward(rows)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    seen.clear()
    engine.forward_backward(rows, sft_loss)
    assert len(seen) == len(engine.policy.blocks)
    for output in seen:
        hidden = output[0] if isinstance(output, tuple) else output
        assert abs(float((hidden == 0).float().mean()) - SHARE) < 0.06, family


def test_the_mask_is_a_function_of_seed_step_and_micro_batch(models):
    engine = engine_with(models)
    first = first_gradients(engine)
    assert worst_gap(first_gradients(engine), first) == 0
    assert worst_gap(first_gradients(engine_with(models)), first) == 0
    assert worst_gap(first_gradients(engine, step=1), first) > 1e-3
    sample = random_samples(1)
    twice = packed(sample) * 2  # the same row in two micro-batches
    seen = []
    engine.policy.blocks[0].register_forward_hook(lambda _block, _inputs, output: seen.append(output))
    engine.forward_backward(twice, sft_loss)
    first_mask, second_mask = ((output[0] if isinstance(output, tuple) else output) == 0 for output in seen)
    assert not torch.equal(first_mask, second_mask)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_a_block_computed_again_has_the_same_mask(models, lora):
    expected = first_gradients(engine_with(models, **lora))
    again = engine_with(models, enable_gradient_checkpointing=True, **lora)
    assert worst_gap(first_gradients(again), expected) < 1e-6
    assert worst_gap(first_gradients(engine_with(models, 0.0, **lora)), expected) > 1e-3


@pytest.mark.slow
def test_a_compiled_block_has_the_same_mask(models):
    expected = first_gradients(engine_with(models))
    assert worst_gap(first_gradients(engine_with(models, torch_compile=True)), expected) < 1e-5


def test_it_is_off_where_answers_are_learnt_from(models):
    expected = first_gradients(engine_with(models, 0.0))
    assert worst_gap(first_gradients(engine_with(models, dropout=False)), expected) == 0
    told = compose(["model.dropout=0.1", "model.path=m", "data.train_files=t"], "grpo").ignored
    assert "model.dropout" in {note["key"] for note in told}
    assert "model.dropout" not in {note["key"] for note in compose(["model.dropout=0.1"], "sft").ignored}


def test_blocks_without_a_tensor_to_drop_from_are_refused():
    class SomeLayer(torch.nn.Module):
        def forward(self, x):
            return {"hidden": x}

    class Blocks:
        blocks = (SomeLayer(),)

    with_dropout(Blocks, SHARE)
    with pytest.raises(InputError, match=r"model\.dropout=0\.3: a SomeLayer gives a dict"):
        Blocks.blocks[0](torch.ones(1))


def test_two_processes_drop_alike_when_they_compute_again(tiny, tmp_path):
    """Sharded by FSDP2, each row cut between them."""
    forked.start_server()
    found = {}
    for recompute in (False, True):
        path = tmp_path / f"{recompute}.safetensors"
        options = [
            f"data.train_files={tiny / 'train.parquet'}", f"data.cache_dir={tiny / 'cache'}",
            f"model.path={tiny / 'model'}", f"trainer.default_local_dir={tmp_path / str(recompute)}",
            "model.dropout=0.3", "engine.ulysses_sequence_parallel_size=2", "data.train_batch_size=8",
            f"model.enable_gradient_checkpointing={recompute}", f"--dump_gradients={path}",
        ]  # fmt: skip
        forked.run(["sft", *options], tmp_path, size=2)
        found[recompute] = load_file(path)
    assert worst_gap(found[True], found[False]) < 1e-5
