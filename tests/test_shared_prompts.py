"""Answers that go through the model with their prompt once have the numbers of answers that each bring their own."""

import numpy as np
import pytest
import torch

from posttrain.data.batches import pack, pack_answers
from posttrain.loops.policy_batches import Limits, micro_batches, with_logprobs
from posttrain.losses.grpo import PolicyGradient
from posttrain.models.flops import forward_backward_flops
from posttrain.records import Sample
from tiny import CONFIGS, VOCABULARY, alone, clear, gradients, make_engine, tiny_lm, worst_gap

SHARED, ALONE = Limits(None, 200, True), Limits(None, 200, False)


def answers(seed=0, prompts=(6, 1, 9, 2), group=4):
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(prompts):
        prompt = rng.integers(0, VOCABULARY, length)
        for _ in range(group if number != 2 else 1):
            own = rng.integers(0, VOCABULARY, int(rng.integers(1, 9)))
            ids = np.concatenate([prompt, own]).astype(np.int32)
            weights = np.concatenate([np.zeros(length), rng.random(len(own)) + 0.5]).astype(np.float32)
            signals = {"advantages": rng.normal(size=len(ids)).astype(np.float32)}
            samples.append(Sample(len(samples), ids, weights, signals, length))
    return samples


@pytest.mark.parametrize("loss", ["clip", "gspo"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_and_log_probabilities_equal_those_of_answers_alone(family, loss):
    engine, samples = make_engine(tiny_lm(family)), answers()
    policy = PolicyGradient(loss, kl_coef=0.1, entropy_coef=0.1, has_reference=True).loss()
    found = []
    for limits in (SHARED, ALONE):
        known = with_logprobs(samples, "reference_logprobs", engine, limits)
        moved = [{**s.signals, "old_logprobs": s.signals["reference_logprobs"] - 0.1 * (s.row % 3)} for s in known]
        known = [Sample(s.row, s.ids_T, s.weights_T, m, s.prompt_length) for s, m in zip(known, moved, strict=True)]
        report = engine.forward_backward(micro_batches(known, limits, alone()), policy, 30.0)
        found.append((known, report, gradients(engine)))
        clear(engine)
    (shared, report, gradient), (plain, expected, expected_gradient) = found
    for one, other in zip(shared, plain, strict=True):
        np.testing.assert_allclose(one.signals["old_logprobs"], other.signals["old_logprobs"], atol=1e-5)
        assert not one.signals["reference_logprobs"][: one.prompt_length].any()
    torch.testing.assert_close(report.loss, expected.loss)
    for name in expected.measured:
        torch.testing.assert_close(report.measured[name], expected.measured[name])
    assert worst_gap(gradient, expected_gradient) < 1e-5


def test_a_prompt_is_there_once_and_positions_go_on_behind_it():
    first, second, third = answers(prompts=(3,), group=3)
    packed = pack_answers([[first, second], [third]])
    shared = 2 + (len(first) - 2) + (len(second) - 2)
    assert packed.lengths_N == (shared, len(third))
    assert packed.branches_N == ((2, len(first) - 2, len(second) - 2), (len(third),))
    own = [[0, 1], range(2, len(first)), range(2, len(second)), range(len(third))]
    assert packed.positions_T.tolist() == [position for part in own for position in part]
    plain = pack([first, second, third])
    trained = plain.weights_T > 0
    assert packed.labels_T[packed.weights_T > 0].tolist() == plain.labels_T[trained].tolist()
    assert packed.weights_T.sum() == pytest.approx(plain.weights_T.sum())


def test_groups_that_do_not_fit_are_cut_and_rows_a_micro_batch_are_kept():
    samples = answers(prompts=(20,), group=8)
    parts = [part.documents for part in Limits(None, 40, True).parts(samples, alone())]
    documents = [document for part in parts for document in part]
    assert sorted(i for document in documents for i in document) == list(range(8)) and len(documents) > 1
    assert all(len(micro_batch.ids_T) <= 40 for micro_batch in micro_batches(samples, Limits(None, 40, True), alone()))
    single = micro_batches(samples, Limits(1, 40, True), alone())
    assert len(single) == 8 and all(m.branches_N == () for m in single)


def test_shared_prompts_are_counted_once_in_flops():
    count = forward_backward_flops(CONFIGS["qwen2"]())
    samples = answers(prompts=(6,), group=4)
    shared, plain = (sum(map(count, micro_batches(samples, limits, alone()))) for limits in (SHARED, ALONE))
    assert 0 < shared < plain
