"""The loss and its gradients do not depend on the layout: packed, padded, one by one, any split."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Llama4TextConfig

from posttrain.data.batches import pack
from posttrain.errors import InputError
from posttrain.losses.sft import sft_loss
from posttrain.records import Sample
from tiny import CONFIGS, clear, gradients, make_engine, packed, random_samples, tiny_lm, worst_gap

LOSS_GAP = 1e-6
GRADIENT_GAP = 1e-5


def padded_reference(lm, samples):
    """Loss and gradients by transformers alone, on one padded batch."""
    lm.set_attn_implementation("eager")
    longest = max(map(len, samples))
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask, weights = torch.zeros_like(ids), torch.zeros(len(samples), longest)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.from_numpy(sample.ids_T.astype(np.int64))
        mask[row, : len(sample)] = 1
        weights[row, : len(sample)] = torch.from_numpy(sample.weights_T)
    logits = lm(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def step(lm, micro_batches, **options):
    engine = make_engine(lm, **options)
    report = engine.forward_backward(micro_batches, sft_loss)
    return float(report.loss), gradients(engine)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_equals_padded_equals_one_row_at_a_time(family):
    samples = random_samples(9)
    loss, expected = padded_reference(tiny_lm(family), samples)
    layouts = {
        "packed": packed(samples),
        "one row at a time": packed(samples, max_rows=1),
        "packed to 40 tokens": packed(samples, max_tokens=40),
    }
    for layout, micro_batches in layouts.items():
        found_loss, found = step(tiny_lm(family), micro_batches)
        assert found_loss == pytest.approx(loss, rel=LOSS_GAP), layout
        assert worst_gap(found, expected) < GRADIENT_GAP, layout


@pytest.mark.parametrize("options", [{"packing": False}, {"checkpointing": True}], ids=str)
def test_unpacked_and_recomputed_passes_equal_the_packed_one(options):
    samples = random_samples(7, seed=1)
    loss, expected = step(tiny_lm(), packed(samples))
    found_loss, found = step(tiny_lm(), packed(samples), **options)
    assert found_loss == pytest.approx(loss, rel=LOSS_GAP)
    assert worst_gap(found, expected) < GRADIENT_GAP


@pytest.mark.parametrize(
    "limits", [{"max_rows": n} for n in (1, 2, 3, 5)] + [{"max_tokens": n} for n in (30, 64)], ids=str
)
def test_any_micro_batch_split_gives_the_same_gradients(limits):
    samples = random_samples(11, seed=2)
    loss, expected = step(tiny_lm(), packed(samples))
    found_loss, found = step(tiny_lm(), packed(samples, **limits))
    assert found_loss == pytest.approx(loss, rel=LOSS_GAP)
    assert worst_gap(found, expected) < GRADIENT_GAP


def test_gradient_checkpointing_computes_each_block_again():
    calls = []
    engine = make_engine(tiny_lm(), checkpointing=True)
    engine.policy.blocks[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    engine.forward_backward(packed(random_samples(3)), sft_loss)
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for the CPU needs g++")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_rows_of_any_length(checkpointing):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    engine = make_engine(tiny_lm(), compiled=True, checkpointing=checkpointing)
    num_graphs = []
    for seed in range(5):
        batch = packed(random_samples(3 + 2 * seed, seed=seed), max_tokens=100)
        expected_loss, expected = step(tiny_lm(), batch)
        assert float(engine.forward_backward(batch, sft_loss).loss) == pytest.approx(expected_loss, rel=LOSS_GAP)
        assert worst_gap(gradients(engine), expected) < GRADIENT_GAP
        clear(engine)
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] > 0 and set(num_graphs) == {num_graphs[0]}, num_graphs
    assert not counters["recompiles"]


def test_moments_and_weights_that_live_elsewhere_move_alike():
    whole, streaming = make_engine(tiny_lm()), make_engine(tiny_lm())
    streaming.optimizer.streams = True  # as where the device has memory of its own
    for seed in range(4):
        for engine in (whole, streaming):
            engine.forward_backward(packed(random_samples(5, seed=seed)), sft_loss)
            engine.optim_step()
    expected = dict(whole.named_weights())
    assert all(torch.equal(weight, expected[name]) for name, weight in streaming.named_weights())


def test_a_filler_without_rows_changes_nothing():
    samples = random_samples(4, seed=3)
    loss, expected = step(tiny_lm(), packed(samples))
    found_loss, found = step(tiny_lm(), [*packed(samples), pack([])])
    assert found_loss == pytest.approx(loss, rel=LOSS_GAP)
    assert worst_gap(found, expected) < GRADIENT_GAP


def test_a_document_does_not_see_its_neighbours():
    one, other, third = random_samples(6, seed=4)[3:6]
    engine = make_engine(tiny_lm())
    (beside,) = engine.forward([pack([one, other])])
    (elsewhere,) = engine.forward([pack([third, other])])
    assert np.abs(beside[len(one) :] - elsewhere[len(third) :]).max() < 1e-5


def leaky_lm():
    """A model one of whose layers carries state from token to token, as linear attention does."""
    lm = tiny_lm()
    plain = lm.model.layers[1].forward

    def carrying(hidden_states, **options):
        out = plain(hidden_states, **options)
        return out + 0.1 * out.cumsum(1)

    lm.model.layers[1].forward = carrying
    return lm


def test_a_model_whose_layers_cannot_be_told_from_its_head_is_refused():
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}  # fmt: skip
    with pytest.raises(InputError, match="Llama4ForCausalLM: transformers does not tell its layers apart"):
        make_engine(AutoModelForCausalLM.from_config(Llama4TextConfig(**shape)))


def test_a_model_that_carries_state_across_documents_is_refused_unless_unpacked():
    with pytest.raises(InputError, match=r"data.packing=false"):
        make_engine(leaky_lm())
    make_engine(leaky_lm(), packing=False)


def test_a_step_that_is_not_finite_moves_nothing_and_is_reported():
    engine = make_engine(tiny_lm())
    batch = packed(random_samples(4))
    engine.forward_backward(batch, sft_loss)
    engine.optim_step()
    before = {name: weight.clone() for name, weight in engine.named_weights()}
    moments = {name: value.clone() for name, value in engine.state()["optimizer"].items()}
    engine.forward_backward(batch, sft_loss)
    next(iter(engine.policy.parameters())).grad[0, 0] = float("inf")
    assert float(engine.optim_step().skipped) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in engine.named_weights())
    assert all(torch.equal(value, moments[name]) for name, value in engine.state()["optimizer"].items())
    engine.forward_backward(batch, sft_loss)
    assert float(engine.optim_step().skipped) == 0
    assert any(not torch.equal(weight, before[name]) for name, weight in engine.named_weights())


def test_steps_equal_those_of_torch_with_clipping_and_decay_on_matrices_only():
    samples, lm = random_samples(6, seed=5), tiny_lm("llama")
    engine = make_engine(tiny_lm("llama"), clip_grad=0.1)
    matrices = [p for p in lm.parameters() if p.dim() >= 2]
    vectors = [p for p in lm.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for _ in range(5):
        engine.forward_backward(packed(samples), sft_loss)
        engine.optim_step()
        reference.zero_grad()
        padded_reference(lm, samples)
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.1)
        reference.step()
    expected = {name: weight.detach() for name, weight in lm.named_parameters()}
    assert worst_gap(dict(engine.named_weights()), expected) < 1e-4


def test_dropout_is_a_function_of_seed_and_step():
    def losses(seed_step):
        lm = tiny_lm()
        lm.config.attention_dropout = 0.5
        for layer in lm.model.layers:
            layer.self_attn.attention_dropout = 0.5
        engine = make_engine(lm)
        engine.step = seed_step
        torch.manual_seed(int(torch.randint(1000, ()).item()))  # whatever ran before
        return float(engine.forward_backward(packed(random_samples(5)), sft_loss).loss)

    assert losses(3) == losses(3) != losses(4)


def test_forward_gives_log_probabilities_of_trained_labels():
    lm, samples = tiny_lm(), random_samples(3, seed=6)
    engine = make_engine(lm)
    batch = pack(samples)
    (found,) = engine.forward([batch])
    expected = -float(engine.forward_backward([batch], sft_loss).loss)
    assert float((found * batch.weights_T).sum() / batch.weights_T.sum()) == pytest.approx(expected, rel=1e-5)
    clear(engine)


def test_the_last_token_of_a_document_predicts_nothing():
    batch = pack([Sample(0, np.array([1, 2, 3], np.int32), np.ones(3, np.float32)),
                  Sample(1, np.array([4, 5], np.int32), np.ones(2, np.float32))])  # fmt: skip
    assert batch.labels_T.tolist() == [2, 3, -100, 5, -100]
    assert batch.weights_T.tolist() == [1, 1, 0, 1, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
